"""Rows pages: bytes and meaning against docs/format.md, error bounds, and the 8-bit products."""

import by_the_book
import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from homkv.errors import FormatError, ShapeError, UnsupportedError
from homkv.formats import UNROUNDED, Rounding
from homkv.formats.rows import RowsCodec
from homkv.page import read_centre, read_rows
from homkv.quant import class_slice, decode_scales
from homkv.spec import DIGITS, FORMAT_VERSION, HEAD_DIMS, PRESETS, ChannelClass, RowsSpec
from homkv.testing.compare import assert_relative
from homkv.testing.inputs import KINDS, make_tokens

NAMES = (*PRESETS, "k4442v4440", "k0248v8420", "k0000v0000")
HALF_STEP = {2: 32, 4: 8, 8: 0.5}
LAST_LEVEL = {2: 96, 4: 120, 8: 127}
digits = st.tuples(*[st.sampled_from(DIGITS)] * 4)
shapes = {"k_digits": digits, "v_digits": digits, "head_dim": st.sampled_from(HEAD_DIMS), "seed": st.integers(0, 999)}


def make(name: str, head_dim: int = 64, seed: int = 0) -> RowsCodec:
    """A codec with a shuffled channel order, so that forgetting it shows."""
    order = torch.randperm(head_dim, generator=torch.Generator().manual_seed(seed)).tolist()
    return RowsCodec(head_dim, RowsSpec.parse(name), order)


def tokens(kind: str, *shape: int) -> tuple[Tensor, Tensor]:
    return make_tokens(kind, *shape, seed=1), make_tokens(kind, *shape, seed=2)


def bytes_of(page: Tensor) -> bytes:
    return page.numpy().tobytes()


# -- tier 0: the bytes ---------------------------------------------------------------------------------------------


@given(**shapes, kind=st.sampled_from(KINDS))
@settings(deadline=None, max_examples=25)
def test_encoding_gives_the_bytes_of_the_document(
    k_digits: tuple, v_digits: tuple, head_dim: int, seed: int, kind: str
) -> None:
    codec = make(RowsSpec(k_digits, v_digits).name, head_dim, seed)
    k, v = tokens(kind, 64, head_dim)
    expected = by_the_book.encode(k.numpy(), v.numpy(), k_digits, v_digits, head_dim, codec.order.numpy())
    assert bytes_of(codec.encode(k, v)[0]) == expected


@given(**shapes)
@settings(deadline=None, max_examples=25)
def test_any_bytes_mean_what_the_document_says(k_digits: tuple, v_digits: tuple, head_dim: int, seed: int) -> None:
    codec = make(RowsSpec(k_digits, v_digits).name, head_dim, seed)
    random = np.random.default_rng(seed)
    page = random.integers(0, 256, codec.page_bytes, dtype=np.uint8)
    at = codec.layout.centre_offset
    page[at : at + 2 * head_dim] = np.frombuffer(random.normal(size=head_dim).astype("<f2").tobytes(), np.uint8)
    expected = by_the_book.decode(page, k_digits, v_digits, head_dim, codec.order.tolist())
    for found, x in zip(codec.dense(torch.from_numpy(page)[None], torch.float64), expected, strict=True):
        assert_relative(found, torch.from_numpy(x), 1e-13)


GOLDEN = {
    ("small", 64): "f2fe3d0d25492761",
    ("balanced", 64): "49642a37d3894d9b",
    ("balanced", 96): "1897fc06f459df3e",
    ("balanced", 128): "45d92bf1c66df450",
    ("quality", 128): "55a3e720903ee5cc",
    ("near-lossless", 80): "e1ba885a292a7514",
    ("int8", 256): "cb4106c1b52bc46b",
}


def golden_tokens(head_dim: int) -> tuple[Tensor, Tensor]:
    """Integers over 32 by integer arithmetic: the same on any machine, exact in fp16."""
    t, c = torch.arange(64).unsqueeze(1), torch.arange(head_dim)
    k = (t * t * 37 + c * 101 + t * c * 13) % 251 - 125 + c % 7 * 128
    v = (t * 59 + c * c * 29 + t * c * 7) % 241 - 120
    return k / 32, v / 32


@pytest.mark.parametrize(("name", "head_dim"), GOLDEN)
def test_the_bytes_never_change_within_a_version(name: str, head_dim: int) -> None:
    assert FORMAT_VERSION == 1, "a new version: compute the digests anew"
    page = RowsCodec(head_dim, RowsSpec.parse(name)).encode(*golden_tokens(head_dim))
    found = xxhash.xxh3_64_hexdigest(bytes_of(page))
    assert found == GOLDEN[name, head_dim], "the page's bytes changed: raise FORMAT_VERSION"


@pytest.mark.parametrize("name", NAMES)
def test_pages_do_not_depend_on_what_is_encoded_with_them(name: str) -> None:
    codec = make(name)
    k, v = tokens("outliers", 2, 3 * 64, 64)
    together = codec.encode(k, v)
    assert together.shape == (2, 3, codec.page_bytes)
    for head in range(2):
        for n in range(3):
            at = slice(64 * n, 64 * n + 64)
            assert torch.equal(codec.encode(k[head, at], v[head, at])[0], together[head, n])


def test_strides_do_not_matter() -> None:
    codec = make("balanced", 96)
    k, v = (x.to(torch.float16) for x in tokens("normal", 2, 128, 96))
    expected = codec.encode(k, v)
    strided = [torch.stack((x, x + 1), -1).transpose(0, 1).contiguous().transpose(0, 1)[..., 0] for x in (k, v)]
    assert not strided[0].is_contiguous()
    assert torch.equal(codec.encode(*strided), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_dtype_does_not_matter_where_values_are_equal(dtype: torch.dtype) -> None:
    codec = make("quality")
    k, v = (x.to(torch.bfloat16).float() for x in tokens("normal", 64, 64))
    assert torch.equal(codec.encode(k.to(dtype), v.to(dtype)), codec.encode(k, v))


# -- tier 3: proven bounds -----------------------------------------------------------------------------------------


def row_bound(y: Tensor, scales: Tensor, bits: int) -> Tensor:
    """``|y - scale * lane|``: half a step inside the levels, the distance to the last level outside; float32 slack."""
    s = decode_scales(scales, torch.float64).unsqueeze(-1)
    return torch.maximum(s * HALF_STEP[bits], y.abs() - s * LAST_LEVEL[bits]) + 1e-5 * (y.abs() + s)


def unrotated(bound: Tensor, cls: ChannelClass) -> Tensor:
    """An element of ``H^T e`` is at most ``sum |e| / sqrt(block)`` over its block."""
    block = cls.hadamard_block
    blocks = bound.unflatten(-1, (-1, block))
    return blocks.sum(-1, keepdim=True).expand_as(blocks).flatten(-2) / block**0.5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["balanced", "near-lossless", "k4842v8240"])
def test_no_key_errs_by_more_than_its_bound(name: str, kind: str) -> None:
    codec = make(name, 80)
    k, v = tokens(kind, 64, 80)
    page = codec.encode(k, v)
    slots, found = k.double()[:, codec.order], codec.dense(page, torch.float64)[0][:, codec.order]
    centre = read_centre(page[0], codec.layout).double()
    assert torch.all((centre - slots.mean(0)).abs() <= slots.mean(0).abs() * 2**-10 + slots.abs().max() * 1e-6 + 2**-24)
    error = (found - slots).abs()
    for cls in codec.layout.k_classes:
        at = slice(cls.start, cls.stop)
        y = class_slice(slots - centre, cls)
        bound = unrotated(row_bound(y, read_rows(page[0], cls, is_key=True).scales, cls.bits), cls)
        assert torch.all(error[:, at] <= bound + 1e-6 * slots.abs().max())
        error[:, at] = 0
    dropped = error.sum(0) > 0
    assert torch.equal(found[:, dropped], centre[dropped].expand(64, -1))  # 0 bits: the centre stands for them


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["balanced", "near-lossless", "k4842v8240"])
def test_no_value_errs_by_more_than_its_bound(name: str, kind: str) -> None:
    """``x_t - found_t = e_t - a e_(t-1)``, and each e is a row's own error."""
    codec = make(name, 80)
    k, v = tokens(kind, 64, 80)
    page = codec.encode(k, v)
    found = codec.dense(page, torch.float64)[1]
    for cls in codec.layout.v_classes:
        x, stored = class_slice(v.double(), cls), class_slice(found, cls)
        scales = read_rows(page[0], cls, is_key=False).scales
        e, before = torch.zeros(cls.width, dtype=torch.float64), torch.zeros(cls.width, dtype=torch.float64)
        for t in range(64):
            y = x[t] + 0.25 * e
            bound = row_bound(y, scales[t], cls.bits)
            error = (found[t] - v[t].double())[cls.start : cls.stop].abs()
            assert torch.all(error <= unrotated(bound + 0.25 * before, cls) + 1e-5 * v.abs().max())
            e, before = y - stored[t], bound
    covered = {slot for cls in codec.layout.v_classes for slot in range(cls.start, cls.stop)}
    assert not found[:, [c for c in range(80) if c not in covered]].any()


# -- refused -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("which", ["k", "v"])
def test_values_that_are_not_finite_are_refused(which: str, value: float) -> None:
    x = dict(zip("kv", tokens("normal", 128, 64), strict=True))
    x[which][77, 5] = value
    with pytest.raises(FormatError, match="finite"):
        make("small").encode(x["k"], x["v"])


@pytest.mark.parametrize("name", ["balanced", "int8"])
@pytest.mark.parametrize("factor", [1e5, 1e25])
def test_rows_beyond_the_largest_scale_are_refused(name: str, factor: float) -> None:
    k, v = tokens("normal", 64, 64)
    for pair in ((k * factor, v), (k, v * factor)):
        with pytest.raises(FormatError, match="fp16"):
            make(name).encode(*pair)


def test_means_beyond_fp16_are_refused() -> None:
    k, v = tokens("normal", 64, 64)
    with pytest.raises(FormatError, match="65504"):
        make("balanced").encode(k + 7e4, v)


def test_wrong_shapes_are_refused() -> None:
    codec = make("balanced")
    good = torch.zeros(64, 64)
    for k, v in [(good[:63], good[:63]), (good, torch.zeros(128, 64)), (torch.zeros(64, 32), torch.zeros(64, 32))]:
        with pytest.raises(ShapeError, match="whole pages"):
            codec.encode(k, v)
    for pages in (torch.zeros(1, codec.page_bytes + 64, dtype=torch.uint8), torch.zeros(1, codec.page_bytes)):
        with pytest.raises(ShapeError, match="another format"):
            codec.dense(pages)
    with pytest.raises(ShapeError, match="permutation"):
        RowsCodec(64, RowsSpec.parse("small"), [0] * 64)
    with pytest.raises(UnsupportedError, match="head_dim"):
        RowsCodec(48, RowsSpec.parse("small"))


# -- the 8-bit products --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head_dim", [64, 96])
def test_rounded_scores_stay_within_half_a_query_step(head_dim: int, kind: str) -> None:
    """``|score - exact| <= sum_class k_scale[t] * q_scale / 2 * sum |lane[t]|``."""
    codec = make("k8420v2222", head_dim)
    pages = codec.encode(*tokens(kind, 128, head_dim))
    q = make_tokens("outliers", 5, head_dim, seed=3).double()
    exact, rounded = (codec.scores(q, pages, r, torch.float64) for r in (UNROUNDED, Rounding(p=False)))
    bound = torch.zeros_like(exact)
    for cls in codec.layout.k_classes:
        rows = read_rows(pages, cls, is_key=True)
        q_scale = class_slice(q[:, codec.order], cls).abs().amax(-1, keepdim=True) / 127
        reach = decode_scales(rows.scales, torch.float64) * rows.lanes.double().abs().sum(-1)
        bound += q_scale / 2 * reach.flatten()
    error = (rounded - exact).abs()
    assert torch.all(error <= bound * (1 + 1e-12))
    assert error.max() > 0  # the queries really were rounded


@pytest.mark.parametrize("kind", KINDS)
def test_rounded_outputs_stay_within_half_a_weight_step(kind: str) -> None:
    """``|o - exact| <= H^T (sum_pages max(p v_scale) / 510 * sum_t |lane[t]|)``, by absolute values."""
    codec = make("k2222v4420", 64)
    pages = codec.encode(*tokens(kind, 192, 64))
    p = torch.softmax(3 * torch.randn(4, 192, dtype=torch.float64), -1)
    exact, rounded = (codec.weigh(p, pages, r, torch.float64) for r in (UNROUNDED, Rounding(q=False)))
    for cls in codec.layout.v_classes:
        rows = read_rows(pages, cls, is_key=False)
        weights = p.unflatten(-1, (3, 64)) * decode_scales(rows.scales, torch.float64)
        steps = weights.amax(-1) / 255
        bound = (steps.unsqueeze(-1) / 2 * rows.lanes.double().abs().sum(-2)).sum(-2)
        at = slice(cls.start, cls.stop)
        error = (rounded - exact)[:, at].abs()
        assert torch.all(error <= unrotated(bound, cls) * (1 + 1e-12))
        assert error.max() > 0


def test_queries_and_weights_that_eight_bits_hold_are_not_changed() -> None:
    codec = make("k4444v2222")
    pages = codec.encode(*tokens("outliers", 128, 64))
    (key_class,), (value_class,) = codec.layout.k_classes, codec.layout.v_classes
    integers = torch.randint(-127, 128, (5, 64)).double()
    integers[:, 7] = 127
    q = torch.empty_like(integers)
    q[:, codec.order] = class_slice(integers, key_class)
    assert_relative(
        codec.scores(q, pages, dtype=torch.float64), codec.scores(q, pages, UNROUNDED, torch.float64), 1e-12
    )
    integers = torch.randint(0, 256, (5, 2, 64)).double()
    integers[..., 9] = 255
    scales = decode_scales(read_rows(pages, value_class, is_key=False).scales, torch.float64)
    p = (integers / scales).flatten(1)
    assert_relative(codec.weigh(p, pages, dtype=torch.float64), codec.weigh(p, pages, UNROUNDED, torch.float64), 1e-12)


def test_weights_that_underflow_do_no_harm() -> None:
    """Softmax weights of a far page are subnormal float32; 255 / max would be infinite."""
    codec = make("balanced")
    pages = codec.encode(*tokens("normal", 128, 64))
    p = torch.full((1, 128), 1e-42)
    p[:, 64:] = 1 / 64
    without = codec.weigh(p[:, 64:], pages[1:])
    assert_relative(codec.weigh(p, pages), without, 1e-6)


def test_subnormal_queries_do_no_harm() -> None:
    codec = make("balanced")
    pages = codec.encode(*tokens("normal", 64, 64))
    q = torch.randn(3, 64)
    assert torch.all(codec.scores(q * 1e-42, pages).abs() < 1e-28)
    assert torch.equal(codec.scores(q * 0, pages), torch.zeros(3, 64))
