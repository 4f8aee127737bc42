"""Queries of one kv head as a warp's right operands: slot order, Hadamard and int8; and float16 for the centre.

The arithmetic is prepare.py's, operation by operation. Lane ``4 g + q`` holds column g: neighbours 4 q .. 4 q + 3 in
both halves of every 32 slots of a class, or DP / 4 slots in a row for the centre.
"""

import triton
import triton.language as tl

from homkv.attention.triton.lanes import MAGIC
from homkv.attention.triton.warp import across, from_lane, load4, pack_bytes, pack_halves


@triton.jit
def gather_slots(q_row, Order, live, start, stop, COUNT: tl.constexpr, LAST: tl.constexpr, STRIDE: tl.constexpr):
    """Query values of slots ``start + STRIDE * i .. + 3`` below ``stop``, as float32; zero elsewhere."""
    out = ()
    for i in tl.static_range(COUNT):
        slot = start + STRIDE * i
        channel = load4(Order + tl.minimum(slot, LAST).to(tl.int64) * 4, 0)
        for j in tl.static_range(4):
            inside = live & (slot + j < stop)
            out = out + (tl.load(q_row + channel[j], mask=inside, other=0.0).to(tl.float32),)
    return out


@triton.jit
def rotate_slots(x, q, BLOCK: tl.constexpr):
    """Orthonormal Hadamard transform of blocks of slots ``32 s + 16 half + 4 q + j``; registers (s, half, j)."""
    for level in tl.static_range(BLOCK.bit_length() - 1):
        new = ()
        if level == 2 or level == 3:
            for i in tl.static_range(len(x)):
                other = across(x[i], level - 1)
                new = new + (tl.where((q & (level - 1)) == 0, x[i] + other, other - x[i]),)
        else:
            for i in tl.static_range(len(x)):
                if (i >> (level if level < 2 else level - 2)) % 2 == 0:
                    new = new + (x[i] + x[i + (1 << (level if level < 2 else level - 2))],)
                else:
                    new = new + (x[i - (1 << (level if level < 2 else level - 2))] - x[i],)
        x = new
    out = ()
    for i in tl.static_range(len(x)):
        out = out + (x[i] * (BLOCK**-0.5),)
    return out


@triton.jit
def largest_of(x):
    """Largest magnitude among the registers of the four lanes of a column."""
    out = tl.abs(x[0])
    for i in tl.static_range(len(x) - 1):
        out = tl.maximum(out, tl.abs(x[i + 1]))
    out = tl.maximum(out, across(out, 1))
    return tl.maximum(out, across(out, 2))


@triton.jit
def both_columns(x, q):
    """What lanes of row g hold for column g, for columns 2 q and 2 q + 1."""
    return from_lane(x, 8 * q), from_lane(x, 8 * q + 4)


@triton.jit
def class_codes(q_row, Order, live, q, START: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    """``(steps, worth)``: right operands of a class and ``max |q| / 127`` of the lane's column."""
    STEPS: tl.constexpr = (WIDTH + 31) // 32
    x = gather_slots(q_row, Order, live, START + 4 * q, START + WIDTH, 2 * STEPS, D - 4, 16)
    x = rotate_slots(x, q, WIDTH & -WIDTH)
    largest = largest_of(x)
    inverse = tl.where(largest > 0, tl.div_rn(127.0, largest), 0.0)
    steps = ()
    for s in tl.static_range(STEPS):
        halves = ()
        for half in tl.static_range(2):
            code = ()
            for j in tl.static_range(4):
                code = code + ((x[8 * s + 4 * half + j] * inverse + MAGIC).to(tl.int32, bitcast=True),)
            halves = halves + (pack_bytes(code),)
        steps = steps + (halves,)
    return steps, tl.div_rn(largest, 127.0)


@triton.jit
def centre_operands(q_row, Order, live, q, D: tl.constexpr, DP: tl.constexpr, SPLIT: tl.constexpr):
    """``(terms, unit)``: one or two right operands and the power of two that is their unit."""
    x = gather_slots(q_row, Order, live, q * (DP // 4), D, DP // 16, D - 4, 4)
    largest = largest_of(x)
    exponent = tl.maximum(largest.to(tl.int32, bitcast=True) & 0x7F800000, 30 << 23)
    scale = ((254 << 23) - exponent).to(tl.float32, bitcast=True)
    high = ()
    low = ()
    for i in tl.static_range(DP // 8):
        a = x[2 * i] * scale
        b = x[2 * i + 1] * scale
        high = high + (pack_halves(a, b),)
        if SPLIT:
            a = (a - a.to(tl.float16).to(tl.float32)) * 2048.0
            b = (b - b.to(tl.float16).to(tl.float32)) * 2048.0
            low = low + (pack_halves(a, b),)
    return (high, low), exponent.to(tl.float32, bitcast=True)


@triton.jit
def mask_codes(steps, mask):
    """Right operands of a class with some columns zero."""
    out = ()
    for s in tl.static_range(len(steps)):
        out = out + ((steps[s][0] & mask, steps[s][1] & mask),)
    return out


@triton.jit
def load_queries(
    q_row, Order, live, masks, q, scale_log2, K: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, PAGES: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """``(codes, unit, ratio, centre_unit, operands)`` of a set of eight columns; ``q_row`` points at the lane's.

    ``codes``: for every page its right operands per class, columns of other pages zero. ``unit``, ``ratio``,
    ``centre_unit`` belong to the lane's columns 2 q and 2 q + 1: what a unit of the first class is worth in the score,
    base 2; how much more a class's is; what one of the centre's ``operands`` is.
    """
    order = Order.to(tl.int64, bitcast=True)
    one = tl.full([32], 1.0, tl.float32)
    unit = (one, one)
    ratio = ()
    first = ()
    second = ()
    for c in tl.static_range(len(K)):
        steps, worth = class_codes(q_row, order, live, q, K[c][0], K[c][1], D)
        worth = both_columns(worth * scale_log2, q)
        if c == 0:
            unit = (tl.where(worth[0] > 0, worth[0], 1.0), tl.where(worth[1] > 0, worth[1], 1.0))
        ratio = ratio + ((worth[0] / unit[0], worth[1] / unit[1]),)
        first = first + (mask_codes(steps, masks[0]),)
        if PAGES == 2:
            second = second + (mask_codes(steps, masks[1]),)
    codes = (first,)
    if PAGES == 2:
        codes = (first, second)
    operands, exponent = centre_operands(q_row, order, live, q, D, DP, SPLIT)
    return codes, unit, ratio, both_columns(exponent * scale_log2, q), operands
