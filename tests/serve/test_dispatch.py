"""Many instances, and what happens when they fail: one end for every request, and streams that go on."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from serve_cases import ENDPOINT, OPEN, OPTIONS, PATIENCE_S, Asked, Running, prompt, twin, wait_until

from homkv.errors import CapacityError, HomkvError, TransferError
from homkv.models import LoadedModel
from homkv.serve.decode import DecodeInstance
from homkv.serve.dispatch import Dispatcher
from homkv.serve.fleet import Address
from homkv.serve.lifecycle import ENDS, Record
from homkv.serve.messages import AskStatus, Choice, DecodeTimes, Done, Reserve, Sampling, Status, ToDecode, Token
from homkv.serve.prefill import PrefillInstance
from homkv.serve.query import DispatchOptions, Query
from homkv.transport.endpoint import LinkError
from homkv.transport.link import Listener, Message

QUERY = Query(prompt(150, seed=30), "balanced", 60, Sampling(temperature=0.8, seed=5))


def decoder(loaded: LoadedModel, endpoint: str = ENDPOINT, **options: Any) -> Running:
    return Running(
        DecodeInstance(twin(loaded), ["balanced"], endpoint, OPEN, max_tokens=4096, options=OPTIONS, **options)
    )


def prefiller(loaded: LoadedModel, link_gbps: float | None = None) -> Running:
    return Running(PrefillInstance(loaded, ENDPOINT, OPEN, link_gbps=link_gbps, options=OPTIONS))


@contextmanager
def dispatching(prefills: list[Running], decodes: list[Running], **limits: object) -> Iterator[Dispatcher]:
    ended: list[tuple[Record, HomkvError | None]] = []
    with Dispatcher(
        [p.address for p in prefills],
        [d.address for d in decodes],
        OPEN,
        limits=DispatchOptions(**limits),  # type: ignore[arg-type]
        options=OPTIONS,
        on_end=lambda record, error: ended.append((record, error)),
    ) as made:
        yield made
    ids = [record.request_id for record, _ in ended]
    assert len(ids) == len(set(ids))  # every request ends once
    assert all(record.state in ENDS for record, _ in ended)


def die(running: Running) -> None:
    """Its sockets go without a word, as when the process is killed."""
    instance = running.instance
    if isinstance(instance, DecodeInstance):
        instance._rooms._given.clear()
        instance._rooms.waiting.clear()
    running.close()


@pytest.fixture(scope="module")
def undisturbed_tokens(loaded: LoadedModel) -> list[int]:
    with prefiller(loaded) as p, decoder(loaded) as d, dispatching([p], [d]) as dispatcher:
        asked = Asked(dispatcher, QUERY)
        assert asked.end().error is None
        return asked.tokens


def test_recompute_goes_on_where_the_stream_was(loaded: LoadedModel, undisturbed_tokens: list[int]) -> None:
    with (
        prefiller(loaded) as p,
        decoder(loaded) as first,
        decoder(loaded) as second,
        dispatching([p], [first, second], policy="recompute") as dispatcher,
    ):
        wait_until(lambda: all(m.status for m in dispatcher.members))
        asked = Asked(dispatcher, QUERY)
        asked.until_tokens(20)
        busy = first if first.instance.num_requests else second
        die(busy)
        ended = asked.end()
        assert ended.error is None
        assert ended.record.num_attempts == 2
        assert len(asked.tokens) == 60
        assert asked.tokens[:20] == undisturbed_tokens[:20]
        other = second if busy is first else first
        wait_until(lambda: other.instance.num_requests == 0)


def test_fail_says_so_and_frees_the_other_side(loaded: LoadedModel) -> None:
    with prefiller(loaded, link_gbps=0.0004) as p, decoder(loaded) as d, dispatching([p], [d]) as dispatcher:
        asked = Asked(dispatcher, QUERY)
        wait_until(lambda: p.instance.num_requests == 1)
        die(d)
        ended = asked.end()
        assert isinstance(ended.error, LinkError)
        assert ended.record.state == "failed"
        assert ended.record.num_attempts == 1
        wait_until(lambda: p.instance.num_requests == 0)


def test_a_prefill_instance_that_dies_is_replaced(loaded: LoadedModel, undisturbed_tokens: list[int]) -> None:
    with (
        prefiller(loaded, link_gbps=0.0004) as slow,
        prefiller(loaded) as spare,
        decoder(loaded) as d,
        dispatching([slow, spare], [d], policy="recompute") as dispatcher,
    ):
        wait_until(lambda: all(m.status for m in dispatcher.members))
        asked = Asked(dispatcher, QUERY)
        wait_until(lambda: slow.instance.num_requests == 1)
        die(slow)
        assert asked.end().error is None
        assert asked.tokens == undisturbed_tokens


def test_a_restarted_instance_is_found_again(loaded: LoadedModel, undisturbed_tokens: list[int]) -> None:
    with prefiller(loaded) as p, decoder(loaded) as before, dispatching([p], [before]) as dispatcher:
        wait_until(lambda: all(m.status for m in dispatcher.members))
        endpoint = before.address.endpoint
        die(before)
        wait_until(lambda: dispatcher.members[1].status is None)
        asked = Asked(dispatcher, QUERY)  # waits for an instance
        with decoder(loaded, endpoint):
            assert asked.end().error is None
            assert asked.tokens == undisturbed_tokens
            assert dispatcher.members[1].num_restarts == 1


def test_without_any_instance_a_request_fails_in_time(loaded: LoadedModel) -> None:
    with prefiller(loaded) as p, decoder(loaded) as d:
        die(d)
        with dispatching([p], [d], no_instance_timeout_s=0.5) as dispatcher:
            ended = Asked(dispatcher, QUERY).end()
            assert isinstance(ended.error, LinkError)
            assert "none connected" in str(ended.error)


def test_an_error_of_the_request_is_not_tried_again(loaded: LoadedModel) -> None:
    with prefiller(loaded) as p, decoder(loaded) as d, dispatching([p], [d], policy="recompute") as dispatcher:
        ended = Asked(dispatcher, Query(prompt(20), "balanced", 3000)).end()
        assert type(ended.error).__name__ == "ShapeError"
        assert ended.record.num_attempts == 1


def test_a_heartbeat_keeps_a_slow_transfer_alive(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """No layer comes for almost three leases; the dispatcher says that the request is still wanted.

    The leases' time passes with heartbeats alone, 0.7 leases behind each, so that no load of the machine matters: one
    that renewed nothing would be the last but one.
    """
    heard: list[float] = []
    clock = SimpleNamespace(now_s=0.0)
    with prefiller(loaded) as p, decoder(loaded, lease_s=1.0, clock=lambda: clock.now_s) as d:
        assert isinstance(d.instance, DecodeInstance)
        assert isinstance(p.instance, PrefillInstance)
        renew, on_layer = d.instance._rooms.renew, p.instance._on_layer

        def hear(client: bytes, request_ids: list[str]) -> None:
            renew(client, request_ids)
            heard.append(dispatcher._renew_at_s - time.monotonic())
            clock.now_s += 0.7

        def held_up(*layer: Any) -> None:
            wait_until(lambda: len(heard) >= 4)
            on_layer(*layer)

        monkeypatch.setattr(d.instance._rooms, "renew", hear)
        monkeypatch.setattr(p.instance, "_on_layer", held_up)
        with dispatching([p], [d]) as dispatcher:
            assert Asked(dispatcher, Query(prompt(150, seed=31), "balanced", 3)).end().error is None
        assert d.instance.status.counters["leases_expired"] == 0
        assert max(heard) <= 0.5  # the next one is due well before a lease of 1 s ends


@pytest.mark.parametrize(
    "said",
    [
        lambda name: Token(name, 0, Choice(5)),
        lambda name: Done(name, 0, 0, DecodeTimes(0.0, 0.0, 0.0)),
        lambda name: Done(name, 1, 0, DecodeTimes(0.0, 0.0, 0.0)),
    ],
    ids=["a token before the ticket", "done before the ticket", "done and nothing told"],
)
def test_an_instance_that_speaks_out_of_turn_fails_its_request_alone(
    loaded: LoadedModel, said: Callable[[str], msgspec.Struct]
) -> None:
    with (
        prefiller(loaded) as p,
        Listener(ENDPOINT, ToDecode, OPEN, OPTIONS) as liar,
        Dispatcher([p.address], [Address(liar.endpoint, None)], OPEN, options=OPTIONS) as dispatcher,
    ):
        asked = Asked(dispatcher, QUERY)
        while asked.events.empty():
            for event in liar.poll(0.1):
                if isinstance(event, Message) and isinstance(event.body, AskStatus):
                    number, model = event.body.number, loaded.fingerprint
                    liar.send(event.peer, Status(number, "decode", "liar", 0.0, model, ["balanced"], {}, {}))
                elif isinstance(event, Message) and isinstance(event.body, Reserve):
                    liar.send(event.peer, said(event.body.request_id))
        with pytest.raises(TransferError, match="found"):
            raise asked.end().error or AssertionError
        assert dispatcher.is_running


def test_a_short_prompt_overtakes_a_long_one(loaded: LoadedModel) -> None:
    chunked = Running(PrefillInstance(loaded, ENDPOINT, OPEN, chunk_tokens=32, options=OPTIONS))
    with chunked as p, decoder(loaded) as d, dispatching([p], [d]) as dispatcher:
        wait_until(lambda: all(m.status for m in dispatcher.members))
        long = Asked(dispatcher, Query(prompt(1900, seed=1), "balanced", 2))
        wait_until(lambda: p.instance.status.counters["prompt_tokens"] > 0)
        short = Asked(dispatcher, Query(prompt(20, seed=2), "balanced", 2))
        assert short.end().error is None
        assert not long.tokens
        assert long.events.empty()
        assert long.end().error is None
        assert len(long.tokens) == 2


def test_load_is_shared_and_capped(loaded: LoadedModel) -> None:
    with (
        prefiller(loaded) as p,
        decoder(loaded) as first,
        decoder(loaded) as second,
        dispatching([p], [first, second], max_requests=4) as dispatcher,
    ):
        wait_until(lambda: all(m.status for m in dispatcher.members))
        asked = [Asked(dispatcher, Query(prompt(20, seed=i), "balanced", 200)) for i in range(4)]
        with pytest.raises(CapacityError, match="fewer than 4"):
            Asked(dispatcher, QUERY)
        for each in asked:
            each.until_tokens(1)
        assert (first.instance.num_requests, second.instance.num_requests) == (2, 2)
        dispatcher.cancel(asked[0].request_id)
        ended = asked[0].end()
        assert isinstance(ended.error, TransferError)
        assert ended.record.state == "cancelled"
        assert all(each.end().error is None for each in asked[1:])
        assert dispatcher.num_accepted == 0


def test_a_dispatcher_that_is_held_up_finds_every_token(loaded: LoadedModel) -> None:
    """Thousands of messages wait meanwhile: none is lost, and the connection holds."""
    with prefiller(loaded) as p, decoder(loaded) as d, dispatching([p], [d]) as dispatcher:
        asked = [Asked(dispatcher, Query(prompt(20, seed=i), "balanced", 150)) for i in range(12)]
        for each in asked:
            each.until_tokens(1)
        held_up, done_before = threading.Event(), d.instance.status.counters["tokens"]
        dispatcher._command(lambda: bool(held_up.wait(PATIENCE_S)) and None)
        wait_until(lambda: d.instance.status.counters["tokens"] > done_before + 1200)
        held_up.set()
        assert all(each.end().error is None for each in asked)
        assert dispatcher.members[1].num_lost == 0


def test_closing_ends_every_request(loaded: LoadedModel) -> None:
    with prefiller(loaded) as p, decoder(loaded) as d, dispatching([p], [d]) as dispatcher:
        asked = [Asked(dispatcher, Query(prompt(20, seed=i), "balanced", 1000)) for i in range(3)]
        asked[0].until_tokens(1)
        threading.Thread(target=dispatcher.close).start()
        assert [each.end().record.state for each in asked] == ["cancelled"] * 3
        with pytest.raises(TransferError, match="closed"):
            dispatcher.submit(QUERY, lambda event: None)
        wait_until(lambda: d.instance.num_requests == 0 and p.instance.num_requests == 0)


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_closing_while_it_still_connects() -> None:
    """More instances than connectors, none of them there: some connections are under way, some have not begun."""
    nowhere = [Address(f"tcp://127.0.0.1:{port}", None) for port in range(1, 13)]
    made = Dispatcher(nowhere, nowhere, OPEN, options=replace(OPTIONS, peer_timeout_s=0.5))
    asked = Asked(made, QUERY)
    made.close()
    made.close()
    assert asked.end().record.state == "cancelled"
    assert not made.is_running
