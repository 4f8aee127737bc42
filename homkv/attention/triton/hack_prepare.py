"""What a decode call on HACK pages does once per query: 8-bit queries, and attention to the exact tokens."""

import triton
import triton.language as tl

from homkv.attention.triton.hack_common import quantize, query_rows, uniform_noise
from homkv.attention.triton.hack_fragments import OFFSET, padded, slot_element
from homkv.attention.triton.lanes import MAGIC, NEVER

TERMS = tl.constexpr(4)  # numbers per query row and partition, see store_query


@triton.jit
def seen_keys(
    ExactK, at, t, stop, position, key, D: tl.constexpr, SIZE: tl.constexpr, BITS: tl.constexpr,
    STOCHASTIC: tl.constexpr, QUANTIZED: tl.constexpr,
):  # fmt: skip
    """Exact keys ``t [TILE]`` as attention sees them, ``[TILE, PARTS, padded SIZE] float32``: `hack` quantizes them.

    Partitions are padded to powers of two with zeros. ``position``: of token 0.
    """
    PARTS: tl.constexpr = triton.next_power_of_2(D // SIZE)
    part = tl.arange(0, PARTS)[None, :, None]
    c = tl.arange(0, triton.next_power_of_2(SIZE))[None, None, :]
    t = t[:, None, None]
    inside = (t < stop) & (part < D // SIZE) & (c < SIZE)
    k = tl.load(ExactK + at + t * D + part * SIZE + c, mask=inside, other=0.0).to(tl.float32)
    if QUANTIZED:
        noise = 0.0
        if STOCHASTIC:
            noise = uniform_noise(key, position + t, part * SIZE + c)
        code, scale, low = quantize(k, inside, noise, BITS, STOCHASTIC, (2,))
        k = tl.where(inside, code * scale + low, 0.0)
    return k


@triton.jit
def exact_tile(
    ExactK, ExactV, at, first, stop, q_row, live, position, key, scale_log2, D: tl.constexpr, SIZE: tl.constexpr,
    BITS: tl.constexpr, STOCHASTIC: tl.constexpr, QUANTIZED: tl.constexpr, N: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Attention over exact tokens ``first .. stop - 1`` of one head: output ``[D padded, N]``, maximum, denominator."""
    PARTS: tl.constexpr = triton.next_power_of_2(D // SIZE)
    WIDTH: tl.constexpr = triton.next_power_of_2(SIZE)
    t = first + tl.arange(0, TILE)
    k = seen_keys(ExactK, at, t, stop, position, key, D, SIZE, BITS, STOCHASTIC, QUANTIZED)
    i = tl.arange(0, PARTS * WIDTH)[:, None]
    inside = (i // WIDTH < D // SIZE) & (i % WIDTH < SIZE)
    q = tl.load(q_row[None, :] + i // WIDTH * SIZE + i % WIDTH, mask=live[None, :] & inside, other=0.0)
    s = tl.dot(k.reshape([TILE, PARTS * WIDTH]), q.to(tl.float32), input_precision="tf32x3")
    s = tl.where((t < stop)[:, None], s * scale_log2, 3 * NEVER)
    m = tl.max(s, 0)
    p = tl.exp2(s - m[None, :])
    d = tl.arange(0, triton.next_power_of_2(D))[:, None]
    v = tl.load(ExactV + at + t[None, :] * D + d, mask=(t < stop)[None, :] & (d < D), other=0.0)
    return tl.dot(v.to(tl.float32), p, input_precision="tf32x3"), m, tl.sum(p, 0)


@triton.jit
def attend_exact(
    ExactK, ExactV, ExactLen, Slots, NumPages, ExactO, ExactM, ExactL, b, head, tile, q_row, live, exact_tokens,
    num_slots, key, scale_log2, D: tl.constexpr, SIZE: tl.constexpr, T: tl.constexpr, BITS: tl.constexpr,
    STOCHASTIC: tl.constexpr, QUANTIZED: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr, N: tl.constexpr,
    TILE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Partial output over a tile of exact tokens, to ``ExactO [batch, HEADS, TILES, ROWS, D]``; none if empty."""
    length = tl.minimum(tl.load(ExactLen + b), exact_tokens)
    if tile * TILE < length:
        slot = tl.minimum(tl.maximum(tl.load(Slots + b), 0), num_slots - 1)
        at = (slot * HEADS + head).to(tl.int64) * exact_tokens * D
        position = tl.load(NumPages + b) * T  # formats that quantize their open block have no sinks
        o, m, l = exact_tile(
            ExactK, ExactV, at, tile * TILE, length, q_row, live, position, key, scale_log2, D, SIZE, BITS, STOCHASTIC,
            QUANTIZED, N, TILE,
        )  # fmt: skip
        row = ((b * HEADS + head) * TILES + tile).to(tl.int64) * ROWS + tl.arange(0, N)
        own = tl.arange(0, N) < ROWS
        d = tl.arange(0, triton.next_power_of_2(D))[:, None]
        tl.store(ExactM + row, m, mask=own)
        tl.store(ExactL + row, l, mask=own)
        tl.store(ExactO + row[None, :] * D + d, o, mask=own[None, :] & (d < D))


@triton.jit
def store_query(
    q_row, live, codes, terms, scale_log2, p, SIZE: tl.constexpr, BITS: tl.constexpr, PAIR: tl.constexpr,
    N: tl.constexpr,
):  # fmt: skip
    """Round one partition of the queries to 8 bits, ``q ~ step (code + 128) + low`` with codes from -128 to 127.

    ``codes [N, slots] int8``, in the order of load_query. ``terms [4, N]`` are what K's numbers are multiplied with,
    base 2: the step of a product of lanes, the correction of K's sums, the sum of the rounded queries; and the
    accumulator's start.
    """
    SLOTS: tl.constexpr = PAIR * padded(SIZE)
    n = tl.arange(0, N)[:, None]
    c = tl.arange(0, padded(SIZE))[None, :]
    row = (q_row + p * SIZE)[:, None]
    q = tl.load(row + c, mask=live[:, None] & (c < SIZE), other=0.0).to(tl.float32)
    low = tl.min(tl.where(c < SIZE, q, float("inf")), 1, keep_dims=True)
    step = tl.div_rn(tl.max(tl.where(c < SIZE, q, float("-inf")), 1, keep_dims=True) - low, 255.0)
    step = tl.where(step > 0, tl.maximum(step, 2.0**-80), 1.0)
    spoiled = tl.sum(q * 0.0, 1, keep_dims=True)  # NaN where the row has one: minimum and maximum pass over it

    i = tl.arange(0, SLOTS)[None, :]
    word = i // 4 % (SLOTS // 16)
    element = slot_element(i // (SLOTS // 4), word // PAIR, i % 4, SIZE, BITS)
    inside = live[:, None] & (element < SIZE) & (word % PAIR == n // (N // PAIR))
    q = tl.load(row + element, mask=inside, other=0.0).to(tl.float32)
    u = tl.div_rn(q - low, tl.broadcast_to(step, [N, SLOTS]))
    code = (tl.minimum(tl.maximum(u, 0.0), 255.0) + MAGIC) - MAGIC - OFFSET
    code = tl.where(inside, code, 0.0)
    tl.store(codes + n * SLOTS + i, code.to(tl.int8))

    total = tl.sum(code, 1, keep_dims=True)
    low += step * OFFSET
    tl.store(terms + n, step * (scale_log2 / (1 << (8 - BITS))))
    tl.store(terms + N + n, low * scale_log2)
    tl.store(terms + 2 * N + n, (step * total + SIZE * low) * scale_log2 + spoiled)
    tl.store(terms + 3 * N + n, total * OFFSET)


@triton.jit(do_not_specialize=["exact_tokens", "num_slots", "stride_b", "stride_h", "stride_t", "key"])
def prepare_kernel(
    Q, Codes, Terms, ExactK, ExactV, ExactLen, Slots, NumPages, ExactO, ExactM, ExactL, exact_tokens, num_slots,
    stride_b, stride_h, stride_t, scale_log2, key,
    PAGE: tl.constexpr, STOCHASTIC: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr, Q_LEN: tl.constexpr,
    N: tl.constexpr, PAIR: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (batch, HEADS, partitions + TILES): 8-bit queries of one partition each, then tiles of exact tokens.

    ``Codes [batch, HEADS, partitions, N, slots] int8``, ``Terms [batch, HEADS, partitions, 4, N] float32``.
    """
    T: tl.constexpr = PAGE[0]
    SIZE: tl.constexpr = PAGE[1]
    BITS: tl.constexpr = PAGE[2]
    D: tl.constexpr = PAGE[3]
    PARTS: tl.constexpr = D // SIZE
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    b = tl.program_id(0)
    head = tl.program_id(1)
    p = tl.program_id(2)
    q_row, live = query_rows(Q, tl.arange(0, N), b, head, stride_b, stride_h, stride_t, ROWS, Q_LEN, N // PAIR)
    if p < PARTS:
        at = (b * HEADS + head) * PARTS + p
        codes = Codes + at.to(tl.int64) * (N * PAIR * padded(SIZE))
        store_query(q_row, live, codes, Terms + at * (TERMS * N), scale_log2, p, SIZE, BITS, PAIR, N)
    else:
        attend_exact(
            ExactK, ExactV, ExactLen, Slots, NumPages, ExactO, ExactM, ExactL, b, head, p - PARTS, q_row, live,
            exact_tokens, num_slots, key, scale_log2, D, SIZE, T, BITS, STOCHASTIC, True, ROWS, HEADS, N, TILE, TILES,
        )  # fmt: skip


@triton.jit(do_not_specialize=["exact_tokens", "num_slots", "stride_b", "stride_h", "stride_t"])
def exact_kernel(
    Q, ExactK, ExactV, ExactLen, Slots, NumPages, ExactO, ExactM, ExactL, exact_tokens, num_slots, stride_b, stride_h,
    stride_t, scale_log2,
    PAGE: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr, Q_LEN: tl.constexpr, N: tl.constexpr,
    PAIR: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Partial outputs over sinks and open block, which are exact. Grid (batch, HEADS, TILES)."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    b = tl.program_id(0)
    head = tl.program_id(1)
    q_row, live = query_rows(Q, tl.arange(0, N), b, head, stride_b, stride_h, stride_t, ROWS, Q_LEN, N // PAIR)
    attend_exact(
        ExactK, ExactV, ExactLen, Slots, NumPages, ExactO, ExactM, ExactL, b, head, tl.program_id(2), q_row, live,
        exact_tokens, num_slots, 0, scale_log2, PAGE[3], PAGE[1], PAGE[0], PAGE[2], False, False, ROWS, HEADS, N, TILE,
        TILES,
    )  # fmt: skip
