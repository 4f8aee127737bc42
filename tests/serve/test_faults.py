"""Damage, strangers and deaths in the middle of a transfer: a typed error in time, nothing held, others unharmed."""

import threading
import time
from collections.abc import Sequence

import pytest
import zmq
from serve_cases import (
    PATIENCE_S,
    PROMPT_S,
    Pair,
    RawRequest,
    bystander,
    prompt,
    start_pair,
    tiny,
    wait_until,
)

from homkv.errors import CapacityError, TransferError
from homkv.models import LoadedModel
from homkv.serve.client import Query
from homkv.serve.messages import Choice, Done, Failed, Finish, Prefill, Progress, Token
from homkv.transport import sender as sender_module
from homkv.transport.endpoint import FRAME, LinkError
from homkv.transport.link import Peer
from homkv.transport.wire import FrameError, decode_frame

VICTIM = Query(prompt(170), "balanced", 8)
SLOW_GBPS = 0.0008  # a layer of the victim takes about 0.4 s
IN_TIME_S = 15.0


class DamagingPeer(Peer):
    """Flips one bit of every frame of the victim, on its way."""

    def submit(self, kind: bytes, body: Sequence[bytes | memoryview]) -> tuple[int, zmq.MessageTracker]:
        if kind == FRAME and decode_frame(*body).header.num_tokens == len(VICTIM.prompt_ids):
            damaged = bytearray(body[-1])
            damaged[len(damaged) // 2] ^= 8
            body = [*body[:-1], bytes(damaged)]
        return super().submit(kind, body)


def test_a_damaged_frame_is_never_used(pair: Pair, undisturbed: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = pair.ask(VICTIM).tokens
    refused = pair.decoder.listener.refused["digest"]
    with bystander(pair, undisturbed):
        with monkeypatch.context() as patch:
            patch.setattr(sender_module, "Peer", DamagingPeer)
            start_s = time.monotonic()
            with pytest.raises(TransferError, match="digest"):
                pair.ask(VICTIM)
            assert time.monotonic() - start_s < IN_TIME_S
        assert pair.decoder.listener.refused["digest"] > refused
        assert pair.ask(VICTIM).tokens == expected


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"epoch": 1}, "epoch"),
        ({"num_tokens": 151}, "sequence"),
        ({"sequence": "nobody"}, "sequence"),
    ],
)
def test_frames_for_another_reservation_are_refused(pair: Pair, changes: dict[str, object], reason: str) -> None:
    with RawRequest(pair) as request:
        with request.sender(**changes) as sender:
            request.send(sender, 0)
            with pytest.raises(FrameError) as caught:
                sender.finish(PATIENCE_S)
            assert caught.value.reason == reason
        with request.sender() as sender:  # the reservation is as it was
            request.send(sender, 0)
            assert len(sender.finish(PATIENCE_S)) == 1


def test_another_model_is_refused(loaded: LoadedModel) -> None:
    with start_pair(loaded, decode_model=tiny(seed=1)) as pair:
        with pytest.raises(TransferError, match="expected model"):
            pair.ask(VICTIM)
        pair.assert_free()
        assert pair.decoder.listener.refused["model"] >= 1


def test_another_page_layout_is_refused(loaded: LoadedModel, undisturbed: list[int]) -> None:
    with start_pair(loaded) as pair:
        with bystander(pair, undisturbed):
            pass  # both sides have made their codecs
        codec = pair.prefiller._codecs["balanced"]
        ours, codec.layout_id = codec.layout_id, "rows/99"
        with pytest.raises(TransferError, match="rows/99"):
            pair.ask(VICTIM)
        pair.assert_free()
        assert pair.decoder.listener.refused["layout"] >= 1
        codec.layout_id = ours
        assert len(pair.ask(VICTIM).tokens) == 8


def test_a_prefill_instance_that_dies_is_reported(pair: Pair, undisturbed: list[int]) -> None:
    with bystander(pair, undisturbed), RawRequest(pair) as request:
        with request.sender() as sender:
            request.send(sender, 0)
            sender.finish(PATIENCE_S)
        failed = request.answer(PROMPT_S)
        assert isinstance(failed, Failed)
        assert failed.error == "TransferError"
        assert "prefill instance gone" in failed.detail
        assert "layers 1 missing" in failed.detail


def test_a_prefill_instance_may_go_when_everything_is_there(pair: Pair) -> None:
    with RawRequest(pair) as request:
        with request.sender() as sender:
            for layer in range(2):
                request.send(sender, layer)
            sender.post(Finish(request.request_id, request.ticket.epoch, Choice(5)))
            sender.finish(PATIENCE_S)
        said = [request.answer() for _ in range(5)]
    assert [type(message) for message in said] == [Token] * 4 + [Done]


def test_a_first_token_without_all_layers_is_refused(pair: Pair) -> None:
    with RawRequest(pair) as request, request.sender() as sender:
        request.send(sender, 1)
        sender.post(Finish(request.request_id, request.ticket.epoch, Choice(5)))
        failed = request.answer(PROMPT_S)
        assert isinstance(failed, Failed)
        assert "layers 0 missing" in failed.detail


def test_a_first_token_over_the_vocabulary_is_refused(pair: Pair) -> None:
    with RawRequest(pair) as request, request.sender() as sender:
        for layer in range(2):
            request.send(sender, layer)
        sender.post(Finish(request.request_id, request.ticket.epoch, Choice(200)))
        failed = request.answer(PROMPT_S)
        assert isinstance(failed, Failed)
        assert "token 200" in failed.detail


def test_a_second_finish_changes_nothing(pair: Pair) -> None:
    with RawRequest(pair) as request, request.sender() as sender:
        for layer in range(2):
            request.send(sender, layer)
        for _ in range(2):
            sender.post(Finish(request.request_id, request.ticket.epoch, Choice(5)))
        said = [request.answer() for _ in range(5)]
    assert [message.index for message in said if isinstance(message, Token)] == [0, 1, 2, 3]


def test_one_request_is_fed_by_one_connection(pair: Pair) -> None:
    with RawRequest(pair) as request, request.sender() as first, request.sender() as second:
        request.send(first, 0)
        first.finish(PATIENCE_S)
        request.send(second, 1)
        with pytest.raises(FrameError, match="connection that sent its first") as caught:
            second.finish(PATIENCE_S)
        assert caught.value.reason == "sequence"
        request.send(first, 1)
        first.post(Finish(request.request_id, request.ticket.epoch, Choice(5)))
        assert isinstance(request.answer(), Token)


def test_a_layer_that_cannot_be_stored_fails_its_request_only(
    pair: Pair, undisturbed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = pair.decoder.engines["balanced"]
    load = engine.load

    def no_room(seq: int, layer: int, content: object, first_page: int) -> None:
        if getattr(content, "num_tokens", 0) == len(VICTIM.prompt_ids):
            raise CapacityError("expected room, found none; test")
        load(seq, layer, content, first_page)  # type: ignore[arg-type]

    with bystander(pair, undisturbed), monkeypatch.context() as patch:
        patch.setattr(engine, "load", no_room)
        with pytest.raises((CapacityError, TransferError), match="expected room"):
            pair.ask(VICTIM)


def test_a_decode_instance_that_goes_is_reported_by_both(loaded: LoadedModel) -> None:
    with start_pair(loaded, link_gbps=SLOW_GBPS) as pair, pair.client() as client:
        layers: list[int] = []

        def go(layer: int) -> None:
            layers.append(layer)
            threading.Thread(target=pair.decode.close).start()

        start_s = time.monotonic()
        with pytest.raises(TransferError):
            client.generate(VICTIM, on_layer=go, timeout_s=PATIENCE_S)
        wait_until(lambda: pair.prefiller.num_requests == 0)
        assert time.monotonic() - start_s < IN_TIME_S
        assert layers


def test_a_decode_instance_killed_in_the_middle_is_a_link_error(loaded: LoadedModel) -> None:
    """Its socket goes without a word, as when the process is killed."""
    with start_pair(loaded, link_gbps=SLOW_GBPS) as pair, pair.client() as client, pair.peer("prefill") as witness:

        def kill(layer: int) -> None:
            pair.decoder._rooms._given.clear()  # a killed process tells nobody
            threading.Thread(target=pair.decode.close).start()

        with pytest.raises(TransferError, match="vanished"):  # our connection's, or what prefill says of its own
            client.generate(VICTIM, on_layer=kill, timeout_s=PATIENCE_S)
        with pytest.raises(LinkError, match="none connected"):
            client.generate(VICTIM)
        wait_until(lambda: pair.prefiller.num_requests == 0)
        witness.send(Prefill("late", "balanced", prompt(20), 1, pair.decode.address.endpoint, None))
        while not isinstance(failed := witness.recv(PATIENCE_S), Failed):
            assert isinstance(failed, Progress)
        assert failed.error == "TransferError"
