"""Sequences that are freed, forked, damaged or sent elsewhere."""

from dataclasses import replace

import pytest
import torch
from cache_cases import FORMATS, D, G, append, assert_same_bytes, filled, make_cache, tokens

from homkv.errors import FormatError, HomkvError, ShapeError

# -- lives of sequences --------------------------------------------------------------------------------------------


def test_a_freed_sequence_is_gone() -> None:
    cache, seq_id = filled("balanced", 200)
    cache.free(seq_id)
    assert cache.num_free_blocks == 16
    k, v = tokens(1)
    for use in (
        lambda: cache.free(seq_id),
        lambda: cache.append(0, seq_id, k, v),
        lambda: cache.view(0, [seq_id]),
        lambda: cache.fork(seq_id),
        lambda: cache.export_layer(0, seq_id),
        lambda: cache.num_tokens(seq_id),
    ):
        with pytest.raises(HomkvError, match="live sequence"):
            use()
    assert cache.new_sequence() != seq_id
    cache.check()


@pytest.mark.parametrize("name", ["balanced", "hack"])
def test_a_fork_shares_pages_and_goes_its_own_way(name: str) -> None:
    cache, a = filled(name, 300)
    pages = cache.codec.num_pages(300)
    b = cache.fork(a)
    assert cache.num_free_blocks == 16 - pages
    assert_same_bytes(cache, a, cache, b)
    append(cache, a, *tokens(70, seed=1))
    append(cache, b, *tokens(100, seed=2))
    cache.check()
    for seq_id, count, seed in ((a, 70, 1), (b, 100, 2)):
        alone, alone_id = filled(name, 300)
        append(alone, alone_id, *tokens(count, seed=seed))
        assert_same_bytes(cache, seq_id, alone, alone_id)
    cache.free(a)
    assert cache.num_free_blocks == 16 - cache.codec.num_pages(400)
    cache.check()
    cache.free(b)
    assert cache.num_free_blocks == 16


def test_no_fork_between_two_layers() -> None:
    cache, seq_id = filled("balanced", 10)
    cache.append(0, seq_id, *tokens(1))
    with pytest.raises(HomkvError, match="forward pass"):
        cache.fork(seq_id)


# -- integrity and transfer ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [0, 1000, -1])
def test_a_flipped_bit_is_noticed(at: int) -> None:
    cache, seq_id = filled("balanced", 300)
    cache.check()
    view = cache.view(1, [seq_id])
    view.pool[int(view.page_table[0, 1]), G - 1, at] ^= 1
    with pytest.raises(HomkvError, match="changed after it was sealed"):
        cache.check()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("count", [0, 3, 200])
def test_content_travels_between_caches(name: str, count: int) -> None:
    source, a = filled(name, count)
    target = make_cache(name, num_blocks=7)
    target.new_sequence(100)
    b = target.new_sequence()
    for layer in range(2):
        target.load_layer(layer, b, source.export_layer(layer, a))
    target.check()
    assert_same_bytes(target, b, source, a)
    for cache, seq_id in ((source, a), (target, b)):
        append(cache, seq_id, *tokens(150, seed=1))
    assert_same_bytes(target, b, source, a)


def test_content_of_the_wrong_shape_is_refused() -> None:
    source, a = filled("balanced", 300)
    content = source.export_layer(0, a)
    target = make_cache()
    b = target.new_sequence()
    for changes in (
        {"num_tokens": 301},
        {"num_tokens": -1},
        {"pages": content.pages[:1]},
        {"pages": content.pages[..., :-64]},
        {"pages": content.pages.float()},
        {"exact_k": content.exact_k[:, 1:]},
        {"exact_v": content.exact_v[..., :32]},
        {"exact_k": content.exact_k.float()},
        {"exact_v": content.exact_v.bfloat16()},
    ):
        with pytest.raises(ShapeError, match="same format and model"):
            target.load_layer(0, b, replace(content, **changes))
    assert target.num_tokens(b) == 0
    assert target.num_free_blocks == 16
    target.load_layer(0, b, content)
    with pytest.raises(HomkvError, match="empty"):
        target.load_layer(0, b, content)


# -- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", FORMATS)
def test_cuda_caches_live_like_others(name: str) -> None:
    there, here = make_cache(name, device="cuda"), make_cache(name)
    a, b = there.new_sequence(), here.new_sequence()
    for cache, seq_id in ((there, a), (here, b)):
        append(cache, seq_id, *(x.to(cache.device) for x in tokens(190)))
    q, (k, v) = torch.randn(1, 4, 1, D), tokens(40, seed=1)
    for t in range(40):
        for layer in range(2):
            rows = (x[None, :, t : t + 1] for x in (k, v))
            found = there.attend(layer, [a], q.cuda(), *(x.cuda() for x in rows), 0.1)
            rows = (x[None, :, t : t + 1] for x in (k, v))
            expected = here.attend(layer, [b], q, *rows, 0.1)
            assert torch.allclose(found.cpu(), expected, atol=1e-4)
    assert_same_bytes(there, a, here, b)
    c = there.fork(a)
    d = here.new_sequence()
    for layer in range(2):
        here.load_layer(layer, d, there.export_layer(layer, c))
    assert_same_bytes(there, c, here, d)
    there.check()
    view = there.view(1, [a])
    view.pool[int(view.page_table[0, 0]), G - 1, 5] ^= 1
    with pytest.raises(HomkvError, match="changed after it was sealed"):
        there.check()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_values_that_cannot_be_stored_are_noticed_behind_the_last_layer() -> None:
    cache = make_cache(device="cuda")
    seq_id = cache.new_sequence()
    k, v = (x[None].cuda() for x in tokens(3))
    k[0, 0, 1, 1] = torch.inf
    cache.attend(0, [seq_id], torch.zeros(1, 4, 3, D, device="cuda"), k, v, 0.1)
    with pytest.raises(FormatError, match="free the sequences"):
        cache.attend(1, [seq_id], torch.zeros(1, 4, 3, D, device="cuda"), k, v, 0.1)
