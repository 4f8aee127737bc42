"""The native encoder writes the bytes that the torch encoder writes, on every instruction set, and refuses the same."""

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native_cases import COMBINATIONS, ISAS, isas, make_codec, needs_kernel
from torch import Tensor

from homkv.attention import cpu
from homkv.errors import FormatError
from homkv.formats.rows import RowsCodec
from homkv.spec import DIGITS, HEAD_DIMS, PRESETS
from homkv.testing.inputs import KINDS, make_tokens

pytestmark = needs_kernel


def native(codec: RowsCodec, k: Tensor, v: Tensor, **options: object) -> Tensor:
    return cpu.encode(k, v, codec.layout, codec.order, **options)  # type: ignore[arg-type]


def expected(codec: RowsCodec, k: Tensor, v: Tensor) -> Tensor:
    return codec.encode(k, v).transpose(0, 1).contiguous()


@cache
def one_page(name: str, head_dim: int) -> tuple[RowsCodec, Tensor, Tensor, Tensor]:
    codec = make_codec(name, head_dim)
    k, v = make_tokens("outliers", 3, 64, head_dim), make_tokens("normal", 3, 64, head_dim, seed=1)
    return codec, k, v, expected(codec, k, v)


@isas
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("name", [*PRESETS, *COMBINATIONS])
def test_same_bytes_for_every_format_and_head_dim(name: str, head_dim: int, isa: str) -> None:
    codec, k, v, pages = one_page(name, head_dim)
    assert torch.equal(native(codec, k, v, isa=isa), pages)


@isas
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "huge"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["balanced", "k8444v8242"])
def test_same_bytes_for_extreme_values_and_16_bit_inputs(name: str, dtype: torch.dtype, kind: str, isa: str) -> None:
    codec = make_codec(name, 80)
    k, v = make_tokens(kind, 2, 128, 80).to(dtype), make_tokens(kind, 2, 128, 80, seed=1).to(dtype)
    assert torch.equal(native(codec, k, v, isa=isa), expected(codec, k, v))


@isas
def test_same_bytes_for_values_of_ten_thousand(isa: str) -> None:
    codec = make_codec("k8888v8888", 128)
    k, v = make_tokens("huge", 2, 64, 128) + 3e4, make_tokens("huge", 2, 64, 128, seed=1)
    assert torch.equal(native(codec, k, v, isa=isa), expected(codec, k, v))


@isas
@pytest.mark.parametrize("num_heads", [1, 3, 17])
@pytest.mark.parametrize("num_pages", [1, 7])
def test_same_bytes_for_any_number_of_pages_and_threads(num_heads: int, num_pages: int, isa: str) -> None:
    codec = make_codec("balanced", 64)
    k, v = torch.randn(2, num_heads, num_pages * 64, 64).unbind()
    pages = native(codec, k, v, isa=isa, num_threads=1)
    assert torch.equal(pages, expected(codec, k, v))
    assert torch.equal(pages, native(codec, k, v, isa=isa, num_threads=3))


def test_strides_are_honoured() -> None:
    codec = make_codec("quality", 96)
    token_first = torch.randn(128, 2, 96)  # as a projection leaves them
    every_other = torch.randn(2, 256, 96)[:, ::2]
    wide = torch.randn(2, 128, 200)[:, :, 50:146]
    for k, v in ((token_first.transpose(0, 1), every_other), (wide, token_first.transpose(0, 1))):
        assert torch.equal(native(codec, k, v), expected(codec, k, v))


def test_pages_go_to_their_blocks_and_nowhere_else() -> None:
    codec = make_codec("balanced", 64)
    k, v = torch.randn(2, 3, 128, 64).unbind()
    pool = torch.full((6, 3, codec.page_bytes), 0xA5, dtype=torch.uint8)
    blocks = torch.tensor([4, 1], dtype=torch.int32)
    assert native(codec, k, v, out=pool, block_ids=blocks) is pool
    assert torch.equal(pool[[4, 1]], expected(codec, k, v))
    assert bool((pool[[0, 2, 3, 5]] == 0xA5).all())


def test_no_pages_are_no_bytes() -> None:
    codec = make_codec("balanced", 64)
    assert native(codec, torch.empty(2, 0, 64), torch.empty(2, 0, 64)).shape == (0, 2, codec.page_bytes)


@settings(max_examples=40, deadline=None)
@given(
    digits=st.lists(st.sampled_from(DIGITS), min_size=8, max_size=8),
    head_dim=st.sampled_from(HEAD_DIMS),
    exponent=st.integers(-20, 3),
    seed=st.integers(0, 2**31),
    isa=st.sampled_from(ISAS or ("",)),
)
def test_same_bytes_for_any_digits(digits: list[int], head_dim: int, exponent: int, seed: int, isa: str) -> None:
    name = "k{}{}{}{}v{}{}{}{}".format(*digits)
    codec = make_codec(name, head_dim, seed)
    k, v = (make_tokens("outliers", 1, 64, head_dim, seed=seed + i) * 2.0**exponent for i in range(2))
    assert torch.equal(native(codec, k, v, isa=isa), expected(codec, k, v))


@isas
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("which", ["keys", "values"])
def test_what_is_not_finite_is_refused(which: str, bad: float, isa: str) -> None:
    codec = make_codec("balanced", 64)
    k, v = torch.randn(2, 3, 128, 64).unbind()
    (k if which == "keys" else v)[2, 100, 63] = bad
    with pytest.raises(FormatError, match=f"finite {which}.*wider dtype"):
        native(codec, k, v, isa=isa)


@isas
def test_a_mean_beyond_fp16_is_refused(isa: str) -> None:
    codec = make_codec("balanced", 64)
    k, v = torch.randn(2, 1, 64, 64).unbind()
    k[0, :, 5] = 65520.0  # the first mean that fp16 rounds to infinity
    with pytest.raises(FormatError, match=r"means.*65504.*fp16"):
        native(codec, k, v, isa=isa)
    k[0, :, 5] = 65519.0
    assert torch.equal(native(codec, k, v, isa=isa), expected(codec, k, v))


@isas
@pytest.mark.parametrize("name", ["k2222v2222", "k4444v4444", "k8888v8888"])
@pytest.mark.parametrize("which", ["keys", "values"])
@pytest.mark.parametrize("size", [1e6, 1e30, 3e38])
def test_a_scale_beyond_the_format_is_refused(size: float, which: str, name: str, isa: str) -> None:
    codec = make_codec(name, 64)
    k, v = torch.randn(2, 1, 64, 64).unbind()
    (k if which == "keys" else v)[0, 10:12] = torch.tensor([size, -size])[:, None].expand(2, 64)  # mean stays small
    with pytest.raises(FormatError, match=r"scales up to 240.*fp16"):
        native(codec, k, v, isa=isa)


def test_the_largest_scale_is_stored_and_the_next_one_refused() -> None:
    """8 bits round up: 240 * 127 is the largest magnitude that byte 255 covers."""
    codec = make_codec("k0000v8888", 64)
    k, v = torch.zeros(2, 1, 64, 64).unbind()
    v[0, 0, 0] = 240 * 127 * 8.0  # alone in its token: the rotation spreads it over 64 slots
    assert torch.equal(native(codec, k, v), expected(codec, k, v))
    assert int(native(codec, k, v)[0, 0, codec.layout.v_classes[0].scales_offset]) == 255
    v[0, 0, 0] *= 1.001
    with pytest.raises(FormatError, match="240"):
        native(codec, k, v)


def test_a_refused_page_leaves_other_blocks_alone() -> None:
    codec = make_codec("balanced", 64)
    k, v = torch.randn(2, 1, 64, 64).unbind()
    v[0, 3, 3] = torch.nan
    pool = torch.full((3, 1, codec.page_bytes), 0xA5, dtype=torch.uint8)
    with pytest.raises(FormatError):
        native(codec, k, v, out=pool, block_ids=torch.tensor([1], dtype=torch.int32))
    assert bool((pool[[0, 2]] == 0xA5).all())
