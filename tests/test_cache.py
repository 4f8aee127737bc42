"""The paged cache: the same bytes on every path, nothing lost, shared or overwritten by mistake."""

from itertools import pairwise

import pytest
import torch
from cache_cases import FORMATS, D, G, append, assert_same_bytes, filled, make_cache, tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from homkv.attention.prefill import causal
from homkv.attention.reference import oracle
from homkv.cache import PagedCache
from homkv.errors import CapacityError, FormatError, HomkvError, ShapeError
from homkv.formats import format_names
from homkv.testing.cases import GROUPS
from homkv.testing.compare import assert_relative

# -- appending -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS[:4])
@given(cuts=st.sets(st.integers(0, 270), max_size=4))
@settings(deadline=None, max_examples=4)
def test_any_split_gives_the_same_bytes(name: str, cuts: set[int]) -> None:
    k, v = tokens(270)
    cache = make_cache(name, num_layers=1)
    seq_id = cache.new_sequence()
    bounds = [0, *sorted(cuts), 270]
    for start, stop in pairwise(bounds):
        append(cache, seq_id, k[:, start:stop], v[:, start:stop])
    assert_same_bytes(cache, seq_id, *filled(name, 270, num_layers=1))
    cache.check()


@pytest.mark.parametrize("name", FORMATS[:4])
def test_token_by_token_gives_the_same_bytes(name: str) -> None:
    k, v = tokens(200)
    appended, attended = make_cache(name, num_layers=1), make_cache(name, num_layers=1)
    a, b = appended.new_sequence(), attended.new_sequence(140)
    for t in range(140):
        at = slice(t, t + 1)
        appended.append(0, a, k[:, at], v[:, at])
        attended.attend(0, [b], torch.zeros(1, 4, 1, D), k[None, :, at], v[None, :, at], 0.1)
        if t % 50 == 3:
            assert_same_bytes(appended, a, attended, b)
    whole = filled(name, 140, num_layers=1)
    assert_same_bytes(appended, a, *whole)
    assert_same_bytes(attended, b, *whole)


@pytest.mark.parametrize("name", format_names())
@pytest.mark.parametrize("count", [0, 1, 4, 64, 128, 131, 132, 300])
def test_a_sequence_is_sinks_pages_window(name: str, count: int) -> None:
    cache, seq_id = filled(name, count)
    codec, (k, v) = cache.codec, tokens(count)
    sinks, sealed = codec.num_sinks, codec.num_pages(count) * codec.page_tokens
    content = cache.export_layer(0, seq_id)
    assert content.num_tokens == cache.num_tokens(seq_id) == count
    exact_k, exact_v = (torch.cat((x[:, :sinks], x[:, sinks + sealed :]), 1).half() for x in (k, v))
    assert torch.equal(content.exact_k, exact_k)
    assert torch.equal(content.exact_v, exact_v)
    body = slice(sinks, sinks + sealed)
    assert torch.equal(content.pages.transpose(0, 1), codec.encode(k[:, body], v[:, body], sinks))
    assert cache.kv_bytes(seq_id) == 2 * G * codec.kv_bytes(count)
    assert cache.num_free_blocks == 16 - codec.num_pages(count)
    cache.check()


def test_sequences_of_unequal_length_do_not_meet() -> None:
    cache = make_cache(num_blocks=40)
    lengths = {cache.new_sequence(): n for n in (0, 70, 333, 132)}
    for seq_id, length in lengths.items():
        append(cache, seq_id, *tokens(length, seed=seq_id))
    for seq_id, length in lengths.items():
        assert_same_bytes(cache, seq_id, *filled("balanced", length, seed=seq_id))


# -- attention -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", GROUPS)
def test_16_bit_pages_give_plain_attention_on_every_path(group: int) -> None:
    """Prompt in one go, then a chunk, then single tokens: as if nothing had been cached."""
    k, v = tokens(240)
    q = torch.randn(group * G, 240, D)
    expected = causal(q[None], k[None], v[None], 0.125)[0]
    cache = make_cache("fp16", num_layers=1)
    seq_id = cache.new_sequence()
    for start, stop in [(0, 130), (130, 200), *((t, t + 1) for t in range(200, 240))]:
        at = slice(start, stop)
        o = cache.attend(0, [seq_id], q[None, :, at], k[None, :, at], v[None, :, at], 0.125)
        assert_relative(o[0], expected[:, at], 1e-5)
    cache.check()


@pytest.mark.parametrize("name", ["near-lossless", "balanced", "hack-2026:bits=8"])
@pytest.mark.parametrize("length", [0, 1, 130, 131, 400])
def test_one_token_attends_to_what_is_stored_and_to_itself(name: str, length: int) -> None:
    cache, seq_id = filled(name, length)
    k, v = tokens(1, seed=9)
    q = torch.randn(1, 6, 1, D)
    before = cache.view(0, [seq_id], extra=1)
    o = cache.attend(0, [seq_id], q, k[None], v[None], 0.125)
    expected, _ = oracle(q, before, cache.codec, 0.125)  # the view is of the buffers: they now hold the token
    if length != 131:  # sealing moves the window that the old view reads
        assert_relative(o, expected, 0.02)
    whole, whole_id = filled(name, length)
    whole.append(0, whole_id, k, v)
    assert torch.equal(cache.export_layer(0, seq_id).pages, whole.export_layer(0, whole_id).pages)


@pytest.mark.parametrize("length", [1, 130, 300])
def test_a_chunk_attends_to_pages_and_exactly_to_itself(length: int) -> None:
    cache, seq_id = filled("balanced", length)
    k, v = tokens(70, seed=9)
    q = torch.randn(6, 70, D)
    content = cache.export_layer(0, seq_id)
    dense_k, dense_v = cache.codec.dense(content.pages.transpose(0, 1))
    all_k = torch.cat((dense_k, content.exact_k, k), 1)
    all_v = torch.cat((dense_v, content.exact_v, v), 1)
    mask = torch.ones(70, all_k.shape[1], dtype=torch.bool).tril(all_k.shape[1] - 70)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q[None], all_k[None], all_v[None], mask, scale=0.125, enable_gqa=True
    )
    o = cache.attend(0, [seq_id], q[None], k[None], v[None], 0.125)
    assert_relative(o, expected, 0.02)


@pytest.mark.parametrize("name", ["fp16", "balanced"])
def test_a_batch_is_its_sequences(name: str) -> None:
    lengths, k, v = [5, 131, 300], *(x[None].expand(3, -1, -1, -1) for x in tokens(3, seed=7))
    q = torch.randn(3, 4, 3, D)
    cache = make_cache(name, num_layers=1)
    seq_ids = [cache.new_sequence() for _ in lengths]
    for seq_id, length in zip(seq_ids, lengths, strict=True):
        append(cache, seq_id, *tokens(length, seed=length))
    for at in (slice(0, 1), slice(1, 3)):
        together = cache.attend(0, seq_ids, q[:, :, at], k[:, :, at], v[:, :, at], 0.125)
        for i, length in enumerate(lengths):
            alone, alone_id = filled(name, length + at.start, seed=length, num_layers=1)
            if at.start:
                alone, alone_id = filled(name, length, seed=length, num_layers=1)
                alone.append(0, alone_id, k[i, :, :1], v[i, :, :1])
            o = alone.attend(0, [alone_id], q[i : i + 1, :, at], k[i : i + 1, :, at], v[i : i + 1, :, at], 0.125)
            assert_relative(together[i : i + 1], o, 1e-6)
            assert_same_bytes(cache, seq_ids[i], alone, alone_id)


@pytest.mark.parametrize("name", ["fp16", "balanced"])
def test_padding_is_neither_stored_nor_attended_to(name: str) -> None:
    k, v = tokens(8, seed=3)
    q = torch.randn(2, 4, 8, D)
    real = torch.tensor([[0, 0, 1, 1, 1, 1, 0, 1], [0] * 8], dtype=torch.bool)
    cache = make_cache(name, num_layers=1)
    a, b = cache.new_sequence(), cache.new_sequence()
    append(cache, a, *tokens(140))
    noisy_k, noisy_v = (torch.where(real[:, None, :, None], x[None], torch.nan) for x in (k, v))
    o = cache.attend(0, [a, b], q, noisy_k, noisy_v, 0.125, real)
    plain, plain_id = filled(name, 140, num_layers=1)
    at = real[0]
    expected = plain.attend(0, [plain_id], q[:1, :, at], k[None, :, at], v[None, :, at], 0.125)
    assert_relative(o[:1, :, at], expected, 1e-6)
    assert not o[:1, :, ~at].any()
    assert not o[1].any()
    assert_same_bytes(cache, a, plain, plain_id)
    assert cache.num_tokens(b) == 0


# -- capacity and failures -----------------------------------------------------------------------------------------


def snapshot(cache: PagedCache, *seq_ids: int) -> list:
    contents = [cache.export_layer(layer, s) for layer in range(cache.num_layers) for s in seq_ids]
    return [cache.num_free_blocks, *[(c.num_tokens, c.pages.tolist(), c.exact_k.tolist()) for c in contents]]


def test_a_full_cache_refuses_and_stays_as_it_was() -> None:
    cache = make_cache(num_blocks=3)
    a, b = cache.new_sequence(), cache.new_sequence()
    append(cache, a, *tokens(131))
    append(cache, b, *tokens(200, seed=1))
    before = snapshot(cache, a, b)
    k, v = (x[None].expand(2, -1, -1, -1) for x in tokens(100, seed=2))
    with pytest.raises(CapacityError, match="free page blocks"):
        cache.append(0, a, *tokens(400, seed=2))
    with pytest.raises(CapacityError):  # either sequence would fit, both do not
        cache.attend(0, [a, b], torch.zeros(2, 4, 100, D), k, v, 0.1)
    with pytest.raises(CapacityError):
        cache.new_sequence(1000)
    assert snapshot(cache, a, b) == before
    cache.check()
    cache.free(b)
    cache.append(0, a, *tokens(100, seed=2))


def test_slots_run_out_without_losing_blocks() -> None:
    cache = make_cache(max_sequences=1)
    seq_id = cache.new_sequence(200)
    for call in (lambda: cache.new_sequence(200), lambda: cache.fork(seq_id)):
        with pytest.raises(CapacityError, match="free sequence slot"):
            call()
    assert cache.num_free_blocks == 14
    cache.check()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
@pytest.mark.parametrize("num_tokens", [1, 2, 70])
def test_values_that_cannot_be_stored_harm_no_other_sequence(num_tokens: int, value: float) -> None:
    cache = make_cache(num_layers=1)
    good, bad = cache.new_sequence(), cache.new_sequence()
    for seq_id in (good, bad):
        append(cache, seq_id, *tokens(131))
    before = snapshot(cache, good)[1:]
    k, v = tokens(num_tokens, seed=1)
    k[1, -1, 3] = value
    with pytest.raises(FormatError, match="finite"):
        cache.append(0, bad, k, v)
    with pytest.raises(FormatError, match="finite"):
        cache.attend(0, [bad], torch.zeros(1, 4, num_tokens, D), v[None], k[None], 0.1)
    assert snapshot(cache, good)[1:] == before
    assert cache.num_tokens(bad) == 131
    cache.check()
    cache.free(bad)
    assert cache.num_free_blocks == 16
    append(cache, good, *tokens(1, seed=1))
    cache.check()


def test_rows_too_large_for_a_page_store_nothing() -> None:
    cache, seq_id = filled("balanced", 100)
    k, v = tokens(100, seed=1)
    before = snapshot(cache, seq_id)[1:]
    with pytest.raises(FormatError, match="240"):
        cache.append(0, seq_id, k.sign() * 6e4, v)
    assert snapshot(cache, seq_id)[1:] == before
    cache.check()


def test_a_row_too_large_to_seal_harms_no_other_sequence() -> None:
    cache = make_cache(max_sequences=2, num_blocks=8)
    good, bad = cache.new_sequence(), cache.new_sequence()
    k, v = tokens(131)  # one token before the first page is sealed
    for seq_id, scale in ((good, 1.0), (bad, 6e4)):
        append(cache, seq_id, k.sign() * scale, v)
    q, k, v = (torch.randn(2, heads, 1, 64) for heads in (4, cache.num_kv_heads, cache.num_kv_heads))
    for _ in range(2):
        with pytest.raises(FormatError, match="row scales"):
            cache.attend(0, [bad, good], q, k, v, 0.125)
    assert cache.export_layer(0, good).pages.shape[0] == 1
    assert cache.num_tokens(bad) == cache.num_tokens(good) == 132
    cache.free(bad)
    cache.attend(0, [good], q[:1], k[:1], v[:1], 0.125)
    assert cache.num_tokens(good) == 133


def test_wrong_shapes_are_refused() -> None:
    cache, seq_id = filled("balanced", 10)
    k, v = tokens(5)
    for pair in [(k[:1], v[:1]), (k[..., :32], v[..., :32]), (k, v[:, :4]), (k[None], v[None])]:
        with pytest.raises(ShapeError, match="nothing was stored"):
            cache.append(0, seq_id, *pair)
    q = torch.zeros(1, 4, 5, D)
    for bad_q, pair in [(q[:, :, :4], (k, v)), (q, (k, v[:, :4])), (q[:, :3], (k, v)), (q[..., :32], (k, v))]:
        with pytest.raises(ShapeError):
            cache.attend(0, [seq_id], bad_q, pair[0][None], pair[1][None], 0.1)
    with pytest.raises(HomkvError, match="once"):
        cache.attend(0, [seq_id, seq_id], q.repeat(2, 1, 1, 1), k.repeat(2, 1, 1, 1), v.repeat(2, 1, 1, 1), 0.1)
    assert cache.num_tokens(seq_id) == 10
