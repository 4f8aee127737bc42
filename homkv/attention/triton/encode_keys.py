"""Encoding of keys: the centre of a page, then its tokens, which do not depend on each other (docs/format.md)."""

import triton
import triton.language as tl

from homkv.attention.triton.encode_fit import rotate
from homkv.attention.triton.encode_values import (
    KEY_MEAN,
    KEY_SCALE,
    NOT_FINITE,
    fit,
    four_bytes,
    is_too_large,
    locate_pages,
    locate_tokens,
    one_byte,
    sign_bits,
)
from homkv.attention.triton.threads import (
    bytes_of_stride,
    load_floats,
    load_own,
    load_word,
    or_lanes,
    store_own,
    to_floats,
)

WARP = tl.constexpr(32)  # threads that share a page's centre


@triton.constexpr_function
def tokens_at_once(rows):
    """Tokens of a page that a program encodes at a time: up to a plane of 2-bit codes."""
    return min(rows, 16)


@triton.constexpr_function
def pages_at_once(rows):
    """Pages whose keys a program encodes."""
    return max(rows // 16, 1)


# -- centre --------------------------------------------------------------------------------------------------------


@triton.jit
def add_each(a, b):
    """Sums of two tuples."""
    out = ()
    for i in tl.static_range(len(a)):
        out = out + (a[i] + b[i],)
    return out


@triton.jit
def sum_eight(k, stride, COUNT: tl.constexpr, DTYPE: tl.constexpr):
    """``k[0] + k[8] + .. + k[56]`` in the format's order, of COUNT channels each; ``k [N] int64``, ``stride`` bytes."""
    x = ()
    for i in tl.static_range(8):
        x = x + (load_floats(k + stride * (8 * i), 0, COUNT, DTYPE),)
    even = add_each(add_each(x[0], x[4]), add_each(x[2], x[6]))
    odd = add_each(add_each(x[1], x[5]), add_each(x[3], x[7]))
    return add_each(even, odd)


@triton.jit
def sum_tokens(k, stride, COUNT: tl.constexpr, DTYPE: tl.constexpr):
    """Sum of a page's 64 tokens in the format's order: halves are added until one is left. Otherwise as above."""
    total = ()
    for _ in tl.static_range(COUNT):
        total = total + (tl.full(k.shape, -0.0, tl.float32),)  # what leaves every number, zeros too, as it is
    for first in tl.range(2, num_stages=1):
        quarters = ()
        for i in tl.static_range(4):
            quarters = quarters + (sum_eight(k + stride * (first + 2 * i), stride, COUNT, DTYPE),)
        half = add_each(add_each(quarters[0], quarters[2]), add_each(quarters[1], quarters[3]))
        total = add_each(total, half)
    return total


@triton.jit
def encode_centre(
    k, stride, SlotOf, page, live, USED: tl.constexpr, PAGE_BYTES: tl.constexpr, CENTRE: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Centre and padding of a page per warp; ``k page [N] int64``. Returns whether a mean is not finite in float16."""
    lane = tl.arange(0, k.numel) % WARP
    EACH: tl.constexpr = DP // WARP
    SIZE: tl.constexpr = DTYPE.primitive_bitwidth // 8
    d = lane * EACH
    inside = d < D
    d = tl.where(inside, d, 0)
    total = sum_tokens(k + d * SIZE, stride, EACH, DTYPE)
    largest = tl.zeros(lane.shape, tl.int32)
    for i in tl.static_range(EACH):
        mean = (total[i] * (1.0 / 64.0)).to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
        slot = load_word(SlotOf.to(tl.int64, bitcast=True) + (d + i).to(tl.int64) * 4)
        store_own(page + CENTRE + slot * 2, (mean,), live & inside, 2)
        largest = tl.maximum(largest, mean & 0x7FFF)
    for start in tl.static_range(USED, PAGE_BYTES, 4 * WARP):
        at = start + 4 * lane
        store_own(page + at, (tl.zeros(lane.shape, tl.int32),), live & (at < PAGE_BYTES), 4)
    return (tl.max(largest, 0) >= 0x7C00).to(tl.int32)


@triton.jit
def gaps_not_finite(v, stride_t, GAPS: tl.constexpr):
    """1 if a value of the channels that no class stores is NaN or infinite, else 0; ``v`` points to a page's first."""
    largest = 0
    for i in tl.static_range(len(GAPS)):
        c = tl.arange(0, triton.next_power_of_2(GAPS[i][1]))[None, :]
        for t in range(0, 64, 8):
            at = (t + tl.arange(0, 8)[:, None]).to(tl.int64) * stride_t + (GAPS[i][0] + c)
            x = tl.load(v + at, mask=c < GAPS[i][1], other=0.0).to(tl.float32)
            largest = tl.maximum(largest, tl.max(tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1), 0))
    return (largest >= 0x7F800000).to(tl.int32)


# -- slots ---------------------------------------------------------------------------------------------------------


@triton.constexpr_function
def is_needed(order, start, width, first, count):
    """Whether slots ``start .. start + width`` take any of channels ``first .. first + count``."""
    return any(first <= channel < first + count for channel in order[start : start + width])


@triton.constexpr_function
def together(dtype, dim):
    """Channels that one access takes: 16 bytes of them, or what divides the head."""
    most = 16 * 8 // dtype.primitive_bitwidth
    return min(most, dim & -dim)


@triton.jit
def load_slots(
    token, START: tl.constexpr, WIDTH: tl.constexpr, ORDER: tl.constexpr, D: tl.constexpr, DTYPE: tl.constexpr
):
    """Slots START .. START + WIDTH of rows, in order, in every lane, float32; ``token [N] int64``: address of a row.

    Which register holds a slot is known when this is compiled, so putting channels in order costs nothing.
    """
    AT_ONCE: tl.constexpr = together(DTYPE, D)
    channels = ()
    for first in tl.static_range(0, D, AT_ONCE):
        if is_needed(ORDER, START, WIDTH, first, AT_ONCE):
            channels = channels + load_floats(token, first, AT_ONCE, DTYPE)
        else:
            channels = channels + (0,) * AT_ONCE
    out = ()
    for slot in tl.static_range(START, START + WIDTH):
        out = out + (channels[ORDER[slot]],)
    return out


@triton.constexpr_function
def centre_words(width):
    """Registers of a class's centre that are loaded together."""
    return 4 if width % 8 == 0 else 2 if width % 4 == 0 else 1


@triton.jit
def without_centre(x, centre):
    """``x`` less the centre of the same slots, which this program wrote; ``centre [N] int64``."""
    WORDS: tl.constexpr = centre_words(len(x))
    out = ()
    for i in tl.static_range(len(x) // (2 * WORDS)):
        words = load_own(centre + 4 * WORDS * i, centre != 0, WORDS, 4)
        for w in tl.static_range(WORDS):
            low, high = to_floats(words[w], tl.float16)
            out = out + (x[2 * (WORDS * i + w)] - low, x[2 * (WORDS * i + w) + 1] - high)
    return out


# -- codes ---------------------------------------------------------------------------------------------------------


@triton.jit
def dwords(codes, BITS: tl.constexpr, LANES: tl.constexpr):
    """A lane's share of the dwords of four neighbouring slots, from a fit's results; it is not yet at its byte."""
    EACH: tl.constexpr = 4 // LANES
    out = ()
    for i in tl.static_range(len(codes) // EACH):
        if EACH == 4:
            word = four_bytes(codes[4 * i], codes[4 * i + 1], codes[4 * i + 2], codes[4 * i + 3], BITS)
        elif EACH == 2:
            word = one_byte(codes[2 * i], BITS) | (one_byte(codes[2 * i + 1], BITS) << 16)
        else:
            word = one_byte(codes[i], BITS)
        out = out + (word,)
    return out


@triton.jit
def encode_rows(
    token, centre, packed, lane, K: tl.constexpr, I: tl.constexpr, ORDER: tl.constexpr, D: tl.constexpr,
    LANES: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Append the codes of one token per row to ``packed``: the next plane. Returns it and the bits of the scales."""
    WIDTH: tl.constexpr = K[I][1]
    BITS: tl.constexpr = K[I][2]
    x = without_centre(load_slots(token, K[I][0], WIDTH, ORDER, D, DTYPE), centre)
    codes, bits, _ = fit(rotate(x, lane, LANES, WIDTH & -WIDTH), WIDTH, BITS, LANES)
    new = dwords(codes, BITS, LANES)
    out = ()
    for i in tl.static_range(len(new)):
        out = out + ((packed[i] << (BITS % 8)) | new[i],)
    return out, bits


@triton.jit
def encode_key_class(
    token, stride, page, lane, row, live, K: tl.constexpr, I: tl.constexpr, ORDER: tl.constexpr, CENTRE: tl.constexpr,
    D: tl.constexpr, LANES: tl.constexpr, TOKENS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Codes and scales of class I; ``token page [N] int64``: rows are TOKENS tokens of some pages, ``row`` a page's.

    Returns the largest bits of a scale, uint32.
    """
    BITS: tl.constexpr = K[I][2]
    worst = tl.zeros(lane.shape, tl.uint32)
    first = live & (lane == 0)
    for block in tl.range(8 * BITS // TOKENS, num_stages=1):
        packed = ()
        for _ in tl.static_range(K[I][1] // 4):
            packed = packed + (tl.zeros(lane.shape, tl.int32),)
        for plane in tl.range(8 // BITS, num_stages=1):
            t = plane * (8 * BITS) + block * TOKENS
            centre = page + (CENTRE + 2 * K[I][0])
            packed, bits = encode_rows(token + t * stride, centre, packed, lane, K, I, ORDER, D, LANES, DTYPE)
            worst = tl.maximum(worst, bits.to(tl.uint32, bitcast=True))
            store_own(page + K[I][4] + t + row, ((bits >> 20) - (103 << 3),), first, 1)
        at = page + K[I][3] + 4 * (block * TOKENS + row)
        for i in tl.static_range(len(packed)):
            word = or_lanes(packed[i] << (8 * lane), LANES) ^ sign_bits(BITS)
            store_own(at + i * (32 * BITS), (word,), first, 4)
    return worst


@triton.jit
def encode_keys(
    KIn, stride_h, stride_t, VIn, v_stride_h, v_stride_t, Pages, Blocks, SlotOf, Status, first, count, heads,
    num_blocks, K: tl.constexpr, GAPS: tl.constexpr, ORDER: tl.constexpr, CENTRE: tl.constexpr, USED: tl.constexpr,
    PAGE_BYTES: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, LANES: tl.constexpr, THREADS: tl.constexpr,
    SCATTER: tl.constexpr,
):  # fmt: skip
    """Everything of THREADS / LANES / 16 pages, or one, from ``first`` on but the values' codes."""
    ROWS: tl.constexpr = THREADS // LANES
    TOKENS: tl.constexpr = tokens_at_once(ROWS)
    DTYPE: tl.constexpr = KIn.dtype.element_ty
    thread = tl.arange(0, THREADS)
    stride = bytes_of_stride(stride_t, DTYPE.primitive_bitwidth // 8)
    stop = tl.minimum(first + pages_at_once(ROWS), count)
    wrong = 0
    for start in tl.range(first, stop, THREADS // WARP, num_stages=1):
        i = start + thread // WARP
        page = locate_pages(Pages, Blocks, tl.minimum(i, stop - 1), heads, num_blocks, SCATTER, PAGE_BYTES)
        k = locate_tokens(KIn, tl.minimum(i, stop - 1), heads, stride_h, stride_t)
        wrong |= encode_centre(k, stride, SlotOf, page, i < stop, USED, PAGE_BYTES, CENTRE, D, DP, DTYPE) * KEY_MEAN
    if len(GAPS) > 0:
        for i in tl.range(first, stop, num_stages=1):
            v = VIn + tl.cast(i % heads, tl.int64) * v_stride_h + tl.cast(i // heads, tl.int64) * 64 * v_stride_t
            wrong |= gaps_not_finite(v, v_stride_t, GAPS) * NOT_FINITE
    tl.debug_barrier()  # the centre is read by other threads than wrote it
    row = thread // LANES
    i = first + row // TOKENS
    live = i < count
    i = tl.minimum(i, count - 1)
    page = locate_pages(Pages, Blocks, i, heads, num_blocks, SCATTER, PAGE_BYTES)
    token = locate_tokens(KIn, i, heads, stride_h, stride_t) + (row % TOKENS) * stride
    for c in tl.static_range(len(K)):
        worst = encode_key_class(
            token, stride, page, thread % LANES, row % TOKENS, live, K, c, ORDER, CENTRE, D, LANES, TOKENS, DTYPE
        )
        wrong |= is_too_large(worst).to(tl.int32) * KEY_SCALE
    if wrong != 0:
        tl.atomic_or(Status, wrong)
