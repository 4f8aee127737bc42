"""The min-max quantizer, its noise, its product and the record that holds it."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from homkv.errors import FormatError
from homkv.formats.minmax import (
    MAX_PARTITION,
    SMALLEST_SCALE,
    Operand,
    homomorphic_product,
    quantize,
    quantize_eight_bit,
    uniform_noise,
    unrounded,
)
from homkv.formats.record import PageRecord, Section, codes, pack, sums, unpack

BITS = (2, 4, 8)


def rounding_bound(x: Tensor, stored: Operand, bits: int, steps: float) -> Tensor:
    """Largest error of one element, proved.

    Inside the stored range rounding costs ``steps`` scales (1 stochastic, 1/2 nearest). Below it the element becomes
    the minimum, which fp16 moved by at most 2^-11 of itself (2^-25 where fp16 is subnormal); above it the element
    becomes minimum + levels * scale, and fp16 moved the scale likewise. A scale raised to the smallest fp16 moves
    nothing out of the range. The last term covers u = (x - minimum) / scale in float32: 2^-22 of u, u <= levels + 1.
    """
    levels = (1 << bits) - 1
    scale, minimum = stored.scale.double(), stored.minimum.double()
    fp16_minimum = minimum.abs() * 2.0**-10 + 2.0**-24
    fp16_top = levels * (scale * 2.0**-10 + 2.0**-24)
    return torch.maximum(steps * scale, torch.maximum(fp16_minimum, fp16_top)) + scale * (levels + 1) * 2.0**-22


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from(BITS),
    stochastic=st.booleans(),
    exponent=st.floats(-7, 4),
    offset=st.floats(-3, 3),
    seed=st.integers(0, 2**31),
)
def test_error_is_within_the_proved_bound(
    bits: int, stochastic: bool, exponent: float, offset: float, seed: int
) -> None:
    gen = torch.Generator().manual_seed(seed)
    x = (torch.randn(8, 3, 32, generator=gen) + offset) * 10**exponent
    noise = torch.rand(8, 3, 32, generator=gen) if stochastic else None
    stored = quantize(x, bits, noise)
    error = (stored.dense(torch.float64) - x.double()).abs()
    assert bool((error <= rounding_bound(x, stored, bits, 1 if stochastic else 0.5).unsqueeze(-1)).all())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("value", [0.0, 1.0, -3.14159, 65504.0, -65504.0, 1e-8, -6e-8, 150.03])
def test_a_constant_partition_keeps_its_value(bits: int, value: float) -> None:
    x = torch.full((1, 1, 64), value)
    for noise in (None, torch.full_like(x, 0.999)):
        stored = quantize(x, bits, noise)
        assert bool((stored.scale >= SMALLEST_SCALE).all())
        assert bool(((stored.dense(torch.float64) - x.double()).abs() <= abs(value) * 2.0**-10 + 2.0**-23).all())


def test_a_range_below_fp16_keeps_a_positive_scale() -> None:
    x = torch.tensor([[[0.0, 1e-9, 3e-9, 2e-9]]])
    stored = quantize(x, 2)
    assert stored.scale.item() == SMALLEST_SCALE
    assert bool(torch.isfinite(stored.dense(torch.float32)).all())


@pytest.mark.parametrize("bad", [[0.0, math.nan], [0.0, math.inf], [-7e4, 0.0], [0.0, 7e5]])
def test_what_fp16_cannot_hold_is_refused(bad: list[float]) -> None:
    with pytest.raises(FormatError, match=r"expected .* found"):
        quantize(torch.tensor([[bad]]), 2)


@pytest.mark.parametrize("bits", BITS)
def test_stochastic_rounding_is_unbiased(bits: int) -> None:
    num_draws = 4096
    x = torch.randn(1, 64)
    stored = quantize(x.expand(num_draws, 1, 64), bits, uniform_noise(3, 0, 0, num_draws, 64).unsqueeze(1))
    mean = stored.dense(torch.float64).mean(0)
    # A draw deviates by at most half a scale (standard deviation), so 6 of its standard errors; fp16 moves the ends.
    scale = stored.scale[0].double().unsqueeze(-1)
    allowed = 6 * (scale / 2) / math.sqrt(num_draws) + x.abs().max().double() * 2.0**-10
    assert bool(((mean - x.double()).abs() <= allowed).all())
    nearest = quantize(x.unsqueeze(0), 2).dense(torch.float64) - x.double()
    assert bool((nearest.abs().max() > 0.2 * quantize(x.unsqueeze(0), 2).scale.double()).all())  # the check can fail


def plain_hash(x: int) -> int:
    """lowbias32 in plain integers."""
    x = (x ^ (x >> 16)) * 0x7FEB352D % 2**32
    x = (x ^ (x >> 15)) * 0x846CA68B % 2**32
    return x ^ (x >> 16)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    stream=st.integers(0, 200),
    position=st.integers(0, 2**31),
    channel=st.integers(0, 9),
)
def test_noise_is_the_documented_hash(seed: int, stream: int, position: int, channel: int) -> None:
    got = uniform_noise(seed, stream, position, 3, channel + 1)[1, channel]
    want = plain_hash(plain_hash(plain_hash(plain_hash(seed) ^ stream) ^ (position + 1)) ^ channel)
    assert got.item() == (want >> 8) / 2**24


def test_noise_is_uniform_and_differs_by_seed_stream_and_position() -> None:
    noise = uniform_noise(7, 0, 0, 1024, 128)
    assert bool((noise >= 0).all())
    assert bool((noise < 1).all())
    counts = torch.histc(noise, bins=64, min=0, max=1)
    expected = noise.numel() / 64
    assert ((counts - expected) ** 2 / expected).sum() < 63 + 6 * math.sqrt(2 * 63)  # chi-square, 6 deviations
    for other in (
        uniform_noise(8, 0, 0, 1024, 128),
        uniform_noise(7, 1, 0, 1024, 128),
        uniform_noise(7, 0, 1, 1024, 128),
    ):
        correlation = torch.corrcoef(torch.stack((noise.flatten(), other.flatten())))[0, 1]
        assert abs(correlation.item()) < 6 / math.sqrt(noise.numel())


def test_eight_bit_operands_err_by_half_a_scale_and_keep_constants() -> None:
    x = torch.randn(5, 2, 64, dtype=torch.float64) * torch.logspace(-30, 10, 5, dtype=torch.float64)[:, None, None]
    x[0] = 0.3
    rounded = quantize_eight_bit(x)
    assert bool(((rounded.dense(torch.float64) - x).abs() <= rounded.scale.unsqueeze(-1) * (0.5 + 1e-9)).all())
    assert torch.equal(rounded.dense(torch.float64)[0], x[0])


@settings(max_examples=40, deadline=None)
@given(
    bits=st.sampled_from(BITS),
    parts=st.integers(1, 4),
    size=st.sampled_from((16, 32, 80, 128)),
    rows=st.integers(1, 5),
    seed=st.integers(0, 2**31),
)
def test_the_product_on_codes_is_the_product_of_dense_operands(
    bits: int, parts: int, size: int, rows: int, seed: int
) -> None:
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(2, rows, parts, size, generator=gen, dtype=torch.float64) * 5 + 1
    y = quantize(torch.randn(2, 7, parts, size, generator=gen) - 2, bits)
    for a in (quantize_eight_bit(x), unrounded(x)):
        want = a.dense(torch.float64).flatten(-2) @ y.dense(torch.float64).flatten(-2).transpose(-1, -2)
        magnitude = a.dense(torch.float64).abs().flatten(-2) @ y.dense(torch.float64).abs().flatten(-2).transpose(
            -1, -2
        )
        assert bool(((homomorphic_product(a, y, torch.float64) - want).abs() <= 1e-12 * magnitude).all())


def test_the_largest_accumulator_is_exact() -> None:
    full = Operand(
        torch.full((1, 1, MAX_PARTITION), 255, dtype=torch.uint8),
        *(torch.ones(1, 1), torch.zeros(1, 1), torch.ones(1, 1)),
    )
    odd = full.code.clone()
    odd[..., 0] = 254
    assert homomorphic_product(full, full, torch.float64).item() == 255 * 255 * MAX_PARTITION
    other = Operand(odd, full.scale, full.minimum, full.code_sum)
    assert homomorphic_product(full, other, torch.float64).item() == 255 * 255 * MAX_PARTITION - 255


@pytest.mark.parametrize("bits", BITS)
def test_codes_survive_packing(bits: int) -> None:
    code = torch.randint(0, 1 << bits, (3, 5, 64), dtype=torch.uint8)
    packed = pack(code, bits)
    assert packed.shape == (3, 5, 64 * bits // 8)
    assert torch.equal(unpack(packed, bits), code)
    per_byte = 8 // bits
    assert packed[0, 0, 0].item() == sum(int(code[0, 0, i]) << bits * i for i in range(per_byte))


def test_sums_take_the_smallest_type_that_holds_them() -> None:
    assert sums("s", (4,), 64, 2).dtype == torch.uint8  # 192
    assert sums("s", (4,), 80, 2).dtype == torch.uint8  # 240
    assert sums("s", (4,), 96, 2).dtype == torch.int16  # 288
    assert sums("s", (4,), 32, 4).dtype == torch.int16  # 480
    assert sums("s", (4,), 128, 8).dtype == torch.int16  # 32,640


def test_a_record_reads_back_what_it_wrote_at_any_offset() -> None:
    record = PageRecord(
        [codes("c", 4, 16, 2), Section("x", (4, 2), torch.float16), sums("s", (4,), 128, 8), sums("t", (4,), 4, 2)]
    )
    assert record.num_bytes == 16 + 16 + 8 + 4
    fields = {
        "c": torch.randint(0, 4, (3, 4, 16), dtype=torch.uint8),
        "x": torch.randn(3, 4, 2, dtype=torch.float16),
        "s": torch.tensor([0, 1, 255, 32640]).expand(3, 4),
        "t": torch.tensor([0, 1, 2, 12]).expand(3, 4),
    }
    pages = record.write(fields)
    crooked = torch.empty(3, record.num_bytes + 1, dtype=torch.uint8)[:, 1:]  # an odd address
    crooked.copy_(pages)
    for name, value in fields.items():
        assert torch.equal(record.read(crooked, name), value.to(record.read(pages, name).dtype))
