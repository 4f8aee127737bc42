"""Every registered format keeps the contract of PageCodec; names are read strictly."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from homkv.errors import FormatError, UnsupportedError
from homkv.formats import UNROUNDED, PageCodec, format_names, make_codec
from homkv.formats.base import Rounding
from homkv.rope import default_rope
from homkv.spec import ALL_PRESETS
from homkv.testing.compare import assert_relative
from homkv.testing.inputs import KINDS, make_tokens

formats = pytest.mark.parametrize("name", format_names())
DTYPE = torch.float64


def encoded(codec: PageCodec, *lead: int, num_pages: int = 3) -> torch.Tensor:
    shape = (*lead, num_pages * codec.page_tokens, codec.head_dim)
    return codec.encode(make_tokens("outliers", *shape, seed=1), make_tokens("normal", *shape, seed=2), 4)


@formats
@pytest.mark.parametrize("head_dim", [64, 128])
def test_scores_and_weighted_sums_are_those_of_the_dense_form(name: str, head_dim: int) -> None:
    """The law's two halves: without rounding, products on codes are products on dense keys and values."""
    codec = make_codec(name, head_dim, default_rope(head_dim))
    pages = encoded(codec, 2)
    k, v = codec.dense(pages, DTYPE)
    q, p = torch.randn(2, 5, head_dim, dtype=DTYPE), torch.rand(2, 5, k.shape[1], dtype=DTYPE)
    assert_relative(codec.scores(q, pages, UNROUNDED, DTYPE), q @ k.transpose(-1, -2), 1e-12)
    assert_relative(codec.weigh(p, pages, UNROUNDED, DTYPE), p @ v, 1e-12)


@formats
def test_eight_bit_products_are_near(name: str) -> None:
    codec = make_codec(name, 64)
    pages = encoded(codec)
    k, v = codec.dense(pages, DTYPE)
    q, p = torch.randn(5, 64, dtype=DTYPE), torch.rand(5, k.shape[0], dtype=DTYPE)
    for rounding in (Rounding(), Rounding(q=False), Rounding(p=False)):
        assert_relative(codec.scores(q, pages, rounding, DTYPE), q @ k.T, 0.02)
        assert_relative(codec.weigh(p, pages, rounding, DTYPE), p @ v, 0.02)


@formats
def test_pages_are_records_of_the_stated_size_with_any_leading_shape(name: str) -> None:
    codec = make_codec(name, 64)
    pages = encoded(codec, 2, 3, num_pages=2)
    assert pages.shape == (2, 3, 2, codec.page_bytes)
    assert pages.dtype == torch.uint8
    for found, flat in zip(codec.dense(pages), codec.dense(pages.flatten(0, 1)), strict=True):
        assert found.shape == (2, 3, 2 * codec.page_tokens, 64)
        assert torch.equal(found.flatten(0, 1), flat)


@formats
def test_pages_do_not_depend_on_how_many_are_encoded_at_once(name: str) -> None:
    codec = make_codec(name, 64, default_rope(64))
    pages, size = encoded(codec, 2), codec.page_tokens
    k, v = make_tokens("outliers", 2, 3 * size, 64, seed=1), make_tokens("normal", 2, 3 * size, 64, seed=2)
    one_by_one = [codec.encode(k[:, i : i + size], v[:, i : i + size], 4 + i) for i in range(0, 3 * size, size)]
    assert torch.equal(torch.cat(one_by_one, 1), pages)


@formats
@pytest.mark.parametrize("kind", KINDS)
def test_extreme_values_come_back_finite_and_within_the_range(name: str, kind: str) -> None:
    """No element is off by more than a row's length, or than the smallest steps that fp16 and E5M3 can say."""
    codec = make_codec(name, 64, default_rope(64))
    x = make_tokens(kind, 2, codec.page_tokens, 64, seed=3)
    for found in codec.dense(codec.encode(x, x, 4)):
        assert bool(torch.isfinite(found).all())
        assert (found - x).abs().max() <= x.norm(dim=-1).max() + 2.0**-16


@formats
@given(num_tokens=st.integers(0, 5000))
def test_tokens_are_counted_once(name: str, num_tokens: int) -> None:
    codec = make_codec(name, 64)
    pages, exact = codec.num_pages(num_tokens), codec.num_exact(num_tokens)
    assert pages * codec.page_tokens + exact == num_tokens
    assert 0 <= exact < codec.num_sinks + codec.max_window
    assert pages == 0 or exact >= codec.num_sinks + codec.min_window
    if not codec.restored_on_arrival:  # else every token is held in 16 bits
        assert codec.kv_bytes(num_tokens) == pages * codec.page_bytes + exact * 2 * 64 * 2


@formats
def test_a_layout_names_the_bytes(name: str) -> None:
    """The wire compares layout_id: it must tell head sizes and formats apart."""
    ids = {make_codec(other, d).layout_id for other in format_names() for d in (64, 128)}
    assert len(ids) == 2 * len(format_names())
    assert make_codec(name, 64).name in (name, ALL_PRESETS.get(name))


def test_a_layout_names_the_order_of_its_channels() -> None:
    natural, turned = (make_codec("balanced", 64, order).layout_id for order in (None, range(63, -1, -1)))
    assert natural != turned
    assert natural == make_codec("balanced", 64, range(64)).layout_id


@pytest.mark.parametrize(
    ("num_tokens", "pages"), [(0, 0), (1, 0), (68, 0), (131, 0), (132, 1), (195, 1), (196, 2), (32768, 510)]
)
def test_a_rows_sequence_is_sinks_pages_window(num_tokens: int, pages: int) -> None:
    assert make_codec("balanced", 128).num_pages(num_tokens) == pages


@pytest.mark.parametrize(
    ("name", "bits"), [("small", 2.3), ("balanced", 2.5), ("quality", 3.4), ("near-lossless", 4.8), ("int8", 8.2)]
)
def test_presets_cost_what_the_design_says_everything_counted(name: str, bits: float) -> None:
    assert make_codec(name, 128).bits_per_element(32768) == pytest.approx(bits, abs=0.06)


@pytest.mark.parametrize("name", ["", "fp9", "Balanced", "k442v2222", "q4420v2222", "fp16 ", "hack2026", "kvi"])
def test_unknown_names_are_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(FormatError, match="balanced"):
        make_codec(name, 64)


@pytest.mark.parametrize(
    "name",
    ["balanced:bits=4", "fp16:x=1", "hack:bits", "hack:color=red", "hack-2026:pi=65", "fp8:x=1", "kivi:g=64,r=32"],
)
def test_bad_options_are_refused(name: str) -> None:
    with pytest.raises(FormatError):
        make_codec(name, 64)


def test_head_dims_that_rows_do_not_cover_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="fp16"):
        make_codec("balanced", 48)
    assert make_codec("fp16", 48).page_bytes == 64 * 48 * 4
