"""What a decode call does once per query: slot order, Hadamard and int8 of the queries, and the exact tokens."""

import triton
import triton.language as tl

from homkv.attention.triton.lanes import NEVER, dot16, hadamard, to_int8


@triton.constexpr_function
def count_steps(classes, count):
    """Steps of 32 channels in the first ``count`` classes."""
    return sum((width + 31) // 32 for _, width, *_ in classes[:count])


@triton.jit
def store_codes(q_row, Order, live, codes, CLASSES: tl.constexpr, C: tl.constexpr, N: tl.constexpr):
    """Quantize one class and store it as right operands ``[steps, N, 32]`` int8; returns ``max |q| / 127 [N]``."""
    WIDTH: tl.constexpr = CLASSES[C][1]
    PADDED: tl.constexpr = max(32, triton.next_power_of_2(WIDTH))
    c = tl.arange(0, PADDED)
    channel = tl.load(Order + CLASSES[C][0] + c, mask=c < WIDTH, other=0)
    q = tl.load(q_row[:, None] + channel[None, :], mask=live[:, None] & (c < WIDTH)[None, :], other=0.0)
    q = hadamard(q.to(tl.float32), N, PADDED, WIDTH & -WIDTH)
    largest = tl.max(tl.abs(q), 1)
    code = to_int8(q * tl.where(largest > 0, tl.div_rn(127.0, largest), 0.0)[:, None])
    n = tl.arange(0, N)
    tl.store(codes + (c // 32 * (32 * N) + c % 32)[None, :] + n[:, None] * 32, code, mask=(c < (WIDTH + 31) // 32 * 32)[None, :])
    return tl.div_rn(largest, 127.0)


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
def query_rows(
    Q,
    b,
    head,
    stride_b,
    stride_h,
    stride_t,
    ROWS: tl.constexpr,
    Q_LEN: tl.constexpr,
    COLUMNS: tl.constexpr,
    N: tl.constexpr,
):
    """Pointers to the query rows of one kv head, ``[N]``, and which of them exist. Columns repeat after COLUMNS."""
    n = tl.arange(0, N) % COLUMNS
    row = (head * (ROWS // Q_LEN) + n // Q_LEN) * stride_h + n % Q_LEN * stride_t
    return Q + b.to(tl.int64) * stride_b + row, n < ROWS


@triton.jit
def weigh_exact(v, p, o):
    """``o + v . p`` with 16-bit ``v`` and float32 weights up to 1, split into as many 16-bit terms as carry them."""
    if v.dtype == tl.float32:
        return tl.dot(v, p, o, input_precision="tf32x3")
    else:
        high = p.to(v.dtype)
        rest = p - high.to(tl.float32)
        low = rest.to(v.dtype)
        o = dot16(v, low, dot16(v, high, o))
        if v.dtype == tl.bfloat16:
            o = dot16(v, (rest - low.to(tl.float32)).to(v.dtype), o)
        return o


@triton.jit
def exact_tile(
    K, V, first, stop, q_row, live, scale_log2, D: tl.constexpr, DP: tl.constexpr, N: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Attention over exact tokens ``first .. stop - 1`` of one head: output ``[DP, N]``, maximum, denominator."""
    t = first + tl.arange(0, TILE)
    d = tl.arange(0, DP)
    q = tl.load(q_row[None, :] + d[:, None], mask=live[None, :] & (d < D)[:, None], other=0.0)
    k = tl.load(K + t[:, None] * D + d[None, :], mask=(t < stop)[:, None] & (d < D)[None, :], other=0.0)
    v = tl.load(V + t[None, :] * D + d[:, None], mask=(t < stop)[None, :] & (d < D)[:, None], other=0.0)
    if q.dtype == k.dtype and q.dtype != tl.float32:
        s = dot16(k, q, tl.zeros([TILE, N], tl.float32))
    else:
        s = tl.dot(k.to(tl.float32), q.to(tl.float32), input_precision="tf32x3")
    s = tl.where((t < stop)[:, None], s * scale_log2, 3 * NEVER)
    m = tl.max(s, 0)
    p = tl.exp2(s - m[None, :])
    return weigh_exact(v, p, tl.zeros([DP, N], tl.float32)), m, tl.sum(p, 0)


@triton.jit(do_not_specialize=["exact_tokens", "num_slots", "stride_b", "stride_h", "stride_t"])
def prepare_kernel(
    Q, Order, Codes, Units, Centre, ExactK, ExactV, ExactLen, Slots, ExactO, ExactM, ExactL, exact_tokens, num_slots,
    stride_b, stride_h, stride_t, scale_log2,
    K: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr, N: tl.constexpr,
    COLUMNS: tl.constexpr, SPLIT: tl.constexpr, Q_LEN: tl.constexpr, EXACT_TILE: tl.constexpr,
    EXACT_TILES: tl.constexpr, QUERIES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (batch, HEADS, (len(K) + 1) * QUERIES + EXACT_TILES): one class of the queries each, the centre, tiles of exact tokens.

    ``Codes [batch, HEADS, steps, N, 32] int8``; ``Units [batch, HEADS, len(K) + 1, N] float32``, what one unit of a
    class's codes is worth in the score, base 2, and last one of the centre's operand;
    ``Centre [batch, HEADS, 1 or 2, 2, N, DP / 2] float16``; ``ExactO [batch, HEADS, EXACT_TILES, ROWS, D]`` with the
    maxima and denominators of the tiles.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    b = tl.program_id(0)
    head = tl.program_id(1)
    part = tl.program_id(2) + (0 if QUERIES else len(K) + 1)
    q_row, live = query_rows(Q, b, head, stride_b, stride_h, stride_t, ROWS, Q_LEN, COLUMNS, N)
    at = b * HEADS + head
    n = tl.arange(0, N)
    if part <= len(K):
        unit = tl.zeros([N], tl.float32)
        codes = Codes + at.to(tl.int64) * (count_steps(K, len(K)) * 32 * N)
        for c in tl.static_range(len(K)):
            if part == c:
                unit = store_codes(q_row, Order, live, codes + count_steps(K, c) * 32 * N, K, c, N)
        if part == len(K):
            unit = store_centre(q_row, Order, live, Centre + at.to(tl.int64) * (DP * N * (1 + SPLIT)), D, DP, N, SPLIT)
        tl.store(Units + (at * (len(K) + 1) + part) * N + n, unit * scale_log2)
    else:
        start = (part - len(K) - 1) * EXACT_TILE
        length = tl.minimum(tl.load(ExactLen + b), exact_tokens)
        if start < length:
            slot = tl.minimum(tl.maximum(tl.load(Slots + b), 0), num_slots - 1)
            exact = (slot * HEADS + head).to(tl.int64) * exact_tokens * D
            o, m, l = exact_tile(
                ExactK + exact, ExactV + exact, start, length, q_row, live, scale_log2, D, DP, N, EXACT_TILE
            )
            d = tl.arange(0, DP)
            own = n < ROWS
            row = (at * EXACT_TILES + part - len(K) - 1).to(tl.int64) * ROWS + n
            tl.store(ExactM + row, m, mask=own)
            tl.store(ExactL + row, l, mask=own)
            tl.store(ExactO + row[None, :] * D + d[:, None], o, mask=own[None, :] & (d < D)[:, None])
