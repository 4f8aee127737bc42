"""The page's centre and a few pieces more for the dequantizing kernel: as ``tl.dot`` operands of one warp."""

import triton
import triton.language as tl


@triton.constexpr_function
def count_steps(classes, count):
    """Steps of 32 channels in the first ``count`` classes."""
    return sum((width + 31) // 32 for _, width, *_ in classes[:count])


@triton.jit
def store_centre(q_row, Order, live, centre, D: tl.constexpr, DP: tl.constexpr, N: tl.constexpr, SPLIT: tl.constexpr):
    """Store the centre's right operands ``[terms, 2, N, DP / 2]`` float16; returns the power of two that is their unit.

    float16 holds a 16-bit query exactly in units near the row's largest magnitude; a float32 one takes two terms.
    Row k of operand ``parity`` is slot ``q * DP / 4 + 8 s + 4 half + 2 parity + e``, ``k = 16 s + 8 half + 2 q + e``.
    """
    i = tl.arange(0, DP)
    k = i % (DP // 2)
    slot = k // 2 % 4 * (DP // 4) + k // 16 * 8 + k // 8 % 2 * 4 + i // (DP // 2) * 2 + k % 2
    channel = tl.load(Order + slot, mask=slot < D, other=0)
    q = tl.load(q_row[None, :] + channel[:, None], mask=live[None, :] & (slot < D)[:, None], other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(q), 0)
    exponent = tl.maximum(largest.to(tl.int32, bitcast=True) & 0x7F800000, 30 << 23)
    q = q * ((254 << 23) - exponent).to(tl.float32, bitcast=True)[None, :]
    at = (i // (DP // 2) * (N * DP // 2) + i % (DP // 2))[:, None] + tl.arange(0, N)[None, :] * (DP // 2)
    high = q.to(tl.float16)
    tl.store(centre + at, high)
    if SPLIT:
        tl.store(centre + DP * N + at, ((q - high.to(tl.float32)) * 2048.0).to(tl.float16))
    return exponent.to(tl.float32, bitcast=True)


@triton.jit
def load_centre_query(centre, DP: tl.constexpr, N: tl.constexpr):
    """Right operands of the centre's product: ``(even, odd)``, tuples of ``[16, N]`` float16."""
    at = tl.arange(0, 16)[:, None] + tl.arange(0, N)[None, :] * (DP // 2)
    even = ()
    odd = ()
    for i in tl.static_range(DP // 32):
        even = even + (tl.load(centre + i * 16 + at),)
        odd = odd + (tl.load(centre + N * DP // 2 + i * 16 + at),)
    return even, odd


@triton.jit
def load_centre(page, CENTRE: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """The centre in chunks ``[4, 8, 8]`` float16: a run of DP / 4 channels for every q, the same for every g."""
    pointer = (page + CENTRE).to(tl.pointer_type(tl.float16), bitcast=True)
    q = tl.arange(0, 4)[:, None, None] + tl.zeros([1, 8, 1], tl.int32)
    out = ()
    for i in tl.static_range(DP // 32):
        start = tl.minimum(q * (DP // 4) + 8 * i, D - 8)
        out = out + (tl.load(pointer + start + tl.arange(0, 8)[None, None, :]),)
    return out


@triton.jit
def centre_scores(centre, queries, DP: tl.constexpr, N: tl.constexpr):
    """``centre . q`` as ``[8, N]``, 8 equal rows, for queries ``(even, odd)``, tuples of ``[16, N] float16``.

    A thread's chunk of the centre fills four registers of the left operand: rows g take the even pairs of channels and
    rows g + 8 the odd ones. So each product is right in one half of its rows, and the halves are added.
    """
    even = tl.zeros([16, N], tl.float32)
    odd = tl.zeros([16, N], tl.float32)
    for i in tl.static_range(DP // 32):
        x = centre[i].reshape([4, 8, 2, 2, 2]).permute(3, 1, 2, 0, 4).reshape([16, 16])
        even = tl.dot(x, queries[0][i], even)
        odd = tl.dot(x, queries[1][i], odd)
    first, _ = tl.split(even.reshape([2, 8, N]).permute(1, 2, 0))
    _, second = tl.split(odd.reshape([2, 8, N]).permute(1, 2, 0))
    return first + second


@triton.jit
def load_scales(page, OFFSET: tl.constexpr):
    """Scale bytes of 64 tokens as four ``[16]``, one per tile: small enough to be loaded in the layout of their use."""
    r = tl.arange(0, 16)
    token = r % 8 * 2 + r // 8
    out = ()
    for m in tl.static_range(4):
        out = out + (tl.load(page + (OFFSET + 16 * m + token)),)
    return out


@triton.jit
def max4(x):
    """Elementwise largest of four tiles."""
    return tl.maximum(tl.maximum(x[0], x[1]), tl.maximum(x[2], x[3]))
