"""What a codec keeps on the host stays there where another device is the default, as vLLM makes a GPU the default."""

import pytest
import torch

from homkv.attention.triton.expand import _rotations
from homkv.formats import PageCodec, make_codec
from homkv.rope import RopeSpec

NAMES = ["small", "balanced", "quality", "near-lossless", "int8", "turbo", "hack", "hack-2026", "kivi", "fp8"]


def made_elsewhere(name: str, rope: RopeSpec | None = None) -> PageCodec:
    with torch.device("meta"):
        return make_codec(name, 64, rope)


@pytest.mark.parametrize("name", NAMES)
def test_a_codec_is_on_the_host(name: str) -> None:
    codec = made_elsewhere(name)
    found = {key: x.device.type for key, x in vars(codec).items() if isinstance(x, torch.Tensor)}
    assert set(found.values()) <= {"cpu"}, found
    k, v = (torch.randn(1, 64, 64) for _ in "kv")
    pages, expected = (c.encode(k, v) for c in (codec, make_codec(name, 64)))
    assert torch.equal(pages, expected)


def test_kernels_take_the_order_of_channels_without_asking_a_device() -> None:
    """``tolist`` of a tensor on a GPU would end the capture of a CUDA graph."""
    codec = made_elsewhere("balanced")
    with torch.device("meta"):
        assert codec.order.tolist() == list(range(64))  # type: ignore[attr-defined]


def test_tables_of_kernels_are_computed_on_the_host() -> None:
    layout = make_codec("balanced", 64).layout  # type: ignore[attr-defined]
    arguments = 64, tuple(range(64)), layout.k_classes, layout.v_classes, torch.device("cpu")
    _rotations.cache_clear()
    with torch.device("meta"):
        found = _rotations(*arguments)
    _rotations.cache_clear()
    for name, expected in vars(_rotations(*arguments)).items():
        assert torch.equal(getattr(found, name), expected), name
