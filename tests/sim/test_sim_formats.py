"""Bytes of formats are those of the code that stores them; names that mean nothing are refused."""

import pytest

from homkv.errors import FormatError, UnsupportedError
from homkv.formats import make_codec
from homkv.sim.formats import NAMES, make_format
from homkv.spec import PRESETS

STORED = [
    *PRESETS,
    "k0220v2222",
    *(f"{base}:pi={pi},se={se}" for base in ("hack", "hack-2026") for pi in (32, 64, 128) for se in (0, 1)),
    "fp16",
]


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", STORED)
def test_bytes_are_the_codecs(name: str, head_dim: int) -> None:
    codec, model = make_codec(name, head_dim), make_format(name, head_dim)
    for tokens in (1, 63, 68, 131, 1000, 12_345):
        assert model.stored_bytes(tokens) == codec.kv_bytes(tokens)


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_smaller_than_16_bits_but_16_bits(name: str) -> None:
    kv = make_format(name, 128)
    ratio = kv.stored_bytes(16_384) * kv.wire_ratio / (512 * 16_384)
    assert ratio == 1 if name == "fp16" else 0.13 < ratio < 0.53


@pytest.mark.parametrize(
    "name",
    [
        "",
        "k4",
        "balanced:pi=64",
        "hack:pi=7",
        "hack:colour=1",
        "hack:prefill=7",
        "hack-2026:rqe=0",
        "dequant-hack",
        "k9999v2222",
    ],
)
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(FormatError):
        make_format(name, 128)


def test_head_dims_that_pages_do_not_cover_are_refused() -> None:
    with pytest.raises(UnsupportedError):
        make_format("balanced", 100)


def test_hack_computes_prompts_as_published_unless_it_says_exact() -> None:
    found = {name: make_format(name, 128).int8_prefill for name in ("hack", "hack:prefill=int8", "hack:prefill=exact")}
    assert found == {"hack": True, "hack:prefill=int8": True, "hack:prefill=exact": False}
