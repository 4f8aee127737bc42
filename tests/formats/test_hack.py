"""HACK v1 as a codec: the law, the bytes, the noise, the two eliminations, the name."""

import math
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from homkv.errors import FormatError, ShapeError, UnsupportedError
from homkv.formats.base import EIGHT_BIT, UNROUNDED
from homkv.formats.hack import HackCodec, HackOptions

# Every head_dim of the project that a group size covers.
SHAPES = [(64, 32), (64, 64), (64, 128), (80, 128), (96, 32), (96, 128), (128, 32), (128, 64), (128, 128), (256, 64)]


@st.composite
def codecs(draw: st.DrawFn) -> HackCodec:
    head_dim, group_size = draw(st.sampled_from(SHAPES))
    options = HackOptions(
        group_size=group_size,
        bits=draw(st.sampled_from((2, 4, 8))),
        rounding=draw(st.sampled_from(("stochastic", "nearest"))),
        seed=draw(st.integers(0, 2**32 - 1)),
        summation_elimination=draw(st.booleans()),
        requantization_elimination=draw(st.booleans()),
        prefill=draw(st.sampled_from(("exact", "int8"))),
    )
    return HackCodec(head_dim, options)


def tokens(codec: HackCodec, num_pages: int, seed: int, *lead: int, magnitude: float = 1.0) -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(seed)
    shape = (*lead, num_pages * codec.page_tokens, codec.head_dim)
    k, v = (torch.randn(shape, generator=gen) * magnitude for _ in "kv")
    return k + 3 * magnitude * torch.randn(codec.head_dim, generator=gen), v  # K with outlier channels


@settings(max_examples=30, deadline=None)
@given(
    codec=codecs(), num_pages=st.integers(0, 2), rows=st.integers(1, 3), seed=st.integers(0, 2**31), small=st.booleans()
)
def test_the_law(codec: HackCodec, num_pages: int, rows: int, seed: int, small: bool) -> None:
    k, v = tokens(codec, num_pages, seed, 2, magnitude=1e-4 if small else 1.0)
    pages = codec.encode(k, v, first_position=seed % 1000)
    assert pages.shape == (2, num_pages, codec.page_bytes)
    k_dense, v_dense = codec.dense(pages, torch.float64)
    assert k_dense.shape == v_dense.shape == k.shape
    q = torch.randn(2, rows, codec.head_dim, dtype=torch.float64)
    p = torch.rand(2, rows, k.shape[1], dtype=torch.float64)
    scores = codec.scores(q, pages, UNROUNDED, torch.float64)
    out = codec.weigh(p, pages, UNROUNDED, torch.float64)
    k_transposed = k_dense.transpose(-1, -2)
    assert bool(((scores - q @ k_transposed).abs() <= 1e-12 * (q.abs() @ k_transposed.abs())).all())
    assert bool(((out - p @ v_dense).abs() <= 1e-12 * (p.abs() @ v_dense.abs())).all())


def range_step(x: Tensor, size: int) -> Tensor:
    """An 8-bit step of each partition of the last dimension."""
    parts = x.unflatten(-1, (-1, size))
    return (parts.amax(-1) - parts.amin(-1)) / 255


@settings(max_examples=20, deadline=None)
@given(codec=codecs(), seed=st.integers(0, 2**31))
def test_eight_bit_rounding_stays_within_its_bound(codec: HackCodec, seed: int) -> None:
    """q is off by half a step per channel at most, a score by ``sum_p step_p / 2 * sum_{c in p} |k_c|``; p likewise."""
    pages = codec.encode(*tokens(codec, 2, seed))
    k, v = codec.dense(pages, torch.float64)
    q = torch.randn(4, codec.head_dim, dtype=torch.float64)
    p = torch.rand(4, 2 * codec.page_tokens, dtype=torch.float64) ** 4
    k_sums = k.abs().unflatten(-1, (-1, codec.partition)).sum(-1)  # [T, parts]
    v_sums = v.abs().unflatten(0, (-1, codec.page_tokens)).sum(1)  # [N, D]
    score_bound = range_step(q, codec.partition) / 2 @ k_sums.T
    out_bound = range_step(p, codec.page_tokens) / 2 @ v_sums
    for dtype, slack in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        scores, out = codec.scores(q, pages, EIGHT_BIT, dtype), codec.weigh(p, pages, EIGHT_BIT, dtype)
        # The correction terms are as large as the sums of magnitudes: that is what dtype rounds.
        assert bool(((scores - q @ k.T).abs() <= score_bound + slack * (q.abs() @ k.abs().T + score_bound * 255)).all())
        assert bool(((out - p @ v).abs() <= out_bound + slack * (p @ v.abs() + out_bound * 255)).all())


@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
def test_pages_do_not_depend_on_how_tokens_arrive(rounding: str) -> None:
    codec = HackCodec(64, HackOptions(rounding=rounding, seed=9))
    k, v = tokens(codec, 2, 0, 3)
    at_once = codec.encode(k, v, first_position=128)
    halves = [codec.encode(k[:, i : i + 64], v[:, i : i + 64], first_position=128 + i) for i in (0, 64)]
    assert torch.equal(at_once, torch.cat(halves, 1))
    if rounding == "stochastic":
        assert not torch.equal(at_once, codec.encode(k, v, first_position=64))


def test_the_open_block_shows_the_keys_that_its_page_will_hold() -> None:
    codec = HackCodec(64, HackOptions(seed=1))
    k, v = tokens(codec, 1, 0)
    sealed, _ = codec.dense(codec.encode(k, v, first_position=64))
    for length in (0, 1, 17, 63):
        seen_k, seen_v = codec.see_window(k[:length], v[:length], 64)
        assert torch.equal(seen_k, sealed[:length])
        assert torch.equal(seen_v, v[:length])


def test_seeds_differ_and_repeat() -> None:
    k, v = tokens(HackCodec(64), 1, 0)
    one, again, two = (HackCodec(64, HackOptions(seed=s)).encode(k, v) for s in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, two)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_summation_elimination_stores_the_sums_and_changes_no_score(bits: int, group_size: int) -> None:
    stored = HackCodec(128, HackOptions(group_size=group_size, bits=bits))
    recomputed = HackCodec(128, HackOptions(group_size=group_size, bits=bits, summation_elimination=False))
    k, v = tokens(stored, 2, 5)
    q, p = torch.randn(3, 128), torch.rand(3, 2 * group_size)
    pages, bare = stored.encode(k, v), recomputed.encode(k, v)
    assert torch.equal(bare, pages[:, : recomputed.page_bytes])  # the sums lie last
    assert torch.equal(stored.scores(q, pages), recomputed.scores(q, bare))
    assert torch.equal(stored.weigh(p, pages), recomputed.weigh(p, bare))
    sum_bytes = 1 if group_size * (2**bits - 1) <= 255 else 2
    assert stored.page_bytes - recomputed.page_bytes == (128 // group_size * group_size + 128) * sum_bytes
    wrong = pages.clone()
    wrong[:, recomputed.page_bytes :] = 0
    assert not torch.equal(stored.scores(q, wrong), stored.scores(q, pages))  # the stored sums are the ones in use


@pytest.mark.parametrize(
    ("head_dim", "group_size", "bits", "page_bytes"),
    [
        (64, 64, 2, 2688),
        (128, 32, 2, 3328),
        (128, 64, 2, 5376),
        (128, 128, 2, 9728),
        (64, 128, 2, 5120),
        (128, 64, 4, 9728),
    ],
)
def test_page_bytes(head_dim: int, group_size: int, bits: int, page_bytes: int) -> None:
    codec = HackCodec(head_dim, HackOptions(group_size=group_size, bits=bits))
    parts = math.ceil(head_dim / group_size)
    code_bytes = 2 * group_size * head_dim * bits // 8
    scale_bytes = (group_size * parts + head_dim) * 2 * 2
    k_sum = group_size * parts * (1 if min(group_size, head_dim) * (2**bits - 1) <= 255 else 2)
    v_sum = head_dim * (1 if group_size * (2**bits - 1) <= 255 else 2)
    assert codec.page_bytes == code_bytes + scale_bytes + k_sum + v_sum == page_bytes
    assert codec.page_bytes % 4 == 0


def test_bytes_lie_where_the_documentation_says() -> None:
    codec = HackCodec(64)
    k, v = tokens(codec, 1, 3)
    page = bytes(codec.encode(k, v)[0].tolist())
    k_dense, v_dense = codec.dense(codec.encode(k, v), torch.float64)
    t, c = 13, 42
    k_code = page[t * 16 + c // 4] >> 2 * (c % 4) & 3
    v_code = page[1024 + c * 16 + t // 4] >> 2 * (t % 4) & 3
    k_scale, k_minimum = (struct.unpack_from("<e", page, at + 2 * t)[0] for at in (2048, 2176))
    v_scale, v_minimum = (struct.unpack_from("<e", page, at + 2 * c)[0] for at in (2304, 2432))
    assert k_dense[t, c].item() == k_code * k_scale + k_minimum
    assert v_dense[t, c].item() == v_code * v_scale + v_minimum
    assert page[2560 + t] == sum(page[t * 16 + i // 4] >> 2 * (i % 4) & 3 for i in range(64))
    assert page[2624 + c] == sum(page[1024 + c * 16 + i // 4] >> 2 * (i % 4) & 3 for i in range(64))


@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
def test_errors_accumulate_only_without_requantization_elimination(rounding: str) -> None:
    v = torch.randn(40, 64) * torch.linspace(0.2, 3, 40).unsqueeze(-1)  # a range that keeps growing
    errors = {}
    for eliminate in (True, False):
        codec = HackCodec(64, HackOptions(rounding=rounding, requantization_elimination=eliminate))
        window = v[:0]
        for t in range(len(v)):
            window = codec.requantize_window(torch.cat((window, v[t : t + 1])), 64)
        errors[eliminate] = (window - v).norm().item()
    once = HackCodec(64, HackOptions(rounding=rounding, requantization_elimination=False)).requantize_window(v, 64)
    assert errors[True] == 0
    assert errors[False] > 1.1 * (once - v).norm().item()


def test_the_window_is_untouched_by_default_and_keeps_its_dtype_otherwise() -> None:
    v = torch.randn(2, 5, 64, dtype=torch.bfloat16)
    assert HackCodec(64).requantize_window(v, 0) is v
    lossy = HackCodec(64, HackOptions(requantization_elimination=False)).requantize_window(v, 0)
    assert lossy.dtype == torch.bfloat16
    assert len(lossy[0, :, 0].unique()) <= 4


def test_logit_error_on_gaussian_data() -> None:
    """Pins the quantizer's strength: relative logit error 0.45 (nearest) and 0.64 (stochastic) at 2 bits, Pi 64."""
    for rounding, expected in (("nearest", 0.45), ("stochastic", 0.635)):
        codec = HackCodec(128, HackOptions(rounding=rounding))
        gen = torch.Generator().manual_seed(0)
        k, q = torch.randn(4096, 128, generator=gen), torch.randn(64, 128, generator=gen)
        exact = q @ k.T
        error = (codec.scores(q, codec.encode(k, k)) - exact).norm() / exact.norm()
        assert error.item() == pytest.approx(expected, abs=0.02)


def read_name(name: str) -> HackOptions:
    base, _, tail = name.partition(":")
    assert base == "hack"
    return HackOptions.parse(dict(item.split("=") for item in tail.split(",") if item))


@settings(max_examples=30, deadline=None)
@given(codec=codecs())
def test_names_round_trip(codec: HackCodec) -> None:
    assert read_name(codec.name) == codec.options


def test_names_show_only_what_differs() -> None:
    assert HackOptions().name == "hack"
    assert HackOptions(64, 4, requantization_elimination=False).name == "hack:bits=4,rqe=0"
    full = "hack:pi=32,bits=4,rounding=nearest,seed=7,se=0,rqe=0,prefill=int8"
    assert read_name(full).name == full
    assert read_name("hack:pi=64,bits=2,se=1").name == "hack"
    assert HackCodec(64).layout_id == "hack/1 pi=64 bits=2 se=1 D=64"


@pytest.mark.parametrize(
    "options",
    [
        {"pi": "48"},
        {"bits": "3"},
        {"rounding": "up"},
        {"seed": "-1"},
        {"seed": "4294967296"},
        {"se": "yes"},
        {"group": "32"},
    ],
)
def test_unknown_options_are_refused(options: dict[str, str]) -> None:
    with pytest.raises(FormatError, match=r"expected .*found"):
        HackOptions.parse(options)


def test_options_are_checked_however_they_are_made() -> None:
    with pytest.raises(FormatError, match="group_size"):
        HackOptions(group_size=48)
    with pytest.raises(FormatError, match="summation_elimination"):
        HackOptions(summation_elimination=1)  # type: ignore[arg-type]


@pytest.mark.parametrize(("head_dim", "group_size"), [(80, 64), (96, 64), (72, 128), (0, 64), (8, 32)])
def test_head_dims_that_cannot_be_cut_are_refused(head_dim: int, group_size: int) -> None:
    with pytest.raises(UnsupportedError, match=f"found {head_dim}"):
        HackCodec(head_dim, HackOptions(group_size=group_size))


def test_shapes_are_checked() -> None:
    codec = HackCodec(64)
    with pytest.raises(ShapeError):
        codec.encode(torch.zeros(63, 64), torch.zeros(63, 64))
    with pytest.raises(ShapeError):
        codec.scores(torch.zeros(1, 64), torch.zeros(1, 100, dtype=torch.uint8))


def test_sequence_arithmetic() -> None:
    codec = HackCodec(64)
    assert [codec.num_pages(n) for n in (0, 63, 64, 127, 128)] == [0, 0, 1, 1, 2]
    assert codec.num_exact(127) == 63
    assert codec.kv_bytes(128) == 2 * codec.page_bytes
