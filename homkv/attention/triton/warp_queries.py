"""Queries of one kv head as a warp's right operands: slot order, Hadamard and int8; and float16 for the centre.

Values are gathered some time before they are needed, ahead of the pages: behind the whole machine's first pages a load
takes microseconds. Lane ``4 g + q`` holds column g: neighbours 4 q .. 4 q + 3 in
both halves of every 32 slots of a class, or DP / 4 slots in a row for the centre.
"""

import triton
import triton.language as tl

from homkv.attention.triton.lanes import MAGIC
from homkv.attention.triton.warp import across, from_lane, load4, load_number, pack_bytes, pack_halves


@triton.jit
def load_channels(order, start, COUNT: tl.constexpr, LAST: tl.constexpr, STRIDE: tl.constexpr):
    """Channels of slots ``start + STRIDE * i .. + 3``; behind slot LAST those of LAST."""
    out = ()
    for i in tl.static_range(COUNT):
        out = out + load4(order + tl.minimum(start + STRIDE * i, LAST).to(tl.int64) * 4, 0)
    return out


@triton.jit
def load_order(Order, q, K: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """Channels that a lane takes: per class, and for the centre."""
    order = Order.to(tl.int64, bitcast=True)
    out = ()
    for c in tl.static_range(len(K)):
        out = out + (load_channels(order, K[c][0] + 4 * q, 2 * ((K[c][1] + 31) // 32), D - 4, 16),)
    return out + (load_channels(order, q * (DP // 4), DP // 16, D - 4, 4),)


@triton.jit
def gather_slots(q_row, channels, live, start, stop, STRIDE: tl.constexpr):
    """Query values of slots ``start + STRIDE * i .. + 3`` below ``stop`` as float32, zero elsewhere."""
    out = ()
    for i in tl.static_range(len(channels)):
        inside = live & (start + (STRIDE * (i // 4) + i % 4) < stop)
        out = out + (tl.where(inside, load_number(q_row + channels[i]), 0.0),)
    return out


@triton.jit
def gather_queries(q_row, channels, live, q, K: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """Query values of the lane's channels; ``q_row`` points at the lane's row, or where not ``live`` at another."""
    out = ()
    for c in tl.static_range(len(K)):
        out = out + (gather_slots(q_row, channels[c], live, K[c][0] + 4 * q, K[c][0] + K[c][1], 16),)
    return out + (gather_slots(q_row, channels[len(K)], live, q * (DP // 4), D, 4),)


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
def class_codes(x, q, WIDTH: tl.constexpr):
    """``(steps, worth)``: right operands of a class and ``max |q| / 127`` of the lane's column."""
    STEPS: tl.constexpr = (WIDTH + 31) // 32
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
def centre_operands(x, DP: tl.constexpr, SPLIT: tl.constexpr):
    """``(terms, unit)``: one or two right operands and the power of two that is their unit."""
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
def prepare_queries(
    x, masks, q, scale_log2, K: tl.constexpr, DP: tl.constexpr, PAGES: tl.constexpr, SPLIT: tl.constexpr
):  # fmt: skip
    """``(codes, unit, ratio, centre_unit, operands)`` of a set of eight columns, from what was gathered.

    ``codes``: for every page its right operands per class, columns of other pages zero. ``unit``, ``ratio``,
    ``centre_unit`` belong to the lane's columns 2 q and 2 q + 1: what a unit of the first class is worth in the score,
    base 2; how much more a class's is; what one of the centre's ``operands`` is.
    """
    one = tl.full([32], 1.0, tl.float32)
    unit = (one, one)
    ratio = ()
    first = ()
    second = ()
    for c in tl.static_range(len(K)):
        steps, worth = class_codes(x[c], q, K[c][1])
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
    operands, exponent = centre_operands(x[len(K)], DP, SPLIT)
    return codes, unit, ratio, both_columns(exponent * scale_log2, q), operands
