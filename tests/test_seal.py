"""Tokens that leave the window one by one, as a decode loop on a GPU stores them."""

from dataclasses import replace

import pytest
import torch
from cache_cases import D, G, append, assert_same_bytes, filled, make_cache, tokens

from homkv.errors import FormatError, HomkvError
from homkv.seal import advance, append_one, check_status, to_exact


@pytest.mark.parametrize("name", ["balanced", "fp16", "hack", "hack-2026"])
@pytest.mark.parametrize("lengths", [(0, 131), (67, 200), (130, 4)])
def test_tokens_stored_by_a_loop_are_those_of_the_cache(name: str, lengths: tuple[int, int]) -> None:
    count = 150
    cache, plain = make_cache(name), make_cache(name)
    seq_ids, others = [], []
    for seed, length in enumerate(lengths):
        seq_ids.append(cache.new_sequence(length + count))
        others.append(plain.new_sequence())
        append(cache, seq_ids[-1], *tokens(length, seed))
        append(plain, others[-1], *tokens(length + count, seed))
    views = cache.open_views(seq_ids)
    all_tokens = [tokens(length + count, seed) for seed, length in enumerate(lengths)]
    for step in range(count):
        due = advance(cache.codec, views[0])
        k, v = (torch.stack([t[i][:, n + step] for t, n in zip(all_tokens, lengths, strict=True)]) for i in (0, 1))
        for layer, view in enumerate(views):
            append_one(cache.codec, view, due, k + layer, v - layer, impl="reference", status=cache.status)
    cache.close_views(seq_ids, views[1])
    cache.check()
    for seq_id, other in zip(seq_ids, others, strict=True):
        assert_same_bytes(cache, seq_id, plain, other)


def test_a_fork_of_a_sequence_that_a_loop_grew_shares_its_pages() -> None:
    cache, seq_id = filled("balanced", 131)
    cache._reserve([(cache._sequence(seq_id), 3)])
    views = cache.open_views([seq_id])
    k, v = (x.transpose(0, 1) for x in tokens(70, seed=5))
    for t in range(70):
        due = advance(cache.codec, views[0])
        for layer in range(2):
            append_one(cache.codec, views[layer], due, k[t : t + 1], v[t : t + 1], impl="reference")
    cache.close_views([seq_id], views[0])
    copy = cache.fork(seq_id)
    assert_same_bytes(cache, copy, cache, seq_id)
    views[0].pool[int(views[0].page_table[0, 1])] ^= 1  # a page that the loop sealed
    with pytest.raises(HomkvError, match="changed after it was sealed"):
        cache.check()


def test_bad_values_raise_or_set_the_status() -> None:
    x, status = torch.tensor([1.0, 1e6]), torch.zeros(1, dtype=torch.int32)
    with pytest.raises(FormatError, match="finite keys"):
        to_exact(x, torch.float16, "keys")
    assert to_exact(x, torch.bfloat16, "keys", status).dtype == torch.bfloat16
    check_status(status)
    to_exact(x, torch.float16, "keys", status)
    to_exact(x[:1], torch.float16, "keys", status)  # good values do not hide bad ones
    with pytest.raises(FormatError, match="free the sequences"):
        check_status(status)
    check_status(status)


def test_a_status_read_late_gives_the_batch_up() -> None:
    """As on a GPU, where nothing waits for the device at every layer."""
    cache = make_cache()
    cache._status = cache.status
    good, bad = cache.new_sequence(), cache.new_sequence()
    append(cache, good, *tokens(140))
    k, v = tokens(3, seed=1)
    k[0, 1, 2] = torch.nan
    q = torch.zeros(1, 4, 3, D)
    cache.attend(0, [bad], q, k[None], v[None], 0.1)
    with pytest.raises(FormatError, match="free the sequences"):
        cache.attend(1, [bad], q, k[None], v[None], 0.1)
    for use in (lambda: cache.attend(0, [bad], q, k[None], v[None], 0.1), lambda: cache.export_layer(0, bad)):
        with pytest.raises(FormatError, match="free these"):
            use()
    with pytest.raises(FormatError, match="free the sequences"):
        cache.append(0, good, k, v)
    assert cache.num_tokens(good) == 140
    cache.free(bad)
    append(cache, good, *tokens(5))
    cache.check()


def test_views_of_a_loop_do_not_touch_the_cache() -> None:
    cache, seq_id = filled("balanced", 200)
    before = cache.export_layer(0, seq_id)
    views = cache.open_views([seq_id])
    assert all(view.exact_len is views[0].exact_len and view.num_pages is views[0].num_pages for view in views)
    advance(cache.codec, views[0])
    assert cache.num_tokens(seq_id) == 200
    changed = replace(views[0], exact_len=views[0].exact_len - 1)
    cache.close_views([seq_id], changed)
    assert torch.equal(cache.export_layer(0, seq_id).exact_k, before.exact_k)
    assert views[0].pool.shape[1] == G
