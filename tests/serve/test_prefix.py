"""Keys of pages, what is shared, and that shared pages are the ones they should be."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from serve_cases import Pair, prompt, start_pair

from homkv.formats import make_codec
from homkv.models import LoadedModel
from homkv.serve.client import Answer, Query
from homkv.serve.prefix import PrefixIndex, page_keys

ROWS, EXACT = make_codec("balanced", 64), make_codec("fp16", 64)


@given(st.integers(0, 400), st.integers(0, 399), st.sampled_from([ROWS, EXACT]))
def test_equal_keys_mean_equal_tokens_up_to_there(length: int, changed: int, codec) -> None:  # type: ignore[no-untyped-def]
    ids = prompt(length)
    other = [*ids]
    if changed < length:
        other[changed] = (other[changed] + 1) % 100
    ours, theirs = page_keys("m", codec, ids), page_keys("m", codec, other)
    assert len(ours) == codec.num_pages(length)
    for page, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        end = codec.num_sinks + (page + 1) * codec.page_tokens
        assert (a == b) == (ids[:end] == other[:end])


def test_keys_depend_on_model_format_and_source() -> None:
    ids = prompt(200)
    assert not set(page_keys("model/a", ROWS, ids)) & set(page_keys("model/b", ROWS, ids))


def test_the_index_forgets_the_tail_of_the_oldest_chain_first() -> None:
    index: PrefixIndex[int] = PrefixIndex()
    for i, key in enumerate((b"a1", b"a2", b"b1", b"b2")):
        index.add(key, i)
    assert index.match([b"a1", b"a2", b"a3"]) == [0, 1]
    assert index.match([b"x", b"a1"]) == []
    gone = index.evict(lambda held: held != 2)
    assert [next(gone), next(gone)] == [3, 1]
    assert index.match([b"a1", b"a2"]) == [0]
    assert index.match([b"b1"]) == [2]


def ask(pair: Pair, ids: list[int], name: str = "balanced", n: int = 12) -> Answer:
    return pair.ask(Query(ids, name, n, return_logits=True))


def near(one: Answer, other: Answer) -> bool:
    """The same answer up to what 16-bit keys change."""
    a, b = (torch.stack([torch.tensor(x) for x in answer.logits if x is not None]) for answer in (one, other))
    return bool((a - b).abs().median() <= 0.01) and one.tokens == other.tokens


def test_a_second_request_sends_and_computes_only_what_is_new(loaded: LoadedModel) -> None:
    with start_pair(loaded) as pair:
        common, engine = prompt(300, seed=1), pair.decoder.engines["balanced"]
        first = ask(pair, [*common, 1, 2, 3])
        second = ask(pair, [*common, 4, 5])
        assert first.prefill is not None
        assert second.prefill is not None
        assert second.prefill.num_cached_tokens == 4 * 64  # 16-bit pages at the prefill instance, no sinks
        assert second.prefill.wire_bytes < first.prefill.wire_bytes
        assert engine.prefixes.num_found == ROWS.num_pages(302)
        again = ask(pair, [*common, 4, 5])
        assert again.tokens == second.tokens
        pair.assert_free()
    with start_pair(loaded, share_prefixes=False) as alone:
        assert near(second, ask(alone, [*common, 4, 5]))


def test_pages_of_another_prompt_are_never_shared(loaded: LoadedModel) -> None:
    with start_pair(loaded) as pair:
        ids = prompt(300, seed=2)
        ask(pair, ids)
        other = [*ids]
        other[10] = (other[10] + 1) % 100
        found = ask(pair, other)
        assert pair.decoder.engines["balanced"].prefixes.num_found == 0
        assert found.prefill is not None
        assert found.prefill.num_cached_tokens == 0


def test_kept_pages_give_way_to_requests(loaded: LoadedModel) -> None:
    """A pool of 1024 tokens sees many prompts of 600: each finds room, the oldest kept pages go."""
    with start_pair(loaded, max_tokens=1024, formats=["balanced"]) as pair:
        answers = [ask(pair, prompt(600, seed=10 + i), n=3) for i in range(5)]
        assert all(len(answer.tokens) == 3 for answer in answers)
        engine = pair.decoder.engines["balanced"]
        assert 0 < len(engine.prefixes) <= engine.num_blocks
        pair.assert_free()


def test_a_damaged_kept_page_is_not_shared(loaded: LoadedModel) -> None:
    with start_pair(loaded, formats=["balanced"]) as pair:
        ids, engine = prompt(300, seed=3), pair.decoder.engines["balanced"]
        first = ask(pair, ids)
        block = engine.prefixes.values()[0]
        engine.cache._pools[1][block, 0, 5] ^= 1  # type: ignore[attr-defined]
        second = ask(pair, ids)
        assert engine.num_damaged == 1
        assert near(second, first)  # sent anew
        pair.assert_free()


def test_chunks_give_the_answer_of_one_piece(loaded: LoadedModel) -> None:
    ids = prompt(300, seed=4)
    with start_pair(loaded, share_prefixes=False, chunk_tokens=64) as pair:
        chunked = ask(pair, ids)
    with start_pair(loaded, share_prefixes=False) as pair:
        assert near(chunked, ask(pair, ids))
