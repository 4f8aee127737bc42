"""Clients that cancel or vanish, and reservations that nobody fills."""

import time

import pytest
from serve_cases import PATIENCE_S, PROMPT_S, Pair, RawRequest, bystander, prompt, start_pair, wait_until

from homkv.errors import TransferError
from homkv.models import LoadedModel
from homkv.serve.client import Query
from homkv.serve.messages import Cancel, Failed, Prefill, Progress, Renew
from homkv.transport.wire import FrameError

SLOW_GBPS = 0.0008
LONG = Query(prompt(170), "balanced", 400)


class Enough(Exception):
    """What a caller's own code raises."""


def enough(_: int) -> None:
    raise Enough


def test_a_client_that_vanishes_while_its_prompt_computes_frees_both_sides(loaded: LoadedModel) -> None:
    with start_pair(loaded, link_gbps=SLOW_GBPS) as pair:
        with pair.peer("prefill") as prefill, RawRequest(pair) as request:
            prefill.send(request.order(prompt(150)))
            while not isinstance(prefill.recv(PATIENCE_S), Progress):
                continue
        pair.assert_free()


def test_a_client_that_vanishes_while_tokens_stream_frees_its_pages(pair: Pair, undisturbed: list[int]) -> None:
    with bystander(pair, undisturbed):
        client = pair.client()
        client._cancel = lambda request_id: None  # type: ignore[method-assign]  # a killed client tells nobody
        with pytest.raises(Enough):
            client.generate(LONG, on_token=enough)
        client.close()
    pair.assert_free()


def test_an_error_in_a_callback_cancels_the_request(pair: Pair, undisturbed: list[int]) -> None:
    with bystander(pair, undisturbed), pair.client() as client:
        with pytest.raises(Enough):
            client.generate(LONG, on_token=enough)
        assert len(client.generate(Query(prompt(20), "balanced", 3)).tokens) == 3
    pair.assert_free()


def test_a_prompt_is_cancelled_while_it_is_sent(loaded: LoadedModel) -> None:
    with start_pair(loaded, link_gbps=SLOW_GBPS) as pair, pair.client() as client:
        with pytest.raises(Enough):
            client.generate(LONG, on_layer=enough)
        start_s = time.monotonic()
        pair.assert_free()
        assert time.monotonic() - start_s < PROMPT_S
        assert len(client.generate(Query(prompt(20), "balanced", 3)).tokens) == 3


def test_a_waiting_prompt_is_cancelled_before_it_is_computed(loaded: LoadedModel) -> None:
    with start_pair(loaded, link_gbps=SLOW_GBPS) as pair, pair.peer("prefill") as peer:
        with RawRequest(pair, request_id="first") as first, RawRequest(pair, request_id="second") as second:
            peer.send(first.order(prompt(150)))
            peer.send(second.order(prompt(150, seed=1)))
            peer.send(Cancel("second"))
            failed = [m for m in (peer.recv(PATIENCE_S) for _ in range(4)) if isinstance(m, Failed)]
            assert [m.request_id for m in failed] == ["second"]
            assert "cancelled" in failed[0].detail
        pair.assert_free()


def test_only_the_client_of_a_request_may_cancel_it(pair: Pair) -> None:
    with RawRequest(pair) as request, pair.peer() as stranger:
        stranger.send(Cancel(request.request_id))
        stranger.send(Cancel("nobody's"))
        with request.sender() as sender:
            request.send(sender, 0)
            sender.finish(PATIENCE_S)
            assert pair.decoder.num_requests == 1
            request.peer.send(Cancel(request.request_id))
            failed = request.answer(PROMPT_S)
        assert isinstance(failed, Failed)
        assert "cancelled" in failed.detail


def test_a_reservation_that_nobody_fills_expires(loaded: LoadedModel, undisturbed: list[int]) -> None:
    with start_pair(loaded, lease_s=1.0) as pair, bystander(pair, undisturbed), RawRequest(pair) as request:
        assert request.ticket.lease_s == 1.0
        start_s = time.monotonic()
        failed = request.answer(1.0 + PROMPT_S)
        assert time.monotonic() - start_s > 0.5
        assert isinstance(failed, Failed)
        assert failed.error == "TransferError"
        assert "within 1.0 s" in failed.detail
        assert "layers 0, 1 missing" in failed.detail
        with request.sender() as sender:  # too late
            request.send(sender, 0)
            with pytest.raises(FrameError) as caught:
                sender.finish(PATIENCE_S)
        assert caught.value.reason == "sequence"


def test_every_layer_renews_the_lease(loaded: LoadedModel) -> None:
    """Longer than a lease in all, and never without a layer for one."""
    with start_pair(loaded, lease_s=1.5) as pair, RawRequest(pair) as request, request.sender() as sender:
        for layer in range(2):
            time.sleep(0.8)
            request.send(sender, layer)
            sender.finish(PATIENCE_S)
        time.sleep(0.2)
        assert pair.decoder.num_requests == 1
        failed = request.answer(1.5 + PROMPT_S)
        assert isinstance(failed, Failed)
        assert "the first token missing" in failed.detail


def test_a_heartbeat_cannot_keep_a_lease_for_ever(loaded: LoadedModel) -> None:
    with start_pair(loaded, lease_s=0.6, max_lease_s=1.5) as pair, RawRequest(pair) as request:
        start_s, failed = time.monotonic(), None
        while failed is None:
            request.peer.send(Renew([request.request_id]))
            assert time.monotonic() - start_s < 1.5 + PROMPT_S
            said = request.peer.poll(0.2)
            failed = next((message for message in said if isinstance(message, Failed)), None)
        assert time.monotonic() - start_s > 1.0
        assert "within 1.5 s" in failed.detail
        assert pair.decoder.status.counters["leases_expired"] == 1
        pair.assert_free()


def test_instances_that_stop_tell_their_clients(loaded: LoadedModel) -> None:
    with start_pair(loaded, link_gbps=SLOW_GBPS) as pair, pair.peer("prefill") as peer, RawRequest(pair) as request:
        peer.send(request.order(prompt(150)))
        peer.send(Prefill("waits", "balanced", prompt(10), 1, pair.decode.address.endpoint, None))
        wait_until(lambda: pair.prefiller.num_requests == 2)
        pair.decode.close()
        failed = request.answer(PROMPT_S)
        assert isinstance(failed, Failed)
        assert "stopping" in failed.detail
        pair.prefill.close()
        said = {}
        while len(said) < 2:
            message = peer.recv(PATIENCE_S)
            if isinstance(message, Failed):
                said[message.request_id] = message.error
        assert said == {"raw": "TransferError", "waits": "TransferError"}


def test_silence_ends_at_the_clients_own_deadline(loaded: LoadedModel) -> None:
    with start_pair(loaded, link_gbps=SLOW_GBPS / 10) as pair:
        with pair.client() as client, pytest.raises(TransferError, match=r"within 0\.3 s"):
            client.generate(LONG, timeout_s=0.3)
        pair.assert_free()
