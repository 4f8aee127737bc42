"""What a decode call does beside the pages: attention to the exact tokens, a tile per program."""

import triton
import triton.language as tl

from homkv.attention.triton.lanes import NEVER, dot16


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
def exact_tokens_kernel(
    Q, ExactK, ExactV, ExactLen, Slots, ExactO, ExactM, ExactL, exact_tokens, num_slots, stride_b, stride_h, stride_t,
    scale_log2,
    D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, Q_LEN: tl.constexpr, HEADS: tl.constexpr, N: tl.constexpr,
    EXACT_TILE: tl.constexpr, EXACT_TILES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (batch, HEADS, EXACT_TILES): ``ExactO [batch, HEADS, EXACT_TILES, ROWS, D]``, maxima and denominators.

    The pages' kernel, which is launched behind this one, may start when all programs have begun.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    b = tl.program_id(0)
    head = tl.program_id(1)
    tile = tl.program_id(2)
    length = tl.minimum(tl.load(ExactLen + b), exact_tokens)
    if tile * EXACT_TILE < length:
        q_row, live = query_rows(Q, b, head, stride_b, stride_h, stride_t, ROWS, Q_LEN, N, N)
        slot = tl.minimum(tl.maximum(tl.load(Slots + b), 0), num_slots - 1)
        exact = (slot * HEADS + head).to(tl.int64) * exact_tokens * D
        o, m, l = exact_tile(
            ExactK + exact, ExactV + exact, tile * EXACT_TILE, length, q_row, live, scale_log2, D, DP, N, EXACT_TILE
        )
        d = tl.arange(0, DP)
        n = tl.arange(0, N)
        own = n < ROWS
        row = ((b * HEADS + head) * EXACT_TILES + tile).to(tl.int64) * ROWS + n
        tl.store(ExactM + row, m, mask=own)
        tl.store(ExactL + row, l, mask=own)
        tl.store(ExactO + row[None, :] * D + d[:, None], o, mask=own[None, :] & (d < D)[:, None])
