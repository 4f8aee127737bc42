"""Decode attention in Triton against the float64 oracle, in every format, shape and split."""

from dataclasses import replace
from functools import cache
from itertools import product

import pytest
import torch
from chosen import cases
from decode_cases import HEADS, Results, assert_accurate, error, one_page_too_many, queries, to_device
from torch import Tensor

from homkv.attention import triton
from homkv.attention.triton.checks import reachable
from homkv.attention.triton.decode import attend_rows
from homkv.attention.view import LayerView
from homkv.errors import DTypeError, ShapeError, UnsupportedError
from homkv.formats.rows import RowsCodec
from homkv.spec import PRESETS, RowsSpec
from homkv.testing.inputs import make_tokens, make_view

FORMATS = (*PRESETS, "k0000v0000", "k2222v0000", "k0000v2248", "k8024v4028", "k2480v8042")


@cache
def make_codec(name: str, head_dim: int) -> RowsCodec:
    generator = torch.Generator().manual_seed(0)
    return RowsCodec(head_dim, RowsSpec.parse(name), torch.randperm(head_dim, generator=generator).tolist())


def run(q: Tensor, view: LayerView, codec: RowsCodec, device: torch.device, programs: int | None = None) -> Results:
    o, lse = attend_rows(q.to(device), to_device(view, device), codec, codec.head_dim**-0.5, programs)
    assert o.dtype == lse.dtype == torch.float32
    return o.cpu(), lse.cpu()


@pytest.mark.parametrize("name", cases(FORMATS, ("small", "k0000v0000", "k2222v0000", "k0000v2248", "k2480v8042")))
def test_every_format(name: str, device: torch.device) -> None:
    codec = make_codec(name, 128)
    view, q = make_view(codec, [0, 1, 203], HEADS, exact_dtype=torch.bfloat16), queries(3, 4, 128).bfloat16()
    assert_accurate(run(q, view, codec, device), q, view, codec)


@pytest.mark.parametrize(
    ("name", "head_dim"),
    cases(
        product(("small", "quality", "int8"), (64, 80, 96, 256)),
        [("quality", 64), ("small", 80), ("int8", 96), ("small", 256)],
    ),
)
def test_every_head_dim(name: str, head_dim: int, device: torch.device) -> None:
    codec = make_codec(name, head_dim)
    view, q = make_view(codec, [330], HEADS), queries(1, 3, head_dim).half()
    assert_accurate(run(q, view, codec, device), q, view, codec)


@pytest.mark.parametrize(
    ("group", "tokens"),
    cases([(1, 1), (5, 1), (7, 2), (8, 1), (9, 1), (16, 1), (2, 8)], [(1, 1), (5, 1), (7, 2), (2, 8)]),
)
def test_any_number_of_rows(group: int, tokens: int, device: torch.device) -> None:
    codec = make_codec("small", 64)
    view, q = make_view(codec, [300, 140], HEADS), queries(2, group, 64, tokens)
    assert_accurate(run(q, view, codec, device), q, view, codec)


@pytest.mark.parametrize("length", cases([1, 63, 64, 65, 127, 131, 132, 133, 1000], [1, 64, 131, 132, 133]))
def test_every_length(length: int, device: torch.device) -> None:
    codec = make_codec("balanced", 64)
    view, q = make_view(codec, [length], HEADS), queries(1, 4, 64).half()
    assert_accurate(run(q, view, codec, device), q, view, codec)


@pytest.mark.parametrize("window", cases([128, 192, 256], [256]))
def test_long_windows(window: int, device: torch.device) -> None:
    """As full as a window gets, and just after it gave up a page."""
    codec = make_codec(f"k4420v2222w{window}", 64)
    view, q = make_view(codec, [window + 67, window + 68], HEADS), queries(2, 2, 64).half()
    assert view.exact_len.tolist() == [window + 67, window + 4]
    assert view.num_pages.tolist() == [0, 1]
    assert_accurate(run(q, view, codec, device), q, view, codec)


@pytest.mark.parametrize(
    ("exact_dtype", "kind"),
    cases(
        product((torch.float16, torch.bfloat16, torch.float32), ("outliers", "constant", "zeros", "tiny")),
        [(torch.float16, "tiny"), (torch.bfloat16, "outliers"), (torch.float32, "constant"), (torch.float32, "zeros")],
    ),
)
def test_extreme_values(exact_dtype: torch.dtype, kind: str, device: torch.device) -> None:
    """On a sharp softmax the reference itself may round the wrong weight; only finite, close results are asked for."""
    codec = make_codec("balanced", 64)
    view, q = make_view(codec, [300], HEADS, kind=kind, exact_dtype=exact_dtype), queries(1, 2, 64) * 0.1
    assert_accurate(run(q, view, codec, device), q, view, codec)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_query_dtypes_and_strides(dtype: torch.dtype, device: torch.device) -> None:
    codec = make_codec("small", 64)
    view = make_view(codec, [3, 203], HEADS, exact_dtype=torch.float16)
    q = queries(2, 3, 64, 2).to(dtype).transpose(1, 2).contiguous().transpose(1, 2)
    assert not q.is_contiguous()
    assert_accurate(run(q, view, codec, device), q, view, codec)
    every_other = make_tokens("normal", 2, HEADS * 3, 1, 128, seed=5)[..., ::2].to(dtype)
    assert_accurate(run(every_other, view, codec, device), every_other, view, codec)


def test_splits_do_not_change_the_result(device: torch.device) -> None:
    """One program per sequence, a few, and more than there are pages, over sequences of very unequal length."""
    codec = make_codec("balanced", 64)
    lengths = [2000, 70, 133, 900] if device.type == "cuda" else [460, 70, 133]
    view, q = make_view(codec, lengths, HEADS), queries(len(lengths), 4, 64).half()
    results = [run(q, view, codec, device, programs=n) for n in (1, 3, 40)]
    for found in results:
        assert_accurate(found, q, view, codec)
        assert error(found[0], results[0][0].double()) < 1e-4


def test_nothing_outside_is_read(device: torch.device) -> None:
    """Blocks of others hold garbage and the window's end is NaN (make_view); indices outside are clamped."""
    codec = make_codec("small", 64)
    view, q = make_view(codec, [400], HEADS), queries(1, 4, 64).half()
    wrong = replace(view, page_table=view.page_table + 10_000, slots=view.slots + 10_000)
    o, _ = run(q, wrong, codec, device)
    assert o.shape == q.shape
    view = to_device(view, device)
    first, second = (run(q, one_page_too_many(view, block), codec, device) for block in view.page_table[0, :2].tolist())
    assert torch.equal(first[0], second[0])


def test_queries_beyond_int32_offsets_are_copied() -> None:
    """The last token's rows in the queries of a very long prompt."""
    near, far = (torch.empty_strided((1, 8, 1, 64), (8 * n, n, 64, 1), device="meta") for n in (64 * 2**20, 2**29))
    assert reachable(near) is near
    assert reachable(far).is_contiguous()


def test_a_nan_query_spoils_its_own_rows_only(device: torch.device) -> None:
    codec = make_codec("small", 64)
    view, q = make_view(codec, [300], HEADS), queries(1, 2, 64).half()
    q[0, 0] = torch.nan
    o, _ = run(q, view, codec, device)
    assert o[0, 0].isnan().any()
    assert not o[0, 2:].isnan().any()


def test_wrong_input_is_refused(device: torch.device) -> None:
    codec = make_codec("small", 64)
    view = to_device(make_view(codec, [300], HEADS), device)
    q = queries(1, 2, 64).to(device)
    with pytest.raises(ShapeError, match="pages of"):
        triton.attend(q, view, make_codec("balanced", 64), 0.1)
    with pytest.raises(ShapeError, match="expected q"):
        triton.attend(q[..., :32], view, codec, 0.1)
    with pytest.raises(UnsupportedError, match="at most 16 query rows"):
        triton.attend(q.repeat(1, 1, 17, 1), view, codec, 0.1)
    with pytest.raises(ShapeError, match="softmax_scale"):
        triton.attend(q, view, codec, 0.0)
    wide = torch.zeros(1, 2**20 + 1, dtype=torch.int32, device=device)
    with pytest.raises(UnsupportedError, match="expected at most 1048576 pages"):
        triton.attend(q, replace(view, page_table=wide), codec, 0.1)
    with pytest.raises(DTypeError, match="page_table"):
        triton.attend(q, replace(view, page_table=view.page_table.long()), codec, 0.1)
    with pytest.raises(ShapeError, match="one entry per row"):
        triton.attend(q, replace(view, slots=view.slots.repeat(2)), codec, 0.1)
    shifted = torch.zeros(view.pool.numel() + 8, dtype=torch.uint8, device=device)[8:].view_as(view.pool)
    with pytest.raises(ShapeError, match="multiple of 16 bytes"):
        triton.attend(q, replace(view, pool=shifted), codec, 0.1)
    with pytest.raises(DTypeError, match="floating point q"):
        triton.attend(q.to("meta"), view, codec, 0.1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_lengths_are_read_at_every_replay(device: torch.device) -> None:
    """A captured call answers for the lengths that the tensors hold when it is replayed."""
    codec = make_codec("balanced", 128)
    host = make_view(codec, [3000, 700], HEADS)
    view, q = to_device(host, device), queries(2, 4, 128).half()
    on_device = q.to(device)
    attend_rows(on_device, view, codec, 128**-0.5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o, lse = attend_rows(on_device, view, codec, 128**-0.5)
    shorter = replace(host, num_pages=torch.tensor([7, 2], dtype=torch.int32))
    for now in (host, shorter):
        view.num_pages.copy_(now.num_pages)
        graph.replay()
        assert_accurate((o.cpu(), lse.cpu()), q, now, codec)
