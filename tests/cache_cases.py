"""Caches and tokens that several test files share."""

import torch
from torch import Tensor

from homkv.cache import PagedCache
from homkv.formats import make_codec
from homkv.testing.inputs import make_tokens

D, G = 64, 2
FORMATS = ("balanced", "fp16", "hack", "hack-2026", "hack:rqe=0")


def make_cache(name: str = "balanced", **changes: object) -> PagedCache:
    settings_ = {"num_layers": 2, "num_kv_heads": G, "num_blocks": 16, "max_sequences": 4} | changes
    return PagedCache(make_codec(name, D), impl="reference", **settings_)


def tokens(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Keys and values ``[G, T, D]``; a prefix of a longer call with the same seed."""
    k, v = (make_tokens("normal", 1100, G, D, seed=2 * seed + i)[:count].transpose(0, 1) for i in (0, 1))
    return k.half().float(), v.half().float()


def append(cache: PagedCache, seq_id: int, k: Tensor, v: Tensor) -> None:
    for layer in range(cache.num_layers):
        cache.append(layer, seq_id, k + layer, v - layer)


def filled(name: str, count: int, seed: int = 0, **changes: object) -> tuple[PagedCache, int]:
    cache = make_cache(name, **changes)
    seq_id = cache.new_sequence()
    append(cache, seq_id, *tokens(count, seed))
    return cache, seq_id


def assert_same_bytes(cache: PagedCache, seq_id: int, other: PagedCache, other_id: int) -> None:
    for layer in range(cache.num_layers):
        found, expected = cache.export_layer(layer, seq_id), other.export_layer(layer, other_id)
        assert found.num_tokens == expected.num_tokens
        for name in ("pages", "exact_k", "exact_v"):
            assert torch.equal(getattr(found, name), getattr(expected, name)), name
