"""Prefill on the codes of `hack-2026`, whose own prefill is exact: the algebra of its decode, for comparison."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from homkv.attention.triton.hack_common import quantize
from homkv.attention.triton.hack_fragments import OFFSET, padded
from homkv.attention.triton.hack_prefill import PrefillConfig, add_exact, check_prefill, soften, store_rows
from homkv.attention.triton.lanes import LOG2E, MAGIC, MAGIC_BITS, NEVER
from homkv.formats.hack2026 import Hack2026Codec


@triton.jit
def load_block(X, head, stride_b, stride_g, stride_t, G, t, p, SIZE: tl.constexpr):
    """One partition of the tokens ``t`` of a head, ``[T, padded]`` float32 with zeros behind it."""
    c = tl.arange(0, padded(SIZE))[None, :]
    x = X + (head // G).to(tl.int64) * stride_b + (head % G).to(tl.int64) * stride_g
    return tl.load(x + t[:, None].to(tl.int64) * stride_t + p * SIZE + c, mask=c < SIZE, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["sinks", "blocks"])
def expand_kernel(
    KIn, VIn, K8, KNumbers, KSums, V8, VNumbers, VSums, sinks, blocks, stride_kb, stride_kg, stride_kt, stride_vb,
    stride_vg, stride_vt, G, T: tl.constexpr, SIZE: tl.constexpr, BITS: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Quantize whole blocks: keys per channel, values per token and partition. Grid (blocks, partitions, heads).

    Channels ``c = partition * padded + i`` of C, tokens ``t`` of S = blocks * T. Lanes ``code - 2^(b-1)``, zero behind
    a partition: ``K8 [heads, S, C] int8``, ``V8 [heads, C, S] int8``. Scale, and what a lane of 0 stands for:
    ``KNumbers [heads, blocks, 2, C]``, ``VNumbers [heads, partitions, 2, S]``. Sums of lanes:
    ``KSums [heads, partitions, S]``, ``VSums [heads, blocks, C]``; all float32.
    """
    WIDTH: tl.constexpr = padded(SIZE)
    PARTS: tl.constexpr = D // SIZE
    HALF: tl.constexpr = 1 << (BITS - 1)
    j = tl.program_id(0)
    p = tl.program_id(1)
    head = tl.program_id(2)
    wide = head.to(tl.int64)
    t = j * T + tl.arange(0, T)
    c = tl.arange(0, WIDTH)[None, :]
    inside = (t[:, None] >= 0) & (c < SIZE)
    x = load_block(KIn, head, stride_kb, stride_kg, stride_kt, G, sinks + t, p, SIZE)
    code, scale, low = quantize(x, (t[:, None] >= 0) & (c >= 0), 0.0, BITS, False, (0,))
    lane = tl.where(inside, code - HALF, 0.0)
    tl.store(K8 + (wide * blocks * T + t)[:, None] * (PARTS * WIDTH) + p * WIDTH + c, lane.to(tl.int8))
    tl.store(KSums + (wide * PARTS + p) * blocks * T + t, tl.sum(lane, 1))
    numbers = KNumbers + (wide * blocks + j) * (2 * PARTS * WIDTH) + p * WIDTH + c
    tl.store(numbers, scale)
    tl.store(numbers + PARTS * WIDTH, low + scale * HALF)

    x = load_block(VIn, head, stride_vb, stride_vg, stride_vt, G, sinks + t, p, SIZE)
    code, scale, low = quantize(x, inside, 0.0, BITS, False, (1,))
    lane = tl.where(inside, code - HALF, 0.0)
    row = V8 + (wide * PARTS * WIDTH + p * WIDTH + tl.trans(c)) * (blocks * T)
    tl.store(row + t[None, :], tl.trans(lane).to(tl.int8))
    tl.store(VSums + (wide * blocks + j) * (PARTS * WIDTH) + p * WIDTH + c, tl.sum(lane, 0, keep_dims=True))
    numbers = VNumbers + (wide * PARTS + p) * 2 * blocks * T + t[:, None]
    tl.store(numbers, scale)
    tl.store(numbers + blocks * T, low + scale * HALF)


@triton.jit
def round_rows(x, inside):
    """Rows in 8 bits, ``x ~ step (code + 128) + low``: codes int8, zero outside, ``step`` and ``low + 128 step``."""
    low = tl.min(tl.where(inside, x, float("inf")), 1)
    step = (tl.max(tl.where(inside, x, float("-inf")), 1) - low) * (1.0 / 255.0)
    inverse = tl.where(step > 0, 1.0 / step, 0.0)
    code = ((x - low[:, None]) * inverse[:, None] + (MAGIC - OFFSET)).to(tl.int32, bitcast=True) - MAGIC_BITS
    return tl.where(inside, code, 0).to(tl.int8), step, low + step * OFFSET


@triton.jit
def load_query(q_row, live, p, SIZE: tl.constexpr):
    """One partition of query rows, ``[M, padded]``, zeros behind it."""
    c = tl.arange(0, padded(SIZE))[None, :]
    return tl.load(q_row[:, None] + p * SIZE + c, mask=live[:, None] & (c < SIZE), other=0.0)


@triton.jit
def block_scores(
    q_row, live, scale_log2, keys, numbers, k_sums, size, SUMS: tl.constexpr, SIZE: tl.constexpr, PARTS: tl.constexpr,
    T: tl.constexpr,
):  # fmt: skip
    """Scores of query rows with a block ``[M, T]``, base 2; pointers are to it, partitions ``size`` tokens apart."""
    WIDTH: tl.constexpr = padded(SIZE)
    t = tl.arange(0, T)
    c = tl.arange(0, WIDTH)
    rest = tl.zeros([q_row.shape[0]], tl.float32)
    s = tl.zeros([q_row.shape[0], T], tl.float32)
    for p in tl.static_range(PARTS):
        q = load_query(q_row, live, p, SIZE).to(tl.float32) * scale_log2
        rest += tl.sum(q * tl.load(numbers + (PARTS + p) * WIDTH + c)[None, :], 1)
        code, step, low = round_rows(q * tl.load(numbers + p * WIDTH + c)[None, :], (c < SIZE)[None, :])
        k = tl.load(keys + t[:, None] * (PARTS * WIDTH) + p * WIDTH + c[None, :])
        sums = tl.load(k_sums + p * size + t) if SUMS else tl.sum(k.to(tl.int32), 1).to(tl.float32)
        product = tl.dot(code, k.T, out_dtype=tl.int32).to(tl.float32) * step[:, None]
        s = product if p == 0 else s + product
        s += sums[None, :] * low[:, None]
    return s + rest[:, None]


@triton.jit
def add_codes(
    o, p, share, decay, values, numbers, v_sums, size, SUMS: tl.constexpr, T: tl.constexpr
):  # fmt: skip
    """Add a block's values to the output, a partition per chunk; weights times scales are rounded to 8 bits."""
    WIDTH: tl.constexpr = o[0].shape[1]
    t = tl.arange(0, T)
    c = tl.arange(0, WIDTH)
    out = ()
    for i in tl.static_range(len(o)):
        scale = tl.load(numbers + i * 2 * size + t)
        minimum = tl.load(numbers + (i * 2 + 1) * size + t)
        code, step, low = round_rows(p * scale[None, :], (t >= 0)[None, :])
        rest = share * tl.sum(p * minimum[None, :], 1)
        v = tl.load(values + (c[:, None] + i * WIDTH).to(tl.int64) * size + t[None, :])
        sums = tl.load(v_sums + i * WIDTH + c) if SUMS else tl.sum(v.to(tl.int32), 1).to(tl.float32)
        x = tl.dot(code, v.T, out_dtype=tl.int32).to(tl.float32) * (share * step)[:, None]
        x += o[i] * decay[:, None]
        x += sums[None, :] * (share * low)[:, None]
        out = out + (x + rest[:, None],)
    return out


@triton.jit
def exact_block(
    q_row, live, scale_log2, k, v, k_stride_t, v_stride_t, start, stop, last, state, SIZE: tl.constexpr,
    PARTS: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Add exact tokens ``start .. stop - 1``, at most T, to ``state = (o, m, l)``."""
    o, m, l = state
    t = start + tl.arange(0, T)
    c = tl.arange(0, padded(SIZE))[None, :]
    s = tl.zeros([q_row.shape[0], T], tl.float32)
    for p in tl.static_range(PARTS):
        at = k + t[:, None].to(tl.int64) * k_stride_t + p * SIZE + c
        x = tl.load(at, mask=(t < stop)[:, None] & (c < SIZE), other=0.0).to(tl.float32)
        s = tl.dot(load_query(q_row, live, p, SIZE).to(tl.float32), x.T, s, input_precision="tf32x3")
    visible = (t < stop)[None, :] & (t[None, :] <= last[:, None])
    p, share, decay, m, l = soften(s * scale_log2, visible, (m, l), True)
    o = add_exact(o, p, share, decay, v + start.to(tl.int64) * v_stride_t, v_stride_t, t < stop, PARTS * SIZE, SIZE)
    return o, m, l


@triton.jit(do_not_specialize=["length", "num_keys", "blocks", "offset", "sinks"])
def prefill_2026_kernel(
    Q, K8, KNumbers, KSums, V8, VNumbers, VSums, KIn, VIn, O, length, num_keys, blocks, offset, sinks, stride_b,
    stride_h, stride_t, k_stride_b, k_stride_g, k_stride_t, v_stride_b, v_stride_g, v_stride_t, scale_log2, G,
    GROUP: tl.constexpr, T: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr, SUMS: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """Causal attention of M queries of one head. Grid (query blocks, H, batch), the longest rows first."""
    PARTS: tl.constexpr = D // SIZE
    C: tl.constexpr = PARTS * padded(SIZE)
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * M
    h = tl.program_id(1)
    b = tl.program_id(2)
    g = h // GROUP
    head = (b * G + g).to(tl.int64)
    row = first + tl.arange(0, M)
    live = row < length
    q_row = Q + b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h + row.to(tl.int64) * stride_t
    k = KIn + b.to(tl.int64) * k_stride_b + g.to(tl.int64) * k_stride_g
    v = VIn + b.to(tl.int64) * v_stride_b + g.to(tl.int64) * v_stride_g
    size = blocks * T
    keys, k_numbers, k_sums = K8 + head * size * C, KNumbers + head * blocks * (2 * C), KSums + head * PARTS * size
    values, v_numbers, v_sums = V8 + head * C * size, VNumbers + head * PARTS * 2 * size, VSums + head * blocks * C

    o = ()
    for _ in tl.static_range(PARTS):
        o = o + (tl.zeros([M, padded(SIZE)], tl.float32),)
    m = tl.full([M], NEVER, tl.float32)
    l = tl.zeros([M], tl.float32)
    last = offset + row
    o, m, l = exact_block(
        q_row, live, scale_log2, k, v, k_stride_t, v_stride_t, first * 0, tl.minimum(sinks, num_keys), last, (o, m, l),
        SIZE, PARTS, 16,
    )  # fmt: skip
    n = sinks + tl.arange(0, T)
    seen = tl.minimum(blocks, tl.maximum(offset + first + 1 - sinks, 0) // T)
    for j in tl.range(0, seen):
        s = block_scores(
            q_row, live, scale_log2, keys + j * (T * C), k_numbers + j * (2 * C), k_sums + j * T, size, SUMS, SIZE,
            PARTS, T,
        )  # fmt: skip
        p, share, decay, m, l = soften(s, True, (m, l), False)
        o = add_codes(o, p, share, decay, values + j * T, v_numbers + j * T, v_sums + j * C, size, SUMS, T)
    reach = tl.cdiv(tl.maximum(offset + first + M - sinks, 0), T)
    for j in tl.range(seen, tl.minimum(blocks, reach), num_stages=1):
        s = block_scores(
            q_row, live, scale_log2, keys + j * (T * C), k_numbers + j * (2 * C), k_sums + j * T, size, SUMS, SIZE,
            PARTS, T,
        )  # fmt: skip
        p, share, decay, m, l = soften(s, (j * T + n)[None, :] <= last[:, None], (m, l), True)
        o = add_codes(o, p, share, decay, values + j * T, v_numbers + j * T, v_sums + j * C, size, SUMS, T)
    start = sinks + size
    if (start < num_keys) & (start < offset + first + M):
        o, m, l = exact_block(
            q_row, live, scale_log2, k, v, k_stride_t, v_stride_t, start, num_keys, last, (o, m, l), SIZE, PARTS, T
        )
    store_rows(O, o, l, (b * tl.num_programs(1) + h) * length, row, length, D, SIZE)


def hack2026_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    codec: Hack2026Codec,
    softmax_scale: float,
    causal_offset: int = 0,
    config: PrefillConfig | None = None,
) -> Tensor:
    """Causal attention on codes, ``o [B, H, T, D]`` in q's dtype: query t sees keys 0..t + causal_offset.

    ``q [B, H, T, D]``; ``k v [B, G, T + causal_offset, D]`` from position 0, float16, bfloat16 or float32, the last
    dimension contiguous. The first 4 tokens and the last, incomplete block are exact, whole blocks between them are on
    codes as ``codec.scores`` and ``codec.weigh`` have it, except that codes count from their middle and minima are
    moved there: the rounded operands meet smaller integers, and rounding costs less. Masked weights count as zeros of
    their block; the denominator sums unrounded weights. Safe in a CUDA graph; values that are not finite are not
    refused.
    Raises ShapeError, DTypeError, UnsupportedError.
    """
    check_prefill(q, k, v, codec.head_dim, causal_offset)
    o, config = torch.empty(q.shape, dtype=q.dtype, device=q.device), config or PrefillConfig(rows=64, warps=4)
    if q.numel() == 0:
        return o
    block, dim, groups, heads = codec.page_tokens, codec.head_dim, k.shape[1], k.shape[0] * k.shape[1]
    blocks, parts = codec.num_pages(k.shape[2]), dim // codec.partition
    channels, room = parts * padded(codec.partition), max(blocks, 1)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=q.device)

    operands = (
        empty(heads, room * block, channels, dtype=torch.int8), empty(heads, room, 2, channels),
        empty(heads, parts, room * block), empty(heads, channels, room * block, dtype=torch.int8),
        empty(heads, parts, 2, room * block), empty(heads, room, channels),
    )  # fmt: skip
    strides = (*k.stride()[:3], *v.stride()[:3])
    shape: dict[str, Any] = {"T": block, "SIZE": codec.partition, "D": dim}
    if blocks:
        expand_kernel[(blocks, parts, heads)](
            k, v, *operands, codec.num_sinks, blocks, *strides, groups, **shape, BITS=codec.options.bits,
            enable_fp_fusion=False,
        )  # fmt: skip
    prefill_2026_kernel[(triton.cdiv(q.shape[2], config.rows), q.shape[1], q.shape[0])](
        q, *operands, k, v, o, q.shape[2], k.shape[2], blocks, causal_offset, codec.num_sinks, *q.stride()[:3],
        *strides, softmax_scale * LOG2E.value, groups, GROUP=q.shape[1] // groups, **shape,
        SUMS=codec.options.summation_elimination, M=config.rows, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return o
