"""The law: attention on pages equals attention on what the pages stand for, in every shape."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from homkv.attention import api
from homkv.attention.reference import attend, merge_partials, oracle
from homkv.attention.view import LayerView
from homkv.errors import DTypeError, ShapeError, UnsupportedError
from homkv.formats import UNROUNDED, PageCodec, Rounding, format_names, make_codec
from homkv.formats.rows import RowsCodec
from homkv.page import read_rows
from homkv.quant import class_slice, decode_scales
from homkv.testing.cases import CASES, GROUPS, RAGGED, Case
from homkv.testing.compare import assert_relative, max_error
from homkv.testing.inputs import KINDS, make_tokens, make_view

EDGES = (128, 131, 132, 195, 196)  # a full window before its first page, and the next one
EVERY_CASE = (*CASES, *(Case(length, 4, 64) for length in EDGES))


def queries(view: LayerView, num_q_heads: int, num_tokens: int = 1, kind: str = "normal") -> Tensor:
    return make_tokens(kind, view.slots.shape[0], num_q_heads, num_tokens, view.exact_k.shape[-1], seed=77)


def assert_law(q: Tensor, view: LayerView, codec: PageCodec, scale: float) -> None:
    o, lse = attend(q.double(), view, codec, scale, rounding=UNROUNDED, dtype=torch.float64)
    expected_o, expected_lse = oracle(q, view, codec, scale)
    assert_relative(o, expected_o, 1e-12)
    assert_relative(lse, expected_lse, 1e-12)


@pytest.mark.parametrize("case", EVERY_CASE, ids=lambda case: case.id)
def test_the_law_in_every_shape(case: Case) -> None:
    codec = make_codec("k4420v4222", case.head_dim, torch.randperm(case.head_dim).tolist())
    view = make_view(codec, [case.length], case.num_kv_heads)
    assert_law(queries(view, case.num_q_heads, 2), view, codec, case.head_dim**-0.5)


@pytest.mark.parametrize("name", format_names())
def test_the_law_for_every_format_in_a_ragged_batch(name: str) -> None:
    codec = make_codec(name, 64)
    view = make_view(codec, list(RAGGED), 2, kind="outliers")
    assert_law(queries(view, 6, 3), view, codec, 0.02)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("exact_dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_law_for_extreme_values(kind: str, exact_dtype: torch.dtype) -> None:
    codec = make_codec("balanced", 64)
    view = make_view(codec, [300], kind=kind, exact_dtype=exact_dtype)
    assert_law(queries(view, 4), view, codec, 1e-3)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """One query row after the other, head by head, in float64: what the oracle must be."""
    group = q.shape[0] // k.shape[0]
    out = torch.zeros_like(q)
    for h in range(q.shape[0]):
        for t in range(q.shape[1]):
            scores = [scale * float(q[h, t] @ key) for key in k[h // group]]
            top = max(scores)
            weights = [math.exp(s - top) for s in scores]
            out[h, t] = sum((w * value for w, value in zip(weights, v[h // group], strict=True)), torch.zeros(1))
            out[h, t] /= sum(weights)
    return out


@pytest.mark.parametrize("group", GROUPS)
def test_the_oracle_is_attention(group: int) -> None:
    """On 16-bit pages nothing is lost, so the tokens themselves give the answer; heads and blocks are shuffled."""
    codec = make_codec("fp16", 64)
    lengths = [100, 0, 193]
    view = make_view(codec, lengths, 2, seed=5)
    q = queries(view, 2 * group, 2).double()
    o, lse = oracle(q, view, codec, 0.1)
    for b, length in enumerate(lengths):
        k, v = (make_tokens("normal", 2, length, 64, seed=5 + 2 * b + i).half().double() for i in (1, 2))
        if length:
            assert_relative(o[b], dense_attention(q[b], k, v, 0.1), 1e-12)
        else:
            assert not o[b].any()
            assert torch.all(lse[b] == -torch.inf)


# -- with rounding -------------------------------------------------------------------------------------------------


def score_bound(q: Tensor, pages: Tensor, codec: RowsCodec) -> Tensor:
    """Largest error of a score per query row: half a query step per class times the codes it meets."""
    bound = torch.zeros(q.shape[0], dtype=torch.float64)
    for cls in codec.layout.k_classes:
        rows = read_rows(pages, cls, is_key=True)
        reach = decode_scales(rows.scales, torch.float64) * rows.lanes.double().abs().sum(-1)
        bound += class_slice(q[:, codec.order], cls).abs().amax(-1) / 254 * reach.max()
    return bound


def output_bound(pages: Tensor, codec: RowsCodec) -> float:
    """Largest error of ``sum p v`` over pages for weights up to 1: half a weight step per token and class."""
    total = 0.0
    for cls in codec.layout.v_classes:
        rows = read_rows(pages, cls, is_key=False)
        steps = decode_scales(rows.scales, torch.float64).amax(-1) / 510
        total += float((steps.unsqueeze(-1) * rows.lanes.double().abs().sum(-2)).sum()) / cls.hadamard_block**0.5
    return total


@pytest.mark.parametrize("kind", ["normal", "outliers", "huge"])
@pytest.mark.parametrize("name", ["balanced", "int8"])
def test_eight_bit_attention_stays_within_the_derived_bound(name: str, kind: str) -> None:
    """Scores off by e change weights by a factor within exp(+-2e); rounding the weights then adds its own part."""
    codec, scale = make_codec(name, 64), 1 / 8
    assert isinstance(codec, RowsCodec)
    view = make_view(codec, [500], 1, kind=kind)
    q = queries(view, 2).double()
    scale /= float(view.exact_k[view.slots.long()].double().nan_to_num().abs().max())
    o, lse = attend(q, view, codec, scale, rounding=Rounding(), dtype=torch.float64)
    expected_o, expected_lse = oracle(q, view, codec, scale)
    pages = view.pool[view.page_table[0].long(), 0]
    e = float(score_bound(q[0, :, 0], pages, codec).max()) * scale
    largest_v = float(codec.dense(pages, torch.float64)[1].abs().max())
    largest_v = max(largest_v, float(view.exact_v[view.slots.long()].double().nan_to_num().abs().max()))
    assert max_error(lse, expected_lse) <= e * (1 + 1e-9)
    assert max_error(o, expected_o) <= math.expm1(2 * e) * largest_v + output_bound(pages, codec)
    assert max_error(o, expected_o) > 0


@pytest.mark.parametrize("name", format_names())
def test_eight_bit_attention_is_close_for_every_format(name: str) -> None:
    codec = make_codec(name, 64)
    view = make_view(codec, list(RAGGED))
    q = queries(view, 8)
    o, lse = api.attend(q, view, codec, 1 / 8, impl="reference")
    expected_o, expected_lse = oracle(q, view, codec, 1 / 8)
    assert o.dtype == lse.dtype == torch.float32
    assert_relative(o, expected_o, 0.03)
    assert_relative(lse, expected_lse, 0.01)


def test_scores_far_apart_do_not_overflow() -> None:
    codec = make_codec("balanced", 64)
    view = make_view(codec, [1000], kind="huge")
    o, lse = attend(queries(view, 2, kind="huge"), view, codec, 1.0)
    assert torch.isfinite(o).all()
    assert torch.isfinite(lse).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_queries_of_any_float_dtype_and_stride(dtype: torch.dtype) -> None:
    codec = make_codec("balanced", 64)
    view = make_view(codec, [200, 70])
    q = queries(view, 6, 2).to(torch.bfloat16)
    expected = api.attend(q.float(), view, codec, 0.1, impl="reference")
    strided = q.to(dtype).transpose(1, 2).contiguous().transpose(1, 2)
    for found, x in zip(api.attend(strided, view, codec, 0.1, impl="reference"), expected, strict=True):
        assert torch.equal(found, x)


def test_wrong_calls_are_refused() -> None:
    codec = make_codec("balanced", 64)
    view = make_view(codec, [200])
    for shape in [(2, 4, 1, 64), (1, 3, 1, 64), (1, 4, 1, 32), (1, 4, 64)]:
        with pytest.raises(ShapeError, match="expected q"):
            api.attend(torch.zeros(shape), view, codec, 1.0, impl="reference")
    with pytest.raises(DTypeError, match="floating point"):
        api.attend(torch.zeros(1, 4, 1, 64, dtype=torch.int64), view, codec, 1.0, impl="reference")
    with pytest.raises(ShapeError, match="another format"):
        api.attend(torch.zeros(1, 4, 1, 64), view, make_codec("small", 64), 1.0, impl="reference")
    with pytest.raises(UnsupportedError, match="choose one of these"):
        api.attend(torch.zeros(1, 4, 1, 64), view, codec, 1.0, impl="cuda")


# -- partial results -----------------------------------------------------------------------------------------------


def partial(scores: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    if scores.shape[-1] == 0:
        return torch.zeros(scores.shape[0], v.shape[-1], dtype=v.dtype), torch.full(
            scores.shape[:1], -torch.inf
        ).double()
    return torch.softmax(scores, -1) @ v, torch.logsumexp(scores, -1)


@given(cuts=st.tuples(st.integers(0, 12), st.integers(0, 12)), spread=st.sampled_from([0.0, 1.0, 1000.0]))
@settings(deadline=None)
def test_parts_merge_to_the_whole_in_any_order(cuts: tuple[int, int], spread: float) -> None:
    first, second = sorted(cuts)
    generator = torch.Generator().manual_seed(first * 13 + second)
    scores = spread * torch.randn(3, 12, generator=generator, dtype=torch.float64)
    v = torch.randn(12, 4, generator=generator, dtype=torch.float64)
    bounds = (slice(0, first), slice(first, second), slice(second, 12))
    a, b, c = (partial(scores[:, at], v[at]) for at in bounds)
    for merged in (
        merge_partials(*merge_partials(*a, *b), *c),
        merge_partials(*a, *merge_partials(*b, *c)),
        merge_partials(*c, *merge_partials(*a, *b)),
    ):
        for found, expected in zip(merged, partial(scores, v), strict=True):
            assert_relative(found, expected, 1e-12)


def test_merging_nothing_with_nothing_is_nothing() -> None:
    nothing = (torch.zeros(2, 4), torch.full((2,), -torch.inf))
    o, lse = merge_partials(*nothing, *nothing)
    assert torch.equal(o, nothing[0])
    assert torch.equal(lse, nothing[1])
