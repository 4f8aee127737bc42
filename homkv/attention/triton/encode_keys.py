"""Encoding of keys: the centre of a page, then its tokens, which do not depend on each other (docs/format.md)."""

import triton
import triton.language as tl

from homkv.attention.triton.encode_fit import log2, rotate, rotate_lanes
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


@triton.constexpr_function
def tokens_at_once(rows):
    """Tokens of a page that a program encodes at a time: up to a plane of 2-bit codes."""
    return min(rows, 16)


@triton.constexpr_function
def pages_at_once(rows):
    """Pages whose keys a program encodes."""
    return max(rows // 16, 1)


@triton.constexpr_function
def is_needed(order, start, width, first, count):
    """Whether slots ``start .. start + width`` take any of channels ``first .. first + count``."""
    return any(first <= channel < first + count for channel in order[start : start + width])


@triton.jit
def load_tokens(x, stride_t, d, inside, FIRST: tl.constexpr):
    """Eight tokens from FIRST on, ``[8, DP]`` float32."""
    t = FIRST + tl.arange(0, 8)[:, None]
    return tl.load(x + (t.to(tl.int64) * stride_t + d), mask=inside, other=0.0).to(tl.float32)


@triton.jit
def sum_tokens(k, stride_t, D: tl.constexpr, DP: tl.constexpr):
    """Sum of a page's 64 tokens ``[DP]`` in the format's order: halves are added until one is left."""
    d = tl.arange(0, DP)[None, :]
    inside = d < D
    even = load_tokens(k, stride_t, d, inside, 0) + load_tokens(k, stride_t, d, inside, 32)
    even += load_tokens(k, stride_t, d, inside, 16) + load_tokens(k, stride_t, d, inside, 48)
    odd = load_tokens(k, stride_t, d, inside, 8) + load_tokens(k, stride_t, d, inside, 40)
    odd += load_tokens(k, stride_t, d, inside, 24) + load_tokens(k, stride_t, d, inside, 56)
    y = even + odd
    for level in tl.static_range(3):
        y = tl.sum(y.reshape([2, 4 >> level, DP]), 0)
    return y.reshape([DP])


@triton.jit
def encode_centre(
    k, stride_t, SlotOf, page, USED: tl.constexpr, PAGE_BYTES: tl.constexpr, CENTRE: tl.constexpr, D: tl.constexpr,
    DP: tl.constexpr,
):  # fmt: skip
    """Centre and padding of one page. Returns 1 where a mean is not finite in float16, else 0."""
    d = tl.arange(0, DP)
    mean = (sum_tokens(k, stride_t, D, DP) * (1.0 / 64.0)).to(tl.float16)
    slot = tl.load(SlotOf + d, mask=d < D, other=0)
    tl.store((page + CENTRE).to(tl.pointer_type(tl.float16), bitcast=True) + slot, mean, mask=d < D)
    if PAGE_BYTES > USED:
        i = tl.arange(0, 64)
        tl.store(page + USED + i, tl.zeros([64], tl.uint8), mask=USED + i < PAGE_BYTES)
    largest = tl.max(mean.to(tl.int16, bitcast=True).to(tl.int32) & 0x7FFF, 0)
    return (largest >= 0x7C00).to(tl.int32)


@triton.jit
def gaps_not_finite(v, stride_t, GAPS: tl.constexpr):
    """1 if a value of the channels that no class stores is NaN or infinite, else 0."""
    largest = 0
    for i in tl.static_range(len(GAPS)):
        c = tl.arange(0, triton.next_power_of_2(GAPS[i][1]))[None, :]
        for t in range(0, 64, 8):
            at = (t + tl.arange(0, 8)[:, None]).to(tl.int64) * stride_t + (GAPS[i][0] + c)
            x = tl.load(v + at, mask=c < GAPS[i][1], other=0.0).to(tl.float32)
            largest = tl.maximum(largest, tl.max(tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1), 0))
    return (largest >= 0x7F800000).to(tl.int32)


# -- slots ---------------------------------------------------------------------------------------------------------


@triton.jit
def split_channels(x):
    """Channels of ``x [R, LANES, C]``, each ``[R, LANES]``, in order."""
    C: tl.constexpr = x.shape[2]
    parts = (x,)
    for level in tl.static_range(log2(C)):
        even = ()
        odd = ()
        for i in tl.static_range(len(parts)):
            a, b = tl.split(parts[i].reshape([x.shape[0], x.shape[1], C >> (level + 1), 2]))
            even = even + (a,)
            odd = odd + (b,)
        parts = even + odd
    out = ()
    for i in tl.static_range(C):
        out = out + (parts[i].reshape([x.shape[0], x.shape[1]]),)
    return out


@triton.jit
def join_channels(parts):
    """Inverse of :func:`split_channels`."""
    R: tl.constexpr = parts[0].shape[0]
    LANES: tl.constexpr = parts[0].shape[1]
    C: tl.constexpr = len(parts)
    x = ()
    for i in tl.static_range(C):
        x = x + (parts[i].reshape([R, LANES, 1]),)
    for level in tl.static_range(log2(C)):
        out = ()
        for i in tl.static_range(C >> (level + 1)):
            out = out + (tl.join(x[i], x[i + (C >> (level + 1))]).reshape([R, LANES, 2 << level]),)
        x = out
    return x[0]


@triton.jit
def load_slots(
    token, START: tl.constexpr, WIDTH: tl.constexpr, ORDER: tl.constexpr, D: tl.constexpr, LANES: tl.constexpr,
    C: tl.constexpr,
):  # fmt: skip
    """Slots START .. START + WIDTH of rows, in order: tensors ``[R, LANES, C]`` float32; ``token [R]`` points to a row.

    Which register holds a slot is known when this is compiled, so putting channels in order costs nothing.
    """
    at = token[:, None, None] + tl.arange(0, C)[None, None, :]
    at = tl.broadcast_to(at, [token.shape[0], LANES, C])
    channels = ()
    for first in tl.static_range(0, D, C):
        if is_needed(ORDER, START, WIDTH, first, C):
            channels = channels + split_channels(tl.load(at + first).to(tl.float32))
        else:
            channels = channels + (0,) * C
    out = ()
    for j in tl.static_range(WIDTH // C):
        slots = ()
        for i in tl.static_range(C):
            slots = slots + (channels[ORDER[START + j * C + i]],)
        out = out + (join_channels(slots),)
    return out


# -- codes ---------------------------------------------------------------------------------------------------------


@triton.jit
def dwords(code, BITS: tl.constexpr):
    """A lane's share of dwords of four neighbouring slots, from a fit's results ``[R, LANES, Q]``: ``[R, LANES, n]``.

    Slot ``q * LANES + lane`` has byte ``slot % 4``; the lane's own shift is left to the end.
    """
    R: tl.constexpr = code.shape[0]
    L: tl.constexpr = code.shape[1]
    Q: tl.constexpr = code.shape[2]
    if L == 1:
        even, odd = tl.split(code.reshape([R, L, Q // 2, 2]))
        c0, c2 = tl.split(even.reshape([R, L, Q // 4, 2]))
        c1, c3 = tl.split(odd.reshape([R, L, Q // 4, 2]))
        return four_bytes(c0, c1, c2, c3, BITS)
    elif L == 2:
        c0, c1 = tl.split(code.reshape([R, L, Q // 2, 2]))
        return one_byte(c0, BITS) | (one_byte(c1, BITS) << 16)
    else:
        return one_byte(code, BITS)


@triton.jit
def zero_dwords(J: tl.constexpr, R: tl.constexpr, LANES: tl.constexpr, N: tl.constexpr):
    """J tensors ``[R, LANES, N]`` of zeros."""
    out = ()
    for _ in tl.static_range(J):
        out = out + (tl.zeros([R, LANES, N], tl.int32),)
    return out


@triton.jit
def encode_rows(
    token, centre, packed, START: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr, ORDER: tl.constexpr,
    D: tl.constexpr, LANES: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Append the codes of one token per row to ``packed``: the next plane. Returns it and the bits of the scales."""
    R: tl.constexpr = token.shape[0]
    centre = centre[:, None, None] + tl.arange(0, C)[None, None, :]
    centre = tl.broadcast_to(centre, [R, LANES, C])
    slots = load_slots(token, START, WIDTH, ORDER, D, LANES, C)
    x = ()
    for j in tl.static_range(len(slots)):
        x = x + (slots[j] - tl.load(centre + j * C).to(tl.float32),)
    codes, bits, _ = fit(rotate(rotate_lanes(x, LANES), WIDTH & -WIDTH), WIDTH, BITS)
    out = ()
    for j in tl.static_range(len(slots)):
        out = out + ((packed[j] << (BITS % 8)) | dwords(codes[j], BITS),)
    return out, bits


@triton.jit
def store_dwords(page, packed, live, BITS: tl.constexpr):
    """Finish dwords and store them at ``page [R]``: ``[slot / 4][8 * BITS tokens]``."""
    R: tl.constexpr = packed[0].shape[0]
    LANES: tl.constexpr = packed[0].shape[1]
    N: tl.constexpr = packed[0].shape[2]
    shift = 8 * tl.arange(0, LANES)[None, :, None]
    at = page.to(tl.pointer_type(tl.int32), bitcast=True)[:, None] + tl.arange(0, N)[None, :] * (8 * BITS)
    mask = tl.broadcast_to(live[:, None], [R, N])
    for j in tl.static_range(len(packed)):
        tl.store(at + j * N * (8 * BITS), tl.sum(packed[j] << shift, 1) ^ sign_bits(BITS), mask=mask)


@triton.jit
def encode_key_class(
    token, stride_t, page, live, K: tl.constexpr, I: tl.constexpr, ORDER: tl.constexpr, CENTRE: tl.constexpr,
    D: tl.constexpr, LANES: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Codes and scales of class I; ``token page live [R]``: rows are 16 tokens of R / 16 pages, or fewer of one.

    Returns the largest bits of a scale, uint32.
    """
    START: tl.constexpr = K[I][0]
    WIDTH: tl.constexpr = K[I][1]
    BITS: tl.constexpr = K[I][2]
    R: tl.constexpr = token.shape[0]
    TOKENS: tl.constexpr = tokens_at_once(R)
    l = tl.arange(0, R) % TOKENS
    centre = (page + (CENTRE + 2 * START)).to(tl.pointer_type(tl.float16), bitcast=True)
    worst = tl.zeros([R], tl.uint32)
    for block in tl.range(8 * BITS // TOKENS, num_stages=1):
        packed = zero_dwords(WIDTH // C, R, LANES, C // 4)
        for plane in tl.range(8 // BITS, num_stages=1):
            t = plane * (8 * BITS) + block * TOKENS
            packed, bits = encode_rows(token + t * stride_t, centre, packed, START, WIDTH, BITS, ORDER, D, LANES, C)
            worst = tl.maximum(worst, bits.to(tl.uint32, bitcast=True))
            tl.store(page + K[I][4] + t + l, ((bits >> 20) - (103 << 3)).to(tl.uint8), mask=live)
        store_dwords(page + K[I][3] + 4 * (block * TOKENS + l), packed, live, BITS)
    return worst


@triton.jit
def encode_keys(
    KIn, stride_h, stride_t, VIn, v_stride_h, v_stride_t, Pages, Blocks, SlotOf, Status, first, count, heads,
    num_blocks, K: tl.constexpr, GAPS: tl.constexpr, ORDER: tl.constexpr, CENTRE: tl.constexpr, USED: tl.constexpr,
    PAGE_BYTES: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, C: tl.constexpr, LANES: tl.constexpr,
    THREADS: tl.constexpr, SCATTER: tl.constexpr,
):  # fmt: skip
    """Everything of THREADS / LANES / 16 pages, or one, from ``first`` on but the values' codes."""
    R: tl.constexpr = THREADS // LANES
    TOKENS: tl.constexpr = tokens_at_once(R)
    wrong = 0
    for i in range(first, tl.minimum(first + pages_at_once(R), count)):
        page = locate_pages(Pages, Blocks, i, heads, num_blocks, SCATTER, PAGE_BYTES)
        k = locate_tokens(KIn, i, heads, stride_h, stride_t)
        wrong |= encode_centre(k, stride_t, SlotOf, page, USED, PAGE_BYTES, CENTRE, D, DP) * KEY_MEAN
        if len(GAPS) > 0:
            v = locate_tokens(VIn, i, heads, v_stride_h, v_stride_t)
            wrong |= gaps_not_finite(v, v_stride_t, GAPS) * NOT_FINITE
    tl.debug_barrier()  # the centre is read by other threads than wrote it
    r = tl.arange(0, R)
    i = first + r // TOKENS
    live = i < count
    i = tl.minimum(i, count - 1)
    page = locate_pages(Pages, Blocks, i, heads, num_blocks, SCATTER, PAGE_BYTES)
    token = locate_tokens(KIn, i, heads, stride_h, stride_t) + (r % TOKENS).to(tl.int64) * stride_t
    for c in tl.static_range(len(K)):
        worst = encode_key_class(token, stride_t, page, live, K, c, ORDER, CENTRE, D, LANES, C)
        wrong |= is_too_large(worst).to(tl.int32) * KEY_SCALE
    if wrong != 0:
        tl.atomic_or(Status, wrong)
