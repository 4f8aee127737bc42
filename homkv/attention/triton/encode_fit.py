"""Rows to codes and scales in registers: the arithmetic of docs/format.md in its order, so that every byte agrees.

A **row** is one token's channels of a class. LANES threads share it: channel ``j * LANES + lane`` is tensor j of a
tuple of tensors ``[N]``, a number per thread. The format's sums halve a row from the top, so all but the last few
additions are between registers of one thread, and no channel ever moves. What belongs to a row is the same in all its
lanes.

Kernels that use this must be launched with ``enable_fp_fusion=False``. Where one rounding instead of two gives the
same number (a product with a power of two, or of few bits) the code says ``tl.fma``.
"""

import triton
import triton.language as tl

from homkv.attention.triton.lanes import MAGIC, USE_PTX
from homkv.attention.triton.threads import add_lanes, log2, max_lanes
from homkv.quant import SMALLEST_SCALE, STEP

SMALLEST = tl.constexpr(SMALLEST_SCALE)
STEP_2 = tl.constexpr(STEP[2])
STEP_4 = tl.constexpr(STEP[4])
# Whether a code has the larger of the two magnitudes: u >= 64 or u < -64, as 1.0 or 0.0. Rounding u + 2**-19 towards
# zero moves -64 itself below 64 and nothing else across.
_OUTER = "{.reg .f32 t; add.rz.f32 t, $1, 0f36000000; abs.f32 t, t; set.ge.f32.f32 $0, t, 0f42800000;}"
OUTER = tl.constexpr(_OUTER)


# Correctly rounded for the numbers that occur here, neither tiny nor huge: what the compiler would emit, without its
# branches for other numbers. Others give something else, and the scale they lead to is refused.
_RECIPROCAL = """{.reg .f32 r, e, n; rcp.approx.ftz.f32 r, $1; neg.f32 n, $1;
    fma.rn.f32 e, n, r, 0f3F800000; fma.rn.f32 $0, r, e, r;}"""
_ROOT = """{.reg .f32 r, g, h, n, e; rsqrt.approx.ftz.f32 r, $1; mul.rn.f32 g, $1, r; mul.rn.f32 h, r, 0f3F000000;
    neg.f32 n, g; fma.rn.f32 e, n, g, $1; fma.rn.f32 $0, e, h, g;}"""
_QUOTIENT = """{.reg .f32 r, e, n, q; rcp.approx.ftz.f32 r, $2; neg.f32 n, $2; fma.rn.f32 e, n, r, 0f3F800000;
    fma.rn.f32 r, r, e, r; mul.rn.f32 q, $1, r; fma.rn.f32 e, n, q, $1; fma.rn.f32 q, r, e, q;
    fma.rn.f32 e, n, q, $1; fma.rn.f32 $0, r, e, q;}"""
RECIPROCAL = tl.constexpr(_RECIPROCAL)
ROOT = tl.constexpr(_ROOT)
QUOTIENT = tl.constexpr(_QUOTIENT)


# -- rotation ------------------------------------------------------------------------------------------------------


@triton.jit
def rotate_lanes(x, lane, LANES: tl.constexpr):
    """The butterflies whose partners would be other lanes: ``x`` holds every channel in each lane, and each lane keeps
    its own results, one of LANES."""
    for level in tl.static_range(log2(LANES)):
        sign = (1 - 2 * ((lane >> level) & 1)).to(tl.float32)
        out = ()
        for j in tl.static_range(len(x) // 2):
            out = out + (tl.fma(x[2 * j + 1], sign, x[2 * j]),)
        x = out
    return x


@triton.jit
def butterfly(x, HALF: tl.constexpr):
    """Butterflies between tensors HALF apart."""
    out = ()
    for j in tl.static_range(len(x)):
        out = out + ((x[j - HALF] - x[j],) if j & HALF else (x[j] + x[j + HALF],))
    return out


@triton.jit
def rotate(x, lane, LANES: tl.constexpr, BLOCK: tl.constexpr):
    """Orthonormal Hadamard transform of blocks of BLOCK channels, of which ``x`` holds every one in each lane."""
    x = rotate_lanes(x, lane, LANES)
    for level in tl.static_range(log2(BLOCK // LANES)):
        x = butterfly(x, 1 << level)
    scale = tl.full(x[0].shape, BLOCK**-0.5, tl.float32)
    scaled = ()
    for j in tl.static_range(len(x)):
        # Adding zero costs nothing here and leaves no negative zero, whose sign would count.
        scaled = scaled + (tl.fma(x[j], scale, 0.0),)
    return scaled


# -- sums ----------------------------------------------------------------------------------------------------------


@triton.jit
def fold(x, HALF: tl.constexpr):
    """Tensors added to those HALF before them."""
    out = ()
    for j in tl.static_range(min(len(x), HALF)):
        out = out + ((x[j] + x[j + HALF],) if j + HALF < len(x) else (x[j],))
    return out


@triton.jit
def tree_sum(x, LANES: tl.constexpr):
    """The format's sum of every row: halves are added until one is left; a missing partner is zero."""
    SIZE: tl.constexpr = triton.next_power_of_2(len(x))
    for level in tl.static_range(log2(SIZE)):
        x = fold(x, SIZE >> (level + 1))
    return add_lanes(x[0], LANES)


@triton.jit
def add_up(x, LANES: tl.constexpr):
    """Sum of every row in any order, of numbers whose sums are exact."""
    total = x[0]
    for j in tl.static_range(1, len(x)):
        total += x[j]
    return add_lanes(total, LANES)


# -- fits ----------------------------------------------------------------------------------------------------------


@triton.jit
def at_least(s):
    """``max(s, 2**-24)``; a NaN stays one."""
    return tl.maximum(s, SMALLEST, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def reciprocal(x):
    """``1 / x`` for x from 2**-24 to 2**100, rounded as IEEE says."""
    if USE_PTX:
        return tl.inline_asm_elementwise(RECIPROCAL, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return tl.div_rn(1.0, x)


@triton.jit
def quotient(a, b):
    """``a / b`` for b from 1 to 2**30 and a from 2**-60 to 2**100, rounded as IEEE says; about 0 for smaller a."""
    if USE_PTX:
        return tl.inline_asm_elementwise(QUOTIENT, "=f,f,f", [a, b], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return tl.div_rn(a, b)


@triton.jit
def root(x):
    """Square root of x from 2**-80 to 2**100, rounded as IEEE says."""
    if USE_PTX:
        return tl.inline_asm_elementwise(ROOT, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def first_scale(y, WIDTH: tl.constexpr, LANES: tl.constexpr, STEP_OF: tl.constexpr):
    """The best scale for normally distributed rows: ``sqrt(sum(y y) / n) * step``."""
    squares = ()
    for j in tl.static_range(len(y)):
        squares = squares + (y[j] * y[j],)
    # The root of 2**-80 is as good as any smaller one: the scale is 2**-24.
    mean = tl.maximum(tree_sum(squares, LANES) * (1.0 / WIDTH), 1.0 / (1 << 80), propagate_nan=tl.PropagateNan.ALL)
    return at_least(root(mean) * STEP_OF)


@triton.jit
def outer(u):
    """1.0 where a 2-bit code of ``u = y / s`` has the larger magnitude, 96, and 0.0 where it has 32."""
    if USE_PTX:
        return tl.inline_asm_elementwise(OUTER, "=f,f", [u], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return ((u >= 64.0) | (u < -64.0)).to(tl.float32)


@triton.jit
def floor16(u):
    """``clamp(floor(u / 16), -8, 7)``: rounding u / 16 downwards where a unit is 1 leaves the floor."""
    if USE_PTX:
        f = tl.inline_asm_elementwise(
            "fma.rm.f32 $0, $1, 0f3D800000, 0f4B400000;", "=f,f", [u], dtype=tl.float32, is_pure=True, pack=1
        )
        return tl.minimum(tl.maximum(f, MAGIC - 8.0), MAGIC + 7.0) - MAGIC
    else:
        return tl.minimum(tl.maximum(tl.floor(u * 0.0625), -8.0), 7.0)


@triton.jit
def count_ones(x, LANES: tl.constexpr):
    """How many of a row's numbers, up to 511, are 1.0 and not 0.0, float32.

    Their bits are added as integers, three at a time: n ones are ``127 n`` modulo 512 in the top nine bits, and
    127 * 383 is 1 modulo 512.
    """
    total = x[0].to(tl.int32, bitcast=True)
    for j in tl.static_range(1, len(x)):
        total += x[j].to(tl.int32, bitcast=True)
    return (((add_lanes(total, LANES) >> 23) * 383) & 511).to(tl.float32)


@triton.jit
def fit2(y, WIDTH: tl.constexpr, LANES: tl.constexpr):
    """2-bit codes of rows ``y``: odd integers ``lane / 32``, and the bits of their E5M3 scale, not yet checked.

    ``lane * y`` is 32 times ``|y|`` or the rounded ``|3 y|``; ``lane * lane`` is 1,024 or nine times that.
    """
    s = first_scale(y, WIDTH, LANES, STEP_2)
    for _ in tl.static_range(2):
        inverse = reciprocal(s)
        products = ()
        outers = ()
        for j in tl.static_range(len(y)):
            large = outer(y[j] * inverse)
            products = products + (tl.abs(tl.fma(large, y[j] + y[j], y[j])),)
            outers = outers + (large,)
        s = at_least(quotient(tree_sum(products, LANES), count_ones(outers, LANES) * 256.0 + 32.0 * WIDTH))
    bits, scale = round_scale(s, 1 << 19)
    inverse = reciprocal(scale)
    odd = ()
    for j in tl.static_range(len(y)):
        size = tl.fma(outer(y[j] * inverse), 2.0, 1.0)
        sign = y[j].to(tl.int32, bitcast=True) & -(1 << 31)
        odd = odd + ((size.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True),)
    return odd, bits


@triton.jit
def fit4(y, WIDTH: tl.constexpr, LANES: tl.constexpr):
    """4-bit codes of rows ``y``: odd integers ``lane / 8``, and the bits of their E5M3 scale, not yet checked.

    With ``f = floor(u / 16)`` a lane is ``16 (f + 1/2)``: sums of ``(f + 1/2) y`` and of ``f f + f``.
    """
    s = first_scale(y, WIDTH, LANES, STEP_4)
    for _ in tl.static_range(2):
        inverse = reciprocal(s)
        products = ()
        squares = ()
        for j in tl.static_range(len(y)):
            f = floor16(y[j] * inverse)
            products = products + (tl.fma(f, y[j], 0.5 * y[j]),)
            squares = squares + (tl.fma(f, f, f),)
        s = at_least(quotient(tree_sum(products, LANES), add_up(squares, LANES) * 16.0 + 4.0 * WIDTH))
    bits, scale = round_scale(s, 1 << 19)
    inverse = reciprocal(scale)
    odd = ()
    for j in tl.static_range(len(y)):
        odd = odd + (floor16(y[j] * inverse) * 2.0 + 1.0,)
    return odd, bits


@triton.jit
def fit8(y, LANES: tl.constexpr):
    """8-bit codes of rows ``y``: the lanes, and the bits of their E5M3 scale, not yet checked.

    The scale is rounded up, so that no code passes 127.
    """
    largest = tl.abs(y[0])
    for j in tl.static_range(1, len(y)):
        largest = tl.maximum(largest, tl.abs(y[j]), propagate_nan=tl.PropagateNan.ALL)
    # As integers magnitudes keep their order, and a NaN is the largest of all.
    largest = max_lanes(largest.to(tl.int32, bitcast=True), LANES).to(tl.float32, bitcast=True)
    bits, scale = round_scale(at_least(largest * (1.0 / 127.0)), (1 << 20) - 1)
    inverse = reciprocal(scale)
    lanes = ()
    for j in tl.static_range(len(y)):
        lanes = lanes + ((y[j] * inverse + MAGIC) - MAGIC,)
    return lanes, bits


@triton.jit
def round_scale(s, ROUND: tl.constexpr):
    """Scales of four significant bits: their float32 bits and their values."""
    bits = (s.to(tl.int32, bitcast=True) + ROUND) & -(1 << 20)
    return bits, bits.to(tl.float32, bitcast=True)
