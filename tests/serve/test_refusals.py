"""Requests that cannot be served: the right error, at the client, before anything is held."""

import threading
import time

import pytest
from serve_cases import (
    CONTEXT,
    ENDPOINT,
    NAN_TOKEN,
    OPEN,
    PATIENCE_S,
    VOCABULARY,
    Pair,
    RawRequest,
    bystander,
    prompt,
    start_pair,
    tiny,
    wait_until,
)

from homkv.errors import FormatError, HomkvError, ShapeError, TransferError, UnsupportedError
from homkv.models import LoadedModel
from homkv.serve.client import Answer, Query
from homkv.serve.decode import DecodeInstance
from homkv.serve.messages import Failed, Prefill, Reserve, Token
from homkv.transport.endpoint import Receipt

IDS = prompt(100)
BAD: dict[str, tuple[Query, type[HomkvError], str]] = {
    "empty prompt": (Query([], "balanced", 4), ShapeError, "at least one prompt token"),
    "no new token": (Query(IDS, "balanced", 0), ShapeError, "one new token"),
    "over the context": (Query(IDS, "balanced", CONTEXT), ShapeError, f"context of {CONTEXT}"),
    "unknown format": (Query(IDS, "k99", 4), FormatError, "'k99'"),
    "format not offered": (Query(IDS, "small", 4), FormatError, "--kv-cache-dtype"),
    "token over the vocabulary": (Query([VOCABULARY], "balanced", 4), ShapeError, f"vocabulary's {VOCABULARY}"),
    "negative token": (Query([-1], "balanced", 4), TransferError, ">= 0"),
    "forced ids too short": (Query(IDS, "balanced", 4, forced_ids=[1]), ShapeError, "4 forced ids"),
    "forced id over the vocabulary": (Query(IDS, "fp16", 1, forced_ids=[VOCABULARY]), ShapeError, "forced ids below"),
    "too long for the pool": (Query(prompt(1900), "balanced", 4), ShapeError, "page blocks"),
    "too long for the exact pool": (Query(prompt(1900), "fp16", 4), ShapeError, "page blocks"),
    "NaN in the prompt's KV": (Query([*IDS, NAN_TOKEN], "balanced", 4), FormatError, "finite"),
    "NaN in the prompt's exact KV": (Query([*IDS, NAN_TOKEN], "fp16", 4), FormatError, "finite"),
}


@pytest.fixture(scope="module")
def small_pool(loaded: LoadedModel):  # type: ignore[no-untyped-def]
    with start_pair(loaded, max_tokens=1024) as pair:
        yield pair


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_fails_alone(small_pool: Pair, undisturbed: list[int], name: str) -> None:
    query, kind, says = BAD[name]
    with bystander(small_pool, undisturbed), small_pool.client() as client:
        with pytest.raises(kind, match=says) as caught:
            client.generate(query, timeout_s=PATIENCE_S)
        assert type(caught.value) is kind
        assert "expected" in str(caught.value)
        assert "found" in str(caught.value)
        assert len(client.generate(Query(IDS, "balanced", 2)).tokens) == 2  # the connection is as good as before
    small_pool.assert_free()


def test_a_running_answer_that_overflows_is_an_error(pair: Pair) -> None:
    """A token whose keys are NaN, fed to the decode instance."""
    with pytest.raises(FormatError, match="finite"):
        pair.ask(Query(IDS, "balanced", 3, forced_ids=[1, NAN_TOKEN, 1]))


def test_logits_that_overflow_are_an_error(pair: Pair) -> None:
    """The same with 16-bit KV, whose attention does not look at the values."""
    with pytest.raises(FormatError, match="finite logits"):
        pair.ask(Query(IDS, "fp16", 3, forced_ids=[1, NAN_TOKEN, 1]))


@pytest.mark.parametrize("name", ["fp16", "balanced"])
@pytest.mark.parametrize("short_of", ["slots", "pages"])
def test_a_request_without_room_waits_for_it(loaded: LoadedModel, name: str, short_of: str) -> None:
    limits = {"max_sequences": 1} if short_of == "slots" else {"max_tokens": 256}
    with start_pair(loaded, formats=[name], **limits) as pair:  # type: ignore[arg-type]
        answers: list[Answer] = []
        asking = threading.Thread(target=lambda: answers.append(pair.ask(Query(IDS, name, 130))))
        with RawRequest(pair, kv_cache_dtype=name):
            asking.start()
            wait_until(lambda: pair.decoder.num_requests == 2)
            time.sleep(0.2)
            assert pair.prefiller.num_requests == 0  # nothing is computed before there is room
        asking.join()  # the holder left
        assert len(answers[0].tokens) == 130
        pair.assert_free()


def test_a_request_id_in_use_is_refused_and_its_owner_goes_on(pair: Pair) -> None:
    with RawRequest(pair) as owner, pair.peer() as other:
        other.send(Reserve(owner.request_id, "balanced", [1] * 10, 4))
        refusal = other.recv(PATIENCE_S)
        assert isinstance(refusal, Failed)
        assert (refusal.error, "in use" in refusal.detail) == ("TransferError", True)
        assert pair.decoder.num_requests == 1
        with pair.peer("prefill") as prefill:
            prefill.send(owner.order(prompt(150)))
            tokens = [owner.answer() for _ in range(4)]
        expected = pair.ask(Query(prompt(150), "balanced", 4)).tokens
        assert [token.choice.token for token in tokens if isinstance(token, Token)] == expected


def test_a_head_dim_not_covered_fails_on_both_sides() -> None:
    odd = tiny(head_dim=32)
    with pytest.raises(UnsupportedError, match="head_dim"):
        DecodeInstance(odd, ["balanced"], ENDPOINT, OPEN, max_tokens=64)
    with start_pair(odd, formats=["fp16"]) as pair, pair.peer("prefill") as peer:
        peer.send(Prefill("r", "balanced", [1, 2], 1, pair.decode.address.endpoint, None))
        while not isinstance(refusal := peer.recv(PATIENCE_S), Failed):
            assert isinstance(refusal, Receipt)
        assert refusal.error == "UnsupportedError"
        assert len(pair.ask(Query([1, 2, 3], "fp16", 3)).tokens) == 3


def test_quantized_prefill_is_not_served(loaded: LoadedModel) -> None:
    with pytest.raises(UnsupportedError, match="exact prefill"):
        DecodeInstance(loaded, ["hack:prefill=int8"], ENDPOINT, OPEN, max_tokens=64)
