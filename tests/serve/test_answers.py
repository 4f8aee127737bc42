"""What comes back is what one process alone would have said."""

import threading

import numpy as np
import pytest
import torch
from serve_cases import NAN_TOKEN, Pair, prompt, start_pair, tiny, twin

import homkv
from homkv.models import LoadedModel
from homkv.serve.client import Answer, Query
from homkv.serve.messages import Sampling

LENGTHS = (1, 63, 150, 300)


def alone(loaded: LoadedModel, ids: list[int], new_tokens: int) -> list[int]:
    """transformers' own generate, greedy."""
    inputs = torch.tensor([ids])
    out = loaded.model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=NAN_TOKEN,
    )
    return list(out[0, len(ids) :].tolist())


@pytest.mark.parametrize("length", LENGTHS)
def test_16_bit_kv_gives_the_tokens_of_generate(pair: Pair, loaded: LoadedModel, length: int) -> None:
    ids = prompt(length, seed=length)  # shares no prefix with other prompts
    answer = pair.ask(Query(ids, "fp16", 24))
    assert answer.tokens == alone(twin(loaded), ids, 24)
    assert len(set(answer.tokens)) > 8  # a model that repeats itself would prove little


@pytest.mark.parametrize("length", LENGTHS)
def test_pages_give_the_tokens_of_one_process_with_pages(pair: Pair, loaded: LoadedModel, length: int) -> None:
    """100 tokens: the decode instance seals pages of its own."""
    ids, model = prompt(length, seed=length), twin(loaded)
    with homkv.attach(model.model, "balanced"):
        expected = alone(model, ids, 100)
    assert pair.ask(Query(ids, "balanced", 100)).tokens == expected


def test_formats_may_alternate_on_one_connection(pair: Pair) -> None:
    queries = [Query(prompt(150, seed=i), name, 6) for i, name in enumerate(("fp16", "balanced", "fp16", "balanced"))]
    with pair.client() as client:
        together = [client.generate(query).tokens for query in queries]
    assert together == [pair.ask(query).tokens for query in queries]


def test_requests_of_unequal_length_share_steps_and_do_not_notice(loaded: LoadedModel) -> None:
    with start_pair(loaded, share_prefixes=False) as pair:  # the same prompts twice, and both times computed
        check_shared_steps(pair)
        pair.assert_free()


def check_shared_steps(pair: Pair) -> None:
    lengths = ((1, 50), (70, 60), (150, 40), (131, 80), (300, 30))
    queries = [Query(prompt(t, seed=i), "balanced", n, return_logits=True) for i, (t, n) in enumerate(lengths)]
    queries.append(Query(prompt(90), "fp16", 30, return_logits=True))
    expected = [pair.ask(query) for query in queries]
    found: dict[int, Answer] = {}
    threads = [
        threading.Thread(target=lambda i=i: found.update({i: pair.ask(queries[i])})) for i in range(len(queries))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, answer in enumerate(expected):
        assert found[i].tokens == answer.tokens
        assert found[i].logits[0] is None  # the prefill instance's token
        rows, expected_rows = (np.stack([x for x in run.logits if x is not None]) for run in (found[i], answer))
        off = np.abs(rows - expected_rows)
        if queries[i].kv_cache_dtype == "fp16":
            assert off.max() <= 1e-4
        else:  # the last bit of a float32 product depends on the batch and may turn the 8-bit rounding of a query
            assert np.median(off) <= 1e-4
            assert off.max() <= 0.01 * expected_rows.max()


def test_logits_are_those_that_the_tokens_were_chosen_from(pair: Pair) -> None:
    answer = pair.ask(Query(prompt(150), "balanced", 12, return_logits=True))
    assert [int(row.argmax()) for row in answer.logits[1:] if row is not None] == answer.tokens[1:]


def test_forced_tokens_are_fed_and_the_chosen_ones_reported(pair: Pair) -> None:
    free = pair.ask(Query(prompt(150), "balanced", 12, return_logits=True))
    forced = pair.ask(Query(prompt(150), "balanced", 12, forced_ids=free.tokens, return_logits=True))
    assert forced.tokens == free.tokens
    other = pair.ask(Query(prompt(150), "balanced", 12, forced_ids=[5] * 12, return_logits=True))
    assert other.tokens[0] == free.tokens[0]
    assert other.tokens[1:] != free.tokens[1:]


def test_sampling_follows_its_seed(pair: Pair) -> None:
    def tokens(seed: int) -> list[int]:
        return pair.ask(Query(prompt(80), "balanced", 20, Sampling(temperature=1.0, top_p=0.9, seed=seed))).tokens

    first = tokens(1)
    assert tokens(1) == first
    assert tokens(2) != first


@pytest.mark.parametrize("name", ["balanced", "fp16"])
def test_what_overflows_is_never_drawn(pair: Pair, name: str) -> None:
    """The tiny model's one token with NaN in its embedding. This seed drew it when its logit was 0, as happened about
    once in 8,000 answers: 500, for a reason of the test's own."""
    assert len(pair.ask(Query(prompt(150), name, 4, Sampling(1.0, seed=18232))).tokens) == 4


@pytest.mark.parametrize("sampling", [Sampling(1e-310), Sampling(1e-9, 1e-9), Sampling(1.0, 1e-300)])
def test_extreme_sampling_is_greedy(pair: Pair, sampling: Sampling) -> None:
    greedy = pair.ask(Query(prompt(80), "fp16", 8)).tokens
    assert pair.ask(Query(prompt(80), "fp16", 8, sampling)).tokens == greedy


def test_a_single_token_comes_from_the_prefill_instance(pair: Pair) -> None:
    full = pair.ask(Query(prompt(80), "balanced", 8)).tokens
    answer = pair.ask(Query(prompt(80), "balanced", 1))
    assert answer.tokens == full[:1]
    assert answer.tpot_s == 0


@pytest.mark.parametrize("as_list", [False, True])
def test_a_stop_token_ends_the_answer(pair: Pair, as_list: bool) -> None:
    full = pair.ask(Query(prompt(80), "balanced", 12)).tokens
    stop = full[5]
    with start_pair(tiny(stop=[stop] if as_list else stop)) as stopping:
        assert stopping.ask(Query(prompt(80), "balanced", 12)).tokens == full[: full.index(stop) + 1]
        forced = Query(prompt(80), "balanced", 12, forced_ids=[stop] * 12)
        assert len(stopping.ask(forced).tokens) == 12  # a comparison goes on: its text is given
        stopping.assert_free()


def test_what_was_moved_is_counted(pair: Pair) -> None:
    query = Query(prompt(1000, seed=77), "balanced", 4)
    answer = pair.ask(query)
    assert answer.prefill is not None
    assert answer.prefill.raw_bytes == 1000 * 4 * 64 * 2  # 2 layers, 1 kv head, K and V of 64 channels in 16 bits
    assert answer.prefill.wire_bytes < answer.prefill.raw_bytes / 3.5
    sealed = answer.kv_bytes - 2 * pair.decoder.engines["balanced"].codec.kv_bytes(1000)
    assert sealed == 3 * 2 * 64 * 2 * 2  # three more exact tokens; the fourth was never fed


def test_the_time_to_first_token_is_accounted_for(pair: Pair) -> None:
    layers: list[int] = []
    tokens: list[int] = []
    with pair.client() as client:
        query = Query(prompt(300), "balanced", 4)
        answer = client.generate(query, on_layer=layers.append, on_token=tokens.append)
    assert sum(answer.phases_s().values()) == pytest.approx(answer.ttft_s)
    assert all(part >= 0 for part in answer.phases_s().values())
    assert answer.phases_s()["prefill"] > 0
    assert layers == [1, 2]
    assert tokens == answer.tokens
    assert answer.decode is not None
    assert answer.decode.verified_s <= answer.decode.first_token_s <= answer.decode.done_s
