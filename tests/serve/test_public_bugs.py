"""Failures that the public trackers of other serving systems describe, tried on this one. docs/chaos.md lists them."""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import httpx
import msgspec
import pytest
import xxhash
from bug_cases import QUERY, Kept, answer, dispatching, fill
from gateway_cases import _http as http_server
from gateway_cases import text_of, words
from serve_cases import (
    OPEN,
    OPTIONS,
    PATIENCE_S,
    PROMPT_S,
    Asked,
    Pair,
    RawRequest,
    prompt,
    start_pair,
    wait_until,
)

from homkv.cli.serve import instance_security
from homkv.errors import TransferError
from homkv.eval.chaos.cases import Case
from homkv.eval.chaos.judge import References
from homkv.eval.chaos.run import run_case
from homkv.eval.chaos.service import Subject
from homkv.eval.chaos.threads import ThreadCell
from homkv.models import LoadedModel
from homkv.serve.dispatch import Dispatcher
from homkv.serve.fleet import Address
from homkv.serve.gateway.app import Gateway
from homkv.serve.messages import (
    Cancel,
    Choice,
    Failed,
    Finish,
    FromDecode,
    Progress,
    Renew,
)
from homkv.serve.metrics import Metrics
from homkv.serve.query import DispatchOptions, Policy, Query
from homkv.serve.settings import load_settings
from homkv.spec import PRESETS
from homkv.testing.faults import Fault
from homkv.testing.models import tiny_model
from homkv.testing.proxy import FaultyLink
from homkv.transport.endpoint import FRAME, MESSAGE, Receipt
from homkv.transport.link import Peer
from homkv.transport.wire import FrameError

SLOW_GBPS = 0.0008  # a layer of 170 tokens takes about 0.4 s
ONE_REQUEST = 160  # tokens: a pool of so many holds one request of 150 and no second one


# -- wrong answers with status 200 -------------------------------------------------------------------------------------


def test_a_stale_reference_reads_and_writes_nothing(loaded: LoadedModel) -> None:
    """vllm#52234: after its blocks were used again, an old reference got the previous prompt's answer."""
    with start_pair(loaded, max_tokens=ONE_REQUEST) as pair:
        with Kept(pair, request_id="old") as old, old.sender() as late:
            old.feed(late, 0)
            late.finish(PATIENCE_S)
            old.peer.send(Cancel("old"))
            assert isinstance(old.answer(), Failed)
            with Kept(pair, request_id="newer") as new:  # in the same blocks: there are no others
                fill(new)
                old.feed(late, 1)
                with pytest.raises(FrameError, match="'old'"):
                    late.finish(PATIENCE_S)
                with new.sender(epoch=old.ticket.epoch) as stale:
                    new.feed(stale, 0)
                    with pytest.raises(FrameError) as caught:
                        stale.finish(PATIENCE_S)
                assert caught.value.reason in ("epoch", "sequence")
                new.assert_held()
        pair.assert_free()


def test_a_page_out_of_range_is_refused(pair: Pair) -> None:
    """vllm#52234: a reference to blocks that do not exist gave garbage instead of an error."""
    with pair.peer("prefill") as peer, RawRequest(pair) as request:
        peer.send(msgspec.structs.replace(request.order(prompt(150)), first_page=99))
        while not isinstance(failed := peer.recv(PATIENCE_S), Failed):
            assert isinstance(failed, Progress)
    assert "first page" in failed.detail


def test_completed_requests_never_read_released_blocks(loaded: LoadedModel) -> None:
    """aws-do-eks#84: 8 of 42 completed requests had decoded from blocks that were released."""
    queries = [replace(QUERY, prompt_ids=prompt(150, seed=80 + i)) for i in range(7)]
    with start_pair(loaded, prefix_bytes=0) as alone:
        expected = [answer(alone, query) for query in queries]
    with start_pair(loaded, prefix_bytes=0, max_tokens=2 * ONE_REQUEST) as pair, dispatching(pair) as dispatcher:
        asked = [Asked(dispatcher, queries[i % 7]) for i in range(42)]
        for each in asked[::5]:
            dispatcher.cancel(each.request_id)
        done = [i for i, each in enumerate(asked) if each.end().error is None]
        assert set(done) >= {i for i in range(42) if i % 5}
        assert all(asked[i].answer == expected[i % 7] for i in done)
        pair.assert_free()


def test_a_bad_link_never_gets_wrong_tokens_through(loaded: LoadedModel) -> None:
    """wtdcode/vllm-backport#33: a link went bad, and corrupted tokens kept flowing."""
    with start_pair(loaded, share_prefixes=False) as pair, FaultyLink(pair.decode.address.endpoint) as link:
        expected, num_failed = answer(pair), 0
        with dispatching(pair, link.endpoint, policy="fail") as dispatcher:
            for i in range(8):
                link.arm(Fault("flip", "decode", ("frame", "Token")[i % 2], nth=i // 2 % 2, seed=i))
                asked = Asked(dispatcher, QUERY)
                num_failed += asked.end().error is not None
                tokens, evidence = asked.answer
                assert tokens == expected[0][: len(tokens)]
                assert evidence in (None, expected[1])
        assert num_failed == 8


@pytest.mark.parametrize("how", ["damaged", "cancelled"])
def test_blocks_are_not_used_again_under_a_write(loaded: LoadedModel, how: str) -> None:
    """vllm#47021, vllm#56104, sglang#35049, sglang#35360: one failed write, or an abort, freed blocks that its siblings
    still wrote to."""
    with (
        start_pair(loaded, max_tokens=ONE_REQUEST, link_gbps=SLOW_GBPS) as pair,
        FaultyLink(pair.decode.address.endpoint) as link,
        dispatching(pair, link.endpoint) as dispatcher,
    ):
        if how == "damaged":
            link.arm(Fault("flip", "decode", "frame", seed=3))
        asked = Asked(dispatcher, replace(QUERY, report_progress=True))
        asked.until(Progress)
        if how == "cancelled":
            dispatcher.cancel(asked.request_id)
        assert asked.end().error is not None
        with Kept(pair, request_id="next") as request:  # gets the same blocks at once
            fill(request)
            wait_until(lambda: pair.prefiller.num_requests == 0)
            time.sleep(0.5)  # a late frame would have come by now
            request.assert_held()


def test_a_chunk_is_not_sent_before_it_is_computed(loaded: LoadedModel) -> None:
    """sglang#33970: a chunk was sent before the forward pass that writes it had finished."""
    query = replace(QUERY, prompt_ids=prompt(500, seed=90))
    found = []
    for overlap in (True, False):
        with start_pair(loaded, share_prefixes=False, chunk_tokens=96) as pair:
            pair.prefiller._overlap = overlap
            found.append(answer(pair, query))
    assert found[0] == found[1]


def test_the_hundredth_answer_is_as_good_as_the_first(loaded: LoadedModel) -> None:
    """sglang#23020: gibberish after about a hundred requests; here nothing piles up either."""

    def burst() -> tuple[int, int]:
        for i in range(60):
            Asked(dispatcher, Query(prompt(20, seed=i), "balanced", 2)).end()
        wait_until(lambda: not any(t.name.startswith(("send-", "pack")) for t in threading.enumerate()))
        return threading.active_count(), len(os.listdir("/proc/self/fd"))

    with start_pair(loaded, prefix_bytes=0) as pair:
        expected = answer(pair)
        with dispatching(pair) as dispatcher:
            first_threads, first_files = burst()
            threads, files = burst()
            assert threads <= first_threads + 2
            assert files <= first_files + 8
        assert answer(pair) == expected


def test_a_completion_cannot_overtake_the_data(pair: Pair) -> None:
    """vllm#44238, kvcache-ai/vllm#3: a transfer was reported complete before its last write could be seen."""
    with Kept(pair) as request, request.sender() as sender:
        request.feed(sender, 0)
        sender.post(Finish(request.request_id, request.ticket.epoch, Choice(5)))
        failed = request.answer(PROMPT_S)
        assert isinstance(failed, Failed)
        assert "layers 1 missing" in failed.detail
        request.feed(sender, 1)
        with pytest.raises(FrameError, match="reserve first"):
            sender.finish(PATIENCE_S)


@pytest.mark.parametrize("name", [*PRESETS])
def test_what_is_held_is_what_was_sent(loaded: LoadedModel, name: str) -> None:
    """vllm#12197: received KV was not what had been sent."""
    with start_pair(loaded, formats=[name]) as pair, Kept(pair, 200, kv_cache_dtype=name) as request:
        fill(request)
        request.assert_held()


# -- leaks and hangs ---------------------------------------------------------------------------------------------------


def test_blocks_come_back_when_the_prefill_side_is_gone(pair: Pair) -> None:
    """vllm#46283, vllm#46289: decode blocks that waited for a prefill that had died were never reclaimed."""
    with Kept(pair) as request:
        with request.sender() as sender:
            request.feed(sender, 0)
            sender.finish(PATIENCE_S)
        assert isinstance(request.answer(PROMPT_S), Failed)
        wait_until(lambda: pair.decoder.num_requests == 0, PROMPT_S)


def test_a_live_lease_does_not_keep_dead_ones(loaded: LoadedModel) -> None:
    """vllm#58222: one entry at the head whose heartbeat went on kept all leases behind it from expiring."""
    with (
        start_pair(loaded, lease_s=0.8, max_lease_s=60.0) as pair,
        RawRequest(pair, request_id="head") as head,
        RawRequest(pair, request_id="behind") as behind,
    ):
        deadline_s, failed = time.monotonic() + 0.8 + PROMPT_S, None
        while failed is None and time.monotonic() < deadline_s:
            head.peer.send(Renew(["head"]))
            failed = next((m for m in behind.peer.poll(0.1) if isinstance(m, Failed)), None)
        assert failed is not None
        assert [r.ask.request_id for r in pair.decoder._rooms] == ["head"]


def test_a_write_that_cannot_begin_is_an_error(pair: Pair) -> None:
    """vllm#50754: a write that failed to post was waited for without end."""
    with pair.peer("prefill") as peer, RawRequest(pair) as request:
        order = msgspec.structs.replace(request.order(prompt(150)), decode_endpoint="tcp://127.0.0.1:9")
        peer.send(order)
        start_s = time.monotonic()
        while not isinstance(failed := peer.recv(PATIENCE_S), Failed):
            assert isinstance(failed, Progress)
        assert time.monotonic() - start_s < 2 * OPTIONS.peer_timeout_s
        assert "found none; start it" in failed.detail


def test_a_prompt_that_is_all_there_is_reported_done(loaded: LoadedModel) -> None:
    """vllm#56640: a request whose whole prefix was cached on the decode side was never reported done."""
    query = replace(QUERY, prompt_ids=prompt(4 + 2 * 64 + 64, seed=95))  # sinks, two pages, window
    with start_pair(loaded, prefix_bytes=0) as pair, dispatching(pair) as dispatcher:
        first = Asked(dispatcher, query)
        assert first.end().error is None
        second = Asked(dispatcher, query)
        ended = second.end()
        assert ended.error is None
        assert ended.prefill is not None
        assert ended.record.num_shared_pages == 2
        assert second.answer[1] == first.answer[1]
        pair.assert_free()


@pytest.fixture(scope="module")
def references() -> Iterator[References]:
    with ThreadCell(Subject(tiny_model(), ""), is_slow=False) as cell:
        yield References(cell)


@pytest.mark.parametrize(
    ("fault", "policy", "state"),
    [
        (Fault("kill", "decode", "Token", nth=3), "recompute", "done"),
        (Fault("restart", "prefill", "Progress"), "fail", ""),
    ],
)
def test_recomputing_and_restarts(references: References, fault: Fault, policy: Policy, state: str) -> None:
    """vllm#49250: policy `recompute` gave another answer than an undisturbed run. vllm#49238: a decode instance crashed
    when its prefill instance was started again."""
    with ThreadCell(references.cell.subject, policy) as cell:
        outcome = run_case(cell, references, Case(0, fault, "threads"), policy)
    assert not outcome.passed_by
    assert outcome.broken == []  # bytes, attention, logits and tokens as without the fault, and it serves again
    assert outcome.states.count(state) == (2 if state else 0)


def test_recomputing_wakes_an_idle_service(loaded: LoadedModel) -> None:
    """local-inference-lab/vllm#191: with nothing else to do, the engine never began to recompute."""
    with start_pair(loaded, link_gbps=SLOW_GBPS) as pair, FaultyLink(pair.prefill.address.endpoint) as link:
        with dispatching(pair, prefill_endpoint=link.endpoint, policy="recompute") as dispatcher:
            asked = Asked(dispatcher, replace(QUERY, report_progress=True))
            asked.until(Progress)
            link.sever()
            ended = asked.end()
        assert ended.error is None
        assert ended.record.num_attempts == 2
        pair.assert_free()


def test_one_request_has_one_name(pair: Pair) -> None:
    """vllm#36958: prefill and decode knew a request by different ids, and the blocks of one side were never freed."""
    with dispatching(pair) as dispatcher:
        for _ in range(2):  # a name is free again behind the end
            asked = Asked(dispatcher, QUERY, "mine")
            with pytest.raises(TransferError, match="'mine' in use"):
                Asked(dispatcher, QUERY, "mine")
            assert asked.end().error is None
        wait_until(lambda: not any(member.load for member in dispatcher.members))


def test_late_words_about_an_expired_lease(loaded: LoadedModel) -> None:
    """vllm#25562: a KeyError ended the engine when a notification came for a request that had expired."""
    with start_pair(loaded, lease_s=0.3) as pair:
        with Kept(pair) as request, request.sender() as sender:
            assert isinstance(request.answer(PROMPT_S), Failed)
            request.peer.send(Renew([request.request_id]))
            request.peer.send(Cancel(request.request_id))
            sender.post(Finish(request.request_id, request.ticket.epoch, Choice(5)))
            sender.finish(PATIENCE_S)
            request.feed(sender, 0)
            with pytest.raises(FrameError, match="reserve first"):
                sender.finish(PATIENCE_S)
        assert len(answer(pair)[0]) == 6
        pair.assert_free()


# -- crashes and stuck routing -----------------------------------------------------------------------------------------


def test_the_gateway_answers_again_when_its_instance_does(loaded: LoadedModel) -> None:
    """dynamo#8965: after a worker had gone, the frontend answered 500 until it was itself started again."""
    tokenizer = words(loaded.vocab_size)
    body = {"model": "m", "prompt": text_of(prompt(150)), "max_tokens": 4}
    with ExitStack() as stack:
        pair = stack.enter_context(start_pair(loaded))
        link = stack.enter_context(FaultyLink(pair.decode.address.endpoint))
        prefill, decode = pair.prefill.address, Address(link.endpoint, None)
        limits = DispatchOptions(no_instance_timeout_s=0.5)
        dispatcher = stack.enter_context(Dispatcher([prefill], [decode], OPEN, limits=limits, options=OPTIONS))
        settings = load_settings([], model="m", port=0)
        gateway = Gateway(settings, tokenizer, loaded.context_length, dispatcher, Metrics())
        url = stack.enter_context(http_server(gateway))

        def status() -> int:
            return httpx.post(f"{url}/v1/completions", json=body, timeout=PATIENCE_S).status_code

        wait_until(lambda: all(member.status for member in dispatcher.members))
        assert status() == 200
        link.retarget(None)
        link.sever()
        wait_until(lambda: dispatcher.members[1].status is None)
        assert status() == 503
        link.retarget(pair.decode.address.endpoint)
        wait_until(lambda: all(member.status for member in dispatcher.members))
        assert status() == 200


# -- security ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_pickle_is_refused_unopened(pair: Pair, tmp_path: Path, role: str) -> None:
    """CVE-2025-47277, CVE-2025-32444, CVE-2024-50050 and their kin: sockets unpickled what anybody sent."""
    trap = tmp_path / "sprung"
    data = f"cos\nmkdir\n(V{trap}\ntR.".encode()  # whoever unpickles this makes the folder
    listener = (pair.prefiller if role == "prefill" else pair.decoder).listener
    refused = listener.refused.total()
    with Peer(listener.endpoint, FromDecode, OPEN, None, OPTIONS) as peer:
        peer.submit(MESSAGE, [data + xxhash.xxh3_64_digest(data)])
        peer.submit(FRAME, [data])
        receipts: list[Receipt] = []
        while len(receipts) < 2:
            receipts += [r for r in peer.poll(PATIENCE_S) if isinstance(r, Receipt)]
    assert all(receipt.reason for receipt in receipts)
    assert listener.refused.total() == refused + 2
    assert not trap.exists()


def test_nothing_listens_to_the_world_or_without_keys_unless_told() -> None:
    """CVE-2025-30202: a socket between instances listened on every interface, with no authentication."""
    settings = load_settings([])
    assert settings.endpoint.startswith("tcp://127.0.0.1:")
    assert settings.host == "127.0.0.1"
    with pytest.raises(TransferError, match="--keys"):
        instance_security(settings)
