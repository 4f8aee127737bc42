"""Attention of one token's query rows to exact tokens, a tile at a time: sinks and window of a decode call."""

import triton
import triton.language as tl

from homkv.attention.triton.lanes import NEVER, dot16, prefetch_bytes


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
def prefetch_tile(
    X, slot, head, tile, exact_tokens, D: tl.constexpr, HEADS: tl.constexpr, EXACT_TILE: tl.constexpr
):  # fmt: skip
    """Bring a tile of exact keys or values into the L2 cache."""
    BYTES: tl.constexpr = D * X.dtype.element_ty.primitive_bitwidth // 8
    at = ((slot.to(tl.int64) * HEADS + head) * exact_tokens + tile * EXACT_TILE) * BYTES
    limit = (exact_tokens - tile * EXACT_TILE) * BYTES
    prefetch_bytes(X.to(tl.int64, bitcast=True) + at + tl.zeros([32], tl.int64), limit, EXACT_TILE * BYTES)


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
    if q.dtype == k.dtype and q.dtype != tl.float32:
        s = dot16(k, q, tl.zeros([TILE, N], tl.float32))
    else:
        s = tl.dot(k.to(tl.float32), q.to(tl.float32), input_precision="tf32x3")
    s = tl.where((t < stop)[:, None], s * scale_log2, 3 * NEVER)
    m = tl.max(s, 0)
    p = tl.exp2(s - m[None, :])
    v = tl.load(V + t[None, :] * D + d[:, None], mask=(t < stop)[None, :] & (d < D)[:, None], other=0.0)
    return weigh_exact(v, p, tl.zeros([DP, N], tl.float32)), m, tl.sum(p, 0)


@triton.jit
def store_tiles(
    Q, ExactK, ExactV, length, slot, ExactO, ExactM, ExactL, first, stop, b, head, stride_b, stride_h, stride_t,
    exact_tokens, scale_log2, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, Q_LEN: tl.constexpr,
    HEADS: tl.constexpr, EXACT_TILE: tl.constexpr, EXACT_TILES: tl.constexpr,
):  # fmt: skip
    """Partial outputs of tiles ``first .. stop - 1`` of one sequence and kv head.

    ``ExactO [batch, HEADS, EXACT_TILES, ROWS, D]``, maxima and denominators ``[batch, HEADS, EXACT_TILES, ROWS]``.
    """
    N: tl.constexpr = 8 if ROWS <= 8 else 16
    exact = (slot.to(tl.int64) * HEADS + head) * exact_tokens * D
    d = tl.arange(0, DP)
    n = tl.arange(0, N)
    own = n < ROWS
    for tile in tl.range(first, stop, num_stages=1):
        q_row, live = query_rows(Q, b, head, stride_b, stride_h, stride_t, ROWS, Q_LEN, N, N)
        o, m, l = exact_tile(
            ExactK + exact, ExactV + exact, tile * EXACT_TILE, length, q_row, live, scale_log2, D, DP, N, EXACT_TILE
        )
        row = ((b * HEADS + head) * EXACT_TILES + tile).to(tl.int64) * ROWS + n
        tl.store(ExactM + row, m, mask=own)
        tl.store(ExactL + row, l, mask=own)
        tl.store(ExactO + row[None, :] * D + d[:, None], o, mask=own[None, :] & (d < D)[:, None])
