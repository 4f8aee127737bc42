"""Decode attention on `hack` pages in Triton against the float64 oracle; what both HACK formats share."""

from dataclasses import replace
from itertools import product

import pytest
import torch
import triton
import triton.language as tl
from chosen import cases
from decode_cases import HEADS, Codec, assert_accurate, error, one_page_too_many, queries, run, to_device

from homkv.attention import api
from homkv.attention import triton as kernels
from homkv.attention.triton.hack_decode import attend_hack
from homkv.attention.triton.hack_fragments import transpose8
from homkv.errors import ShapeError, UnsupportedError
from homkv.formats.hack import HackCodec, HackOptions
from homkv.formats.hack2026 import Hack2026Codec
from homkv.testing.inputs import make_tokens, make_view

both = pytest.mark.parametrize("codec", [HackCodec(64), Hack2026Codec(64)], ids=lambda codec: codec.name)


@pytest.mark.parametrize(
    ("group_size", "bits", "group", "stored"),
    cases(
        [(*page, *rows) for page in product((32, 64, 128), (2, 4, 8)) for rows in ((3, True), (7, False))],
        [(32, 2, 7, False), (64, 8, 3, True), (128, 4, 7, False), (32, 4, 3, True)],
    ),
)
def test_every_page(group_size: int, bits: int, group: int, stored: bool, device: torch.device) -> None:
    """Pages of one pair, half a pair and the open block, with sums and without."""
    codec = HackCodec(64, HackOptions(group_size, bits, summation_elimination=stored))
    view, q = make_view(codec, [3 * group_size + 5], 1), queries(1, group, 64)[:, :group]
    assert_accurate(run(q, view, codec, device), q, view, codec)


@pytest.mark.parametrize(
    ("head_dim", "group_size"),
    cases(
        [(16, 64), (80, 128), (96, 32), (96, 128), (128, 32), (128, 64), (256, 64)],
        [(16, 64), (80, 128), (96, 32), (256, 64)],
    ),
)
def test_every_head_dim(head_dim: int, group_size: int, device: torch.device) -> None:
    codec = HackCodec(head_dim, HackOptions(group_size, rounding="nearest"))
    view = make_view(codec, [2 * group_size + 7, group_size], 1, exact_dtype=torch.bfloat16)
    q = queries(2, 4, head_dim)[:, :4]
    assert_accurate(run(q, view, codec, device), q, view, codec)


@both
@pytest.mark.parametrize(("group", "tokens"), cases([(1, 1), (5, 1), (7, 2), (8, 1), (9, 1)], [(1, 1), (8, 1), (7, 2)]))
def test_any_number_of_rows(group: int, tokens: int, codec: Codec, device: torch.device) -> None:
    view, q = make_view(codec, [140], HEADS), queries(1, group, 64, tokens)
    assert_accurate(run(q, view, codec, device), q, view, codec)


@both
def test_every_length(codec: Codec, device: torch.device) -> None:
    view, q = make_view(codec, [0, 1, 4, 64, 68, 127, 600], HEADS), queries(7, 4, 64).half()
    o, lse = run(q, view, codec, device)
    assert_accurate((o, lse), q, view, codec)
    assert not o[0].any()
    assert bool((lse[0] == -torch.inf).all())


@both
@pytest.mark.parametrize("kind", cases(["outliers", "constant", "zeros", "tiny"], ["outliers", "zeros"]))
def test_extreme_values(kind: str, codec: Codec, device: torch.device) -> None:
    view, q = make_view(codec, [200], 1, kind=kind), queries(1, 2, 64)[:, :2] * 0.1
    assert_accurate(run(q, view, codec, device), q, view, codec)


@both
def test_constant_queries_and_sharp_ones(codec: Codec, device: torch.device) -> None:
    """Rows of zeros, of one value, and with scores hundreds apart."""
    view, q = make_view(codec, [400], 1), queries(1, 4, 64)[:, :4]
    q[0, 0], q[0, 1], q[0, 2] = 0, 0.5, q[0, 2] * 60
    assert_accurate(run(q, view, codec, device), q, view, codec)


@pytest.mark.parametrize("seed", [0, 2**32 - 1])
def test_the_open_block_draws_its_pages_noise(seed: int, device: torch.device) -> None:
    """Keys of the open block are quantized where they stand: the oracle sees the codec's own window."""
    codec = HackCodec(64, HackOptions(seed=seed))
    view, q = make_view(codec, [64 * 3 + 50], 1), queries(1, 3, 64)
    only_window = replace(view, exact_v=view.exact_v * 100)
    assert_accurate(run(q[:, :3], only_window, codec, device), q[:, :3], only_window, codec)


@both
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_query_dtypes_and_strides(dtype: torch.dtype, codec: Codec, device: torch.device) -> None:
    view = make_view(codec, [100], HEADS, exact_dtype=torch.float16)
    q = queries(1, 3, 64, 2).to(dtype).transpose(1, 2).contiguous().transpose(1, 2)
    assert not q.is_contiguous()
    assert_accurate(run(q, view, codec, device), q, view, codec)
    every_other = make_tokens("normal", 1, HEADS * 3, 1, 128, seed=5)[..., ::2].to(dtype)
    assert_accurate(run(every_other, view, codec, device), every_other, view, codec)


@both
def test_splits_do_not_change_the_result(codec: Codec, device: torch.device) -> None:
    view, q = make_view(codec, [600, 70, 133], 1), queries(3, 4, 64)[:, :4].half()
    results = [run(q, view, codec, device, programs=n) for n in (1, 2, 20)]
    for found in results:
        assert_accurate(found, q, view, codec)
        assert error(found[0], results[0][0].double()) < 1e-4


@both
def test_nothing_outside_is_read(codec: Codec, device: torch.device) -> None:
    """Blocks of others hold garbage and the window's end is NaN (make_view); indices outside are clamped."""
    view, q = make_view(codec, [400], HEADS), queries(1, 4, 64).half()
    wrong = replace(view, page_table=view.page_table + 10_000, slots=view.slots + 10_000)
    assert run(q, wrong, codec, device)[0].shape == q.shape


@both
def test_a_nan_query_spoils_its_own_rows_only(codec: Codec, device: torch.device) -> None:
    view, q = make_view(codec, [300], HEADS), queries(1, 2, 64).half()
    q[0, 0, 0, 5] = torch.nan
    o, _ = run(q, view, codec, device)
    assert o[0, 0].isnan().any()
    assert not o[0, 1:].isnan().any()


@both
def test_a_count_beyond_the_table_reads_nothing_behind_it(codec: Codec, device: torch.device) -> None:
    view, q = to_device(make_view(codec, [5 * codec.page_tokens + 10], HEADS), device), queries(1, 2, 64).half()
    first, second = (run(q, one_page_too_many(view, block), codec, device) for block in view.page_table[0, :2].tolist())
    assert torch.equal(first[0], second[0])


@both
def test_the_package_attends_to_them(codec: Codec, device: torch.device) -> None:
    view, q = to_device(make_view(codec, [70], HEADS), device), queries(1, 2, 64).to(device)
    assert torch.equal(kernels.attend(q, view, codec, 0.1)[0], attend_hack(q, view, codec, 0.1)[0])
    with pytest.raises(ShapeError, match="pages of"):
        kernels.attend(q, view, HackCodec(64, HackOptions(bits=4)), 0.1)
    with pytest.raises(UnsupportedError, match="at most 16 query rows"):
        kernels.attend(q.repeat(1, 1, 17, 1), view, codec, 0.1)


@triton.jit
def transpose_kernel(X, Out, TILES: tl.constexpr, PTX: tl.constexpr):
    """What transpose8 does to the bits of a matrix product ``[8, 8 TILES]``, plus what it takes to lie as one does."""
    i = tl.arange(0, 16)
    n = tl.arange(0, 8 * TILES)
    a = tl.load(X + i[:, None] * 32 + tl.arange(0, 32)[None, :])
    b = tl.load(X + 512 + tl.arange(0, 32)[:, None] * (8 * TILES) + n[None, :])
    x = tl.dot(a, b, out_dtype=tl.int32).reshape([2, 8, TILES, 4, 2])
    even, odd = tl.split(x)
    x = transpose8((even & 0xFFFF) | (odd << 16), PTX)
    at = tl.arange(0, 16)[:, None] * (4 * TILES) + tl.arange(0, 4 * TILES)[None, :]
    tl.store(Out + at, x.reshape([16, 4 * TILES]))


@pytest.mark.parametrize("tiles", [1, 2])
def test_a_warp_transposes_as_torch_does(tiles: int, device: torch.device) -> None:
    """Both forms: by one instruction where there is a GPU, by shuffling dimensions everywhere."""
    x = torch.randint(-128, 128, (2048,), dtype=torch.int8)
    product = x[:512].reshape(16, 32).int() @ x[512 : 512 + 256 * tiles].reshape(32, 8 * tiles).int()
    matrices = product.to(torch.int16).reshape(2, 8, tiles, 8)
    expected = matrices.permute(0, 3, 2, 1).contiguous().view(torch.int32).reshape(16, 4 * tiles)
    for ptx in {False, device.type == "cuda"}:
        out = torch.empty(16, 4 * tiles, dtype=torch.int32, device=device)
        transpose_kernel[(1,)](x.to(device), out, TILES=tiles, PTX=ptx, num_warps=1)
        assert torch.equal(out.cpu(), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@both
def test_lengths_are_read_at_every_replay(codec: Codec, device: torch.device) -> None:
    """A captured call answers for the lengths that the tensors hold when it is replayed."""
    host = make_view(codec, [3000, 700], HEADS)
    view, q = to_device(host, device), queries(2, 4, 64).half()
    on_device = q.to(device)
    attend_hack(on_device, view, codec, 64**-0.5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o, lse = attend_hack(on_device, view, codec, 64**-0.5)
    shorter = replace(host, num_pages=torch.tensor([7, 2], dtype=torch.int32))
    for now in (host, shorter):
        view.num_pages.copy_(now.num_pages)
        graph.replay()
        assert_accurate((o.cpu(), lse.cpu()), q, now, codec)


def test_a_chunk_longer_than_one_call_extends_in_several(device: torch.device) -> None:
    codec = HackCodec(64)
    view = make_view(codec, [150], HEADS)
    q, k, v = queries(1, 3, 64, tokens=12), *(make_tokens("normal", 1, HEADS, 12, 64, seed=s) for s in (5, 6))
    there = [x.to(device) for x in (q, k, v)]
    found = api.extend(*there, to_device(view, device), codec, 0.125, impl="triton").cpu()
    readable = api.extend(q, k, v, view, codec, 0.125, impl="reference")
    assert error(found, readable) < 0.02
