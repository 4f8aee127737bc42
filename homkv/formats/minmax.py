"""Asymmetric min-max quantization and the product of quantized operands: the algebra of HACK.

    x ~ scale * code + minimum,   scale = (max - min) / (2^bits - 1),   minimum = min     per partition

An operand is a matrix whose inner dimension (the one a product sums over) is cut into partitions.
Source: arXiv 2502.03589 v1, Eq. 3. Bytes: docs/hack.md.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from homkv.errors import FormatError
from homkv.formats.meter import OVERHEAD
from homkv.quant import require_finite

SMALLEST_SCALE = 2.0**-24  # smallest positive fp16: a constant partition keeps a divisor
EIGHT_BIT_LEVELS = 255
MASK32 = (1 << 32) - 1
# float32 holds every integer up to 2^24, and 255 * 255 * 256 < 2^24: its matmul is the exact int32 dot product.
MAX_PARTITION = 256


def cut(x: Tensor, dim: int, size: int) -> Tensor:
    """Cut a dimension into blocks: ``[..., n * size, ...]`` to ``[..., n, size, ...]``."""
    return torch.unflatten(x, dim, (-1, size))


def affine(code: Tensor, scale: Tensor, minimum: Tensor, dtype: torch.dtype) -> Tensor:
    """``scale * code + minimum``: ``code [..., size]``, ``scale minimum [...]``."""
    return code.to(dtype) * scale.to(dtype).unsqueeze(-1) + minimum.to(dtype).unsqueeze(-1)


@dataclass(frozen=True)
class Operand:
    """One side of a product: ``x[r, p, i] ~ scale[r, p] * code[r, p, i] + minimum[r, p]``.

    ``code [..., R, parts, size]``: uint8, or the values themselves for an operand that is not rounded;
    ``scale minimum code_sum [..., R, parts]``, ``code_sum = sum_i code``.
    """

    code: Tensor
    scale: Tensor
    minimum: Tensor
    code_sum: Tensor

    def rows(self, start: int, stop: int) -> "Operand":
        """Rows ``start..stop-1``."""
        row = slice(start, stop)
        return Operand(
            self.code[..., row, :, :], self.scale[..., row, :], self.minimum[..., row, :], self.code_sum[..., row, :]
        )

    def part(self, index: int) -> "Operand":
        """One partition of every row."""
        at = slice(index, index + 1)
        return Operand(self.code[..., at, :], self.scale[..., at], self.minimum[..., at], self.code_sum[..., at])

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The values that the codes stand for, ``[..., R, parts, size]``."""
        return affine(self.code, self.scale, self.minimum, dtype)


def homomorphic_product(a: Operand, b: Operand, dtype: torch.dtype) -> Tensor:
    """``A B^T`` on codes, ``[..., Ra, Rb]``.

    ``sum over partitions of  sA sB (a' . b')  +  mB sA sum(a')  +  mA sB sum(b')  +  size mA mB``

    The dot products of codes are exact integers (int32); scales and corrections are computed in ``dtype``.
    Equal to the product of ``a.dense`` and ``b.dense`` up to rounding in ``dtype``. Source: arXiv 2502.03589, Eq. 3.
    """
    acc = _partition_dots(a.code, b.code, dtype)  # [..., parts, Ra, Rb]
    a_scale, a_minimum, a_sum = (x.to(dtype).transpose(-1, -2).unsqueeze(-1) for x in (a.scale, a.minimum, a.code_sum))
    b_scale, b_minimum, b_sum = (x.to(dtype).transpose(-1, -2).unsqueeze(-2) for x in (b.scale, b.minimum, b.code_sum))
    with OVERHEAD.running():
        correction = b_minimum * (a_scale * a_sum) + a_minimum * (b_scale * b_sum + a.code.shape[-1] * b_minimum)
    return (a_scale * b_scale * acc + correction).sum(-3)


def _partition_dots(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """``acc[p, i, j] = a[i, p] . b[j, p]``: exact int32 for codes, in ``dtype`` for an operand that is not rounded."""
    whole = not a.is_floating_point()
    assert a.shape[-1] <= MAX_PARTITION
    exact = torch.float32 if whole else dtype
    acc = a.to(exact).transpose(-2, -3) @ b.to(exact).movedim(-3, -1)
    return acc.to(torch.int32).to(dtype) if whole else acc


def quantize(x: Tensor, bits: int, noise: Tensor | None = None) -> Operand:
    """Quantize partitions ``x [..., R, parts, size]`` for storage: fp16 scale and minimum, codes of ``bits`` bits.

    The codes are computed against the scale and minimum as stored, so that the products see no further error.
    ``noise``: uniform in [0, 1), broadcast against x, rounds stochastically (``floor(u) + (noise < u - floor(u))``,
    unbiased inside the range); None rounds to nearest even. ``|x - dense|`` is at most one scale (stochastic) or half
    (nearest), or what fp16 took from the range: ``|min - minimum|`` and ``levels * |s - scale|``.
    Raises FormatError for values that are not finite or a range that fp16 cannot hold.
    """
    x = x.to(torch.float32)
    levels = (1 << bits) - 1
    minimum = x.amin(-1).to(torch.float16)
    scale = ((x.amax(-1) - minimum.float()) / levels).clamp_min(SMALLEST_SCALE).to(torch.float16)
    if not bool((torch.isfinite(minimum) & torch.isfinite(scale)).all()):  # one look: each waits for a GPU's queue
        require_finite(x, "keys and values")
        raise FormatError(
            f"expected a partition's minimum and (max - min) / {levels} within fp16 (65504), found values from "
            f"{float(x.min()):.4g} to {float(x.max()):.4g}; use --kv-cache-dtype bf16"
        )
    u = (x - minimum.float().unsqueeze(-1)) / scale.float().unsqueeze(-1)
    if noise is None:
        u = u.round()
    else:
        floor = u.floor()
        u = floor + (noise < u - floor)
    code = u.clamp(0, levels).to(torch.uint8)
    return Operand(code, scale, minimum, code.sum(-1, dtype=torch.int32))


def quantize_eight_bit(x: Tensor) -> Operand:
    """Round queries or softmax weights ``[..., R, parts, size]`` to 8 bits for one product; nothing is stored.

    Scale and minimum keep x's dtype (float32 or float64). Rounds to nearest: ``|x - dense| <= scale / 2``.
    A constant partition is exact (code 0, minimum = its value).
    """
    minimum = x.amin(-1)
    scale = (x.amax(-1) - minimum) / EIGHT_BIT_LEVELS
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    u = ((x - minimum.unsqueeze(-1)) / scale.unsqueeze(-1)).round()
    code = u.clamp(0, EIGHT_BIT_LEVELS).to(torch.uint8)
    return Operand(code, scale, minimum, code.sum(-1, dtype=torch.int32))


def unrounded(x: Tensor) -> Operand:
    """Values ``[..., R, parts, size]`` as an operand of its own: scale 1, minimum 0."""
    one = torch.ones((), dtype=x.dtype, device=x.device).expand(x.shape[:-1])
    return Operand(x, one, torch.zeros_like(one), x.sum(-1))


def without_scale(code: Tensor, code_sum: Tensor) -> Operand:
    """Codes ``[..., R, parts, size]`` with the scale folded into the other operand and the minimum added apart."""
    one = torch.ones((), dtype=torch.float32, device=code.device).expand(code_sum.shape)
    return Operand(code, one, torch.zeros_like(one), code_sum)


def _mix(x: Tensor) -> Tensor:
    """Hash of 32-bit integers held in int64 (lowbias32, Wellons 2018): every input bit flips half the output bits.

    The second factor is written minus 2^32, the same modulo 2^32, so that no product leaves int64.
    """
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & MASK32
    x = ((x ^ (x >> 15)) * (0x846CA68B - (1 << 32))) & MASK32
    return x ^ (x >> 16)


def uniform_noise(
    seed: int,
    stream: int,
    first_position: int,
    num_tokens: int,
    num_channels: int,
    device: torch.device | None = None,
) -> Tensor:
    """Uniform numbers in [0, 1), ``[T, D] float32``, a pure function of (seed, stream, position, channel).

    24 bits of a counter-based hash, so any split of a sequence into calls draws the same numbers, on any machine.
    All heads and layers draw the same ones. ``seed`` and ``stream`` are taken modulo 2^32. ``device``: where to.
    """
    position = torch.arange(first_position, first_position + num_tokens, dtype=torch.int64, device=device).unsqueeze(-1)
    channel = torch.arange(num_channels, dtype=torch.int64, device=device)
    key = _mix(_mix(torch.tensor(seed & MASK32, device=device)) ^ (stream & MASK32))
    bits = _mix(_mix(key ^ (position & MASK32)) ^ channel)
    return (bits >> 8).to(torch.float32) * 2.0**-24
