"""Caches whose layers have formats of their own: every layer has the bytes and the attention of its format alone."""

import pytest
import torch
from cache_cases import D, G, append, tokens

from homkv.cache import PagedCache
from homkv.errors import FormatError, HomkvError, ShapeError, UnsupportedError
from homkv.formats import make_codec
from homkv.plan import LayerPlan

MODEL = "ab" * 16
LAYERS = ("k4420v2222", "k8420v4222", "k4220v2222")


def make_cache(name: str, impl: str = "reference") -> PagedCache:
    settings = {"num_layers": len(LAYERS), "num_kv_heads": G, "num_blocks": 16, "max_sequences": 4}
    return PagedCache(make_codec(name, D, range(D - 1, -1, -1)), impl=impl, **settings)


def mixed(impl: str = "reference") -> PagedCache:
    return make_cache(LayerPlan(MODEL, LAYERS).spelling, impl)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_every_layer_is_what_its_format_alone_makes_of_it(impl: str) -> None:
    """Sealed in one go and token by token, attended to, exported, loaded elsewhere, counted."""
    k, v = tokens(300)
    q, k_new, v_new = torch.randn(3, 1, 2 * G, 1, D).half().float()
    k_new, v_new = k_new[:, :G], v_new[:, :G]
    cache, other = mixed(impl), mixed(impl)
    seq, other_seq = cache.new_sequence(), other.new_sequence()
    append(cache, seq, k, v)
    total = 0
    for layer, name in enumerate(LAYERS):
        alone = make_cache(name, impl)
        alone_seq = alone.new_sequence()
        append(alone, alone_seq, k, v)
        content, expected = cache.export_layer(layer, seq), alone.export_layer(layer, alone_seq)
        assert content.pages.shape == (3, G, alone.codec.page_bytes)
        for part in ("pages", "exact_k", "exact_v"):
            assert torch.equal(getattr(content, part), getattr(expected, part))
        other.load_layer(layer, other_seq, content)
        total += alone.kv_bytes(alone_seq) // len(LAYERS)
        outs = [c.attend(layer, [s], q, k_new, v_new, 0.125) for c, s in ((cache, seq), (alone, alone_seq))]
        assert torch.equal(outs[0], outs[1])
        assert torch.equal(other.attend(layer, [other_seq], q, k_new, v_new, 0.125), outs[0])
    assert other.kv_bytes(other_seq) == cache.kv_bytes(seq)
    one_more = 4 * D * G * len(LAYERS)
    assert cache.kv_bytes(seq) == total + one_more
    cache.check()
    cache._pools[2][cache.blocks(seq)[0]] ^= 1
    with pytest.raises(HomkvError, match="layer 2"):
        cache.check()


def test_a_layer_refuses_the_pages_of_another_format() -> None:
    cache, k, v = mixed(), *tokens(200)
    seq = cache.new_sequence()
    append(cache, seq, k, v)
    other = mixed()
    with pytest.raises(ShapeError):
        other.load_layer(1, other.new_sequence(), cache.export_layer(0, seq))


def test_bits_are_the_mean_of_the_layers() -> None:
    codec = make_codec(LayerPlan(MODEL, LAYERS).spelling, D)
    alone = [make_codec(name, D) for name in LAYERS]
    assert codec.bits_per_element(5000) == pytest.approx(sum(c.bits_per_element(5000) for c in alone) / 3)
    assert codec.num_pages(5000) == alone[0].num_pages(5000)
    assert codec.layout_id != make_codec(LayerPlan(MODEL, LAYERS[::-1]).spelling, D).layout_id
    assert len(codec.layout_id) <= 128  # what the wire takes
    assert len(codec.name) <= 128


def test_another_number_of_layers_is_refused() -> None:
    codec = make_codec(LayerPlan(MODEL, LAYERS).spelling, D)
    with pytest.raises(FormatError, match="2 layers"):
        PagedCache(codec, num_layers=2, num_kv_heads=G, num_blocks=4)
    with pytest.raises(UnsupportedError, match="at_layer"):
        codec.encode(*tokens(64))


def test_a_longer_window_keeps_more_tokens_exact() -> None:
    k, v = tokens(300)
    held = {}
    for name in ("k4420v2222", "k4420v2222w128", "k4420v2222w64"):
        cache = make_cache(name, "cpu")
        seq = cache.new_sequence()
        append(cache, seq, k, v)
        held[name] = cache.export_layer(0, seq)
    assert held["k4420v2222"].exact_k.shape[1] == 4 + 104
    assert held["k4420v2222w128"].exact_k.shape[1] == 4 + 168
    assert torch.equal(held["k4420v2222w128"].pages, held["k4420v2222"].pages[:2])
    assert make_codec("k4420v2222w64", D).name == "k4420v2222"
    with pytest.raises(FormatError, match="window"):
        make_codec("k4420v2222w65", D)


@pytest.mark.parametrize("window", [128, 256])
def test_a_longer_window_is_attended_to_and_sealed_token_by_token(window: int) -> None:
    """The C++ kernel agrees with the reference, and one token at a time leaves the bytes of all at once."""
    name, (k, v) = f"k4420v2222w{window}", tokens(window + 80)
    caches = [make_cache(name, impl) for impl in ("cpu", "reference")]
    ids = [cache.new_sequence() for cache in caches]
    outs = []
    for cache, seq in zip(caches, ids, strict=True):
        cache.append(0, seq, k[:, :-20], v[:, :-20])
        for t in range(k.shape[1] - 20, k.shape[1]):
            out = cache.attend(0, [seq], k[None, :, t : t + 1], k[None, :, t : t + 1], v[None, :, t : t + 1], 0.125)
        outs.append(out)
    assert (outs[0] - outs[1]).abs().max() < 0.02
    whole = make_cache(name, "cpu")
    whole_seq = whole.new_sequence()
    whole.append(0, whole_seq, k, v)
    for cache, seq in zip(caches, ids, strict=True):
        found, expected = cache.export_layer(0, seq), whole.export_layer(0, whole_seq)
        assert found.pages.shape[0] == 1
        assert torch.equal(found.pages, expected.pages)
        assert torch.equal(found.exact_k, expected.exact_k)
