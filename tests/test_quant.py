"""The canonical arithmetic of docs/format.md: sums, scales, Hadamard, fits, error diffusion."""

import by_the_book
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from homkv.errors import FormatError
from homkv.quant import (
    code_rows,
    decode_scales,
    encode_scales,
    fit_rows,
    hadamard,
    quantize_keys,
    quantize_values,
    tree_sum,
)
from homkv.spec import RowsSpec
from homkv.testing.inputs import KINDS, make_tokens

ALL_BYTES = torch.arange(256, dtype=torch.uint8)
seeds = st.integers(0, 2**32 - 1)


def rows(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    spread = 10 ** (8 * torch.rand(shape[0], 1, generator=generator) - 6)  # 1e-6 … 100
    return torch.randn(shape, generator=generator) * spread


@given(seed=seeds, n=st.integers(1, 256))
def test_sums_are_taken_in_the_order_of_the_document(seed: int, n: int) -> None:
    x = rows(seed, 1, n)[0]
    assert tree_sum(x).item() == by_the_book.total(list(x.numpy()))


def test_a_sum_of_five_pads_to_eight() -> None:
    big, small = 2.0**24, 1.0
    # (big + small) + ... would lose every small number; halves first add x[0] + x[4], then meet the others.
    assert tree_sum(torch.tensor([big, small, -big, small, small])).item() == 2.0


def test_e5m3_bytes_mean_what_the_document_says() -> None:
    expected = [2.0 ** (byte // 8 - 24) * (1 + byte % 8 / 8) for byte in range(256)]
    assert decode_scales(ALL_BYTES).tolist() == expected
    assert (expected[0], expected[-1]) == (2.0**-24, 240.0)
    assert expected == sorted(set(expected))


@pytest.mark.parametrize("up", [False, True])
def test_every_scale_byte_survives_a_round_trip(up: bool) -> None:
    assert torch.equal(encode_scales(decode_scales(ALL_BYTES), up=up), ALL_BYTES)


@given(st.floats(2.0**-24, 240.0, width=32))
def test_scales_round_to_the_nearest_or_up(scale: float) -> None:
    table = decode_scales(ALL_BYTES).double()
    s = torch.tensor([scale])
    nearest, upper = (int(encode_scales(s, up=up)) for up in (False, True))
    assert abs(table[nearest] - scale) == (table - scale).abs().min()
    assert table[upper] >= scale
    assert upper == 0 or table[upper - 1] < scale


@pytest.mark.parametrize(("scale", "up"), [(240.1, True), (250.0, False), (float("inf"), False), (float("nan"), True)])
def test_scales_beyond_the_range_are_refused(scale: float, up: bool) -> None:
    with pytest.raises(FormatError, match="240"):
        encode_scales(torch.tensor([1.0, scale]), up=up)


@pytest.mark.parametrize("block", [4, 8, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128, 256])
def test_hadamard_is_the_orthonormal_matrix_of_the_document(block: int) -> None:
    matrix = hadamard(torch.eye(block, dtype=torch.float64), block & -block)
    assert np.allclose(matrix.numpy(), by_the_book.rotation(block), atol=1e-15)
    assert torch.allclose(matrix @ matrix, torch.eye(block, dtype=torch.float64), atol=1e-14)


@given(seed=seeds, width=st.sampled_from([16, 20, 24, 40, 48, 64, 128, 256]))
def test_hadamard_adds_in_the_order_of_the_document(seed: int, width: int) -> None:
    x = rows(seed, 1, width)[0]
    assert hadamard(x, width & -width).numpy().tobytes() == by_the_book.rotate(x.numpy()).tobytes()


@given(seed=seeds, width=st.sampled_from([16, 20, 32, 96, 128]), bits=st.sampled_from([2, 4, 8]))
@settings(deadline=None, max_examples=40)
def test_fits_are_those_of_the_document(seed: int, width: int, bits: int) -> None:
    y = rows(seed, 4, width)
    lanes, scales = fit_rows(y, bits)
    for row, lane, scale in zip(y.numpy(), lanes.numpy(), scales.tolist(), strict=True):
        expected_lane, expected_scale = by_the_book.fit(row, bits)
        assert scale == expected_scale
        assert lane.tobytes() == expected_lane.tobytes()


@given(seed=seeds, width=st.sampled_from([16, 32, 64, 128]), bits=st.sampled_from([2, 4]))
@settings(deadline=None, max_examples=40)
def test_fitting_never_costs_more_than_the_first_scale_and_its_rounding(seed: int, width: int, bits: int) -> None:
    """Least squares and best codes each lower the error; rounding the scale by 1/16 adds at most |y|^2 / 256."""
    y = rows(seed, 64, width) + 0.05
    rms = y.square().mean(-1).sqrt()
    first = (rms * float(by_the_book.STEP[bits])).clamp_min(2.0**-24)
    lanes, scales = fit_rows(y, bits)
    square = y.double().square().sum(-1)
    before = (y - code_rows(y, first, bits) * first.unsqueeze(-1)).double().square().sum(-1)
    after = (y - lanes * decode_scales(scales).unsqueeze(-1)).double().square().sum(-1)
    grid = torch.maximum(square / 256, torch.tensor(width * (2.0**-24 * 128) ** 2))  # at the smallest scale: one code
    assert torch.all(after <= before + grid * (1 + 1e-5))


@pytest.mark.parametrize(("bits", "limit"), [(2, 0.1275), (4, 0.0135), (8, 0.0002)])
def test_normal_rows_cost_what_a_uniform_quantizer_costs(bits: int, limit: float) -> None:
    """Relative squared error; the optimum of an unlimited row is 0.1188 at 2 bits and 0.01154 at 4 (Max, 1960)."""
    y = torch.randn(4096, 64)
    lanes, scales = fit_rows(y, bits)
    error = y - lanes * decode_scales(scales).unsqueeze(-1)
    assert float(error.square().sum() / y.square().sum()) < limit


@given(seed=seeds, width=st.sampled_from([16, 20, 128]))
def test_eight_bits_err_by_at_most_half_a_scale(seed: int, width: int) -> None:
    y = rows(seed, 64, width)
    lanes, scales = fit_rows(y, 8)
    scale = decode_scales(scales).unsqueeze(-1)
    assert torch.all((y - lanes * scale).abs() <= scale * (0.5 + 1e-4))
    assert lanes.abs().max() <= 127


def test_codes_are_the_levels_of_the_document() -> None:
    y = torch.linspace(-200, 200, 4001)
    one = torch.tensor(1.0)
    assert code_rows(y, one, 2).unique().tolist() == [-96, -32, 32, 96]
    assert code_rows(y, one, 4).unique().tolist() == list(range(-120, 121, 16))
    assert code_rows(y, one, 8).unique().tolist() == list(range(-127, 128))


@pytest.mark.parametrize("kind", ["normal", "outliers"])
def test_diffusion_makes_errors_of_neighbours_cancel(kind: str) -> None:
    """Summed over a page, errors telescope to (1 - a) of themselves; far below is luck, above is a bug."""
    layout = RowsSpec.parse("k2222v2222").layout(64)
    v = make_tokens(kind, 32, 64, 64)
    with_diffusion, without = (
        float((restored(quantize_values(v, layout, a), 64) - v).sum(-2).square().mean()) for a in (0.25, 0.0)
    )
    assert with_diffusion < 0.75 * without


def restored(classes: list, block: int) -> Tensor:
    (only,) = classes
    return hadamard(only.lanes * decode_scales(only.scales).unsqueeze(-1), block)


def test_the_centre_is_the_mean_in_slot_order() -> None:
    order = torch.randperm(64)
    k = make_tokens("outliers", 64, 64)
    _, centre = quantize_keys(k, order, RowsSpec.parse("small").layout(64))
    assert centre.dtype == torch.float16
    assert torch.allclose(centre.double(), k.double().mean(0)[order], rtol=2**-11, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_no_input_gives_other_levels_or_nan(kind: str, bits: int) -> None:
    lanes, scales = fit_rows(make_tokens(kind, 64, 32), bits)
    if bits < 8:
        assert torch.all(lanes % (2 ** (8 - bits)) == 2 ** (7 - bits))
    assert torch.isfinite(decode_scales(scales)).all()
    assert lanes.abs().max() <= 127


def test_overflow_inside_the_arithmetic_is_refused() -> None:
    layout = RowsSpec.parse("k2222v2222").layout(64)
    huge = torch.full((64, 64), 3e38)
    huge[::2] *= -1
    with pytest.raises(FormatError, match="row scales"):
        quantize_values(huge, layout)
    with pytest.raises(FormatError, match=r"key means|row scales"):
        quantize_keys(huge, torch.arange(64), layout)
