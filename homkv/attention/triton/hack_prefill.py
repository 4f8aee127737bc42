"""HACK's own prefill on a GPU: causal attention of a prompt on codes that never become pages."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from homkv.attention.triton.checks import EXACT_DTYPES, MAX_GRID
from homkv.attention.triton.hack_common import is_stochastic, noise_keys, quantize, uniform_noise
from homkv.attention.triton.hack_fragments import OFFSET, padded
from homkv.attention.triton.lanes import LOG2E, MAGIC, MAGIC_BITS, NEVER
from homkv.attention.triton.runtime import check_device
from homkv.errors import DTypeError, ShapeError, UnsupportedError
from homkv.formats.hack import HackCodec


@triton.jit(do_not_specialize=["length", "key", "tokens"])
def expand_keys_kernel(
    KIn, K8, Numbers, length, tokens, key, stride_b, stride_g, stride_t, G,
    T: tl.constexpr, SIZE: tl.constexpr, BITS: tl.constexpr, D: tl.constexpr, STOCHASTIC: tl.constexpr,
):  # fmt: skip
    """Quantize keys per token and partition. Grid (blocks, partitions, batch * G).

    ``K8 [batch * G, tokens, partitions * padded] int8``: ``code - 2^(b-1)``, zero behind a partition and the prompt.
    ``Numbers [batch * G, partitions, 3, tokens] float32``: scale, scale times the sum of lanes, what a lane of 0 stands
    for.
    """
    WIDTH: tl.constexpr = padded(SIZE)
    PARTS: tl.constexpr = D // SIZE
    p = tl.program_id(1)
    head = tl.program_id(2)
    t = tl.program_id(0) * T + tl.arange(0, T)[:, None]
    c = tl.arange(0, WIDTH)[None, :]
    inside = (t < length) & (c < SIZE)
    k = KIn + (head // G).to(tl.int64) * stride_b + (head % G).to(tl.int64) * stride_g + t.to(tl.int64) * stride_t
    x = tl.load(k + p * SIZE + c, mask=inside, other=0.0).to(tl.float32)
    noise = 0.0
    if STOCHASTIC:
        noise = uniform_noise(key, t, p * SIZE + c)
    # Tokens behind the prompt are quantized as zeros.
    code, scale, low = quantize(x, (t >= 0) & (c < SIZE), noise, BITS, STOCHASTIC, (1,))
    lane = tl.where(inside, code - (1 << (BITS - 1)), 0.0)
    tl.store(K8 + (head.to(tl.int64) * tokens + t) * (PARTS * WIDTH) + p * WIDTH + c, lane.to(tl.int8))
    numbers = Numbers + (head * PARTS + p).to(tl.int64) * 3 * tokens + t
    tl.store(numbers, scale)
    tl.store(numbers + tokens, scale * tl.sum(lane, 1, keep_dims=True))
    tl.store(numbers + 2 * tokens, low + scale * (1 << (BITS - 1)))


@triton.jit(do_not_specialize=["key", "blocks"])
def expand_values_kernel(
    VIn, V8, Numbers, blocks, key, stride_b, stride_g, stride_t, G,
    T: tl.constexpr, CHUNK: tl.constexpr, BITS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):  # fmt: skip
    """Quantize whole blocks of values per channel. Grid (blocks, DP / CHUNK, batch * G).

    ``V8 [batch * G, DP, blocks * T] int8``: ``code - 2^(b-1)``. ``Numbers [batch * G, blocks, 3, DP] float32``: scale,
    scale times the sum of lanes, what a lane of 0 stands for. Channels from D on are zeros.
    """
    head = tl.program_id(2)
    t = tl.program_id(0) * T + tl.arange(0, T)[:, None]
    c = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)[None, :]
    inside = (t >= 0) & (c < D)
    v = VIn + (head // G).to(tl.int64) * stride_b + (head % G).to(tl.int64) * stride_g + t.to(tl.int64) * stride_t
    x = tl.load(v + c, mask=inside, other=0.0).to(tl.float32)
    noise = 0.0
    if STOCHASTIC:
        noise = uniform_noise(key, t, c)
    code, scale, low = quantize(x, (t >= 0) & (c >= 0), noise, BITS, STOCHASTIC, (0,))
    lane = code - (1 << (BITS - 1))
    at = V8 + (head.to(tl.int64) * DP + tl.trans(c)) * (blocks * T) + tl.trans(t)
    tl.store(at, tl.trans(lane).to(tl.int8))
    numbers = Numbers + (head.to(tl.int64) * blocks + tl.program_id(0)) * 3 * DP + c
    tl.store(numbers, scale)
    tl.store(numbers + DP, scale * tl.sum(lane, 0, keep_dims=True))
    tl.store(numbers + 2 * DP, low + scale * (1 << (BITS - 1)))


@triton.jit
def round_query(q_row, live, scale_log2, p, SIZE: tl.constexpr):
    """One partition of query rows in 8 bits, ``q ~ step (code + 128) + low``.

    Returns the codes ``[ROWS, padded] int8`` and, base 2, ``step``, ``low + 128 step`` and the sum of the rounded row.
    """
    c = tl.arange(0, padded(SIZE))[None, :]
    q = tl.load(q_row[:, None] + p * SIZE + c, mask=live[:, None] & (c < SIZE), other=0.0).to(tl.float32)
    low = tl.min(tl.where(c < SIZE, q, float("inf")), 1)
    step = tl.div_rn(tl.max(tl.where(c < SIZE, q, float("-inf")), 1) - low, 255.0)
    u = tl.div_rn(q - low[:, None], tl.broadcast_to(tl.where(step > 0, step, 1.0)[:, None], q.shape))
    code = tl.where(c < SIZE, (tl.minimum(tl.maximum(u, 0.0), 255.0) + MAGIC) - MAGIC - OFFSET, 0.0)
    low += step * OFFSET
    total = step * tl.sum(code, 1) + low * SIZE
    return code.to(tl.int8), step * scale_log2, low * scale_log2, total * scale_log2


@triton.jit
def block_scores(query, keys, numbers, tokens, SUMS: tl.constexpr, SIZE: tl.constexpr, T: tl.constexpr):
    """Scores of query rows with a block of keys ``[ROWS, T]``, base 2; pointers to the block's first token."""
    WIDTH: tl.constexpr = padded(SIZE)
    t = tl.arange(0, T)
    c = tl.arange(0, WIDTH)
    s = tl.zeros([query[0][0].shape[0], T], tl.float32)
    for p in tl.static_range(len(query)):
        code, step, low, total = query[p]
        k = tl.load(keys + t[:, None] * (len(query) * WIDTH) + p * WIDTH + c[None, :])
        scale = tl.load(numbers + p * 3 * tokens + t)
        minimum = tl.load(numbers + (p * 3 + 2) * tokens + t)
        sums = numbers + (p * 3 + 1) * tokens + t
        sums = tl.load(sums) if SUMS else scale * tl.sum(k.to(tl.int32), 1).to(tl.float32)
        acc = tl.dot(code, k.T, out_dtype=tl.int32).to(tl.float32)
        # The product comes first: its layout is the one to add the rest in.
        product = (acc * scale[None, :]) * step[:, None]
        s = product if p == 0 else s + product
        s += sums[None, :] * low[:, None]
        s += minimum[None, :] * total[:, None]
    return s


@triton.jit
def soften(s, visible, state, MASK: tl.constexpr):
    """Softmax weights relative to the block's maximum; returns them, what they are worth, and the new (decay, m, l)."""
    m, l = state
    if MASK:
        s = tl.where(visible, s, NEVER)
    peak = tl.max(s, 1)
    top = tl.maximum(m, peak)
    p = tl.exp2(s - peak[:, None])
    if MASK:
        p = tl.where(visible, p, 0.0)
    share = tl.exp2(peak - top)
    decay = tl.exp2(m - top)
    return p, share, decay, top, l * decay + tl.sum(p, 1) * share


@triton.jit
def add_codes(
    o, p, share, decay, values, numbers, row_bytes, SUMS: tl.constexpr, CHUNK: tl.constexpr, DP: tl.constexpr
):  # fmt: skip
    """Add a block's values to the output's chunks, weights rounded to 8 bits: ``p ~ step (code + 128) + low``."""
    T: tl.constexpr = p.shape[1]
    low = tl.min(p, 1)
    step = (tl.max(p, 1) - low) * (1.0 / 255.0)
    inverse = tl.where(step > 0, 1.0 / step, 0.0)
    code = ((p - low[:, None]) * inverse[:, None] + (MAGIC - OFFSET)).to(tl.int32, bitcast=True) - MAGIC_BITS
    low += step * OFFSET
    total = share * (step * tl.sum(code, 1).to(tl.float32) + low * T)
    code = code.to(tl.int8)
    by_product, by_sum = share * step, share * low
    t = tl.arange(0, T)
    out = ()
    for i in tl.static_range(len(o)):
        c = i * CHUNK + tl.arange(0, CHUNK)
        v = tl.load(values + c[:, None].to(tl.int64) * row_bytes + t[None, :])
        scale = tl.load(numbers + c)
        minimum = tl.load(numbers + 2 * DP + c)
        sums = tl.load(numbers + DP + c) if SUMS else scale * tl.sum(v.to(tl.int32), 1).to(tl.float32)
        acc = tl.dot(code, v.T, out_dtype=tl.int32).to(tl.float32)
        x = o[i] * decay[:, None] + sums[None, :] * by_sum[:, None]
        x += minimum[None, :] * total[:, None]
        x += (acc * scale[None, :]) * by_product[:, None]
        out = out + (x,)
    return out


@triton.jit
def add_exact(o, p, share, decay, v, stride_t, here, D: tl.constexpr, SIZE: tl.constexpr):
    """Add exact values to the output's chunks of SIZE channels, padded; ``v``: pointer to the first of the tokens."""
    t = tl.arange(0, p.shape[1])
    c = tl.arange(0, o[0].shape[1])
    w = p * share[:, None]
    out = ()
    for i in tl.static_range(len(o)):
        inside = here[:, None] & ((c < SIZE) & (i * SIZE + c < D))[None, :]
        at = v + t[:, None].to(tl.int64) * stride_t + i * SIZE + c[None, :]
        x = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        out = out + (tl.dot(w, x, o[i] * decay[:, None], input_precision="tf32x3"),)
    return out


@triton.jit
def store_rows(O, o, l, at, row, length, D: tl.constexpr, SIZE: tl.constexpr):
    """Store the output's chunks of SIZE channels, divided by the denominators; ``at``: first row of the head."""
    c = tl.arange(0, o[0].shape[1])[None, :]
    out = O + (at.to(tl.int64) + row)[:, None] * D
    for i in tl.static_range(len(o)):
        inside = (row < length)[:, None] & (c < SIZE) & (i * SIZE + c < D)
        tl.store(out + i * SIZE + c, (o[i] / l[:, None]).to(O.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["length", "num_keys", "tokens", "blocks", "offset"])
def hack_prefill_kernel(
    Q, K8, KNumbers, V8, VNumbers, VTail, O, length, num_keys, tokens, blocks, offset, stride_b, stride_h, stride_t,
    v_stride_b, v_stride_g, v_stride_t, scale_log2, G,
    GROUP: tl.constexpr, T: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, CHUNK: tl.constexpr,
    SUMS: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """Causal attention of M queries of one head. Grid (query blocks, H, batch), the longest rows first.

    ``K8 KNumbers V8 VNumbers``: as the kernels above leave them. ``VTail``: values behind the whole blocks, as stored.
    """
    PARTS: tl.constexpr = D // SIZE
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * M
    h = tl.program_id(1)
    b = tl.program_id(2)
    head = (b * G + h // GROUP).to(tl.int64)
    row = first + tl.arange(0, M)
    q_row = Q + b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h + row.to(tl.int64) * stride_t
    query = ()
    for part in tl.static_range(PARTS):
        query = query + (round_query(q_row, row < length, scale_log2, part, SIZE),)
    o = ()
    for _ in tl.static_range(DP // CHUNK):
        o = o + (tl.zeros([M, CHUNK], tl.float32),)
    m = tl.full([M], NEVER, tl.float32)
    l = tl.zeros([M], tl.float32)
    k_row: tl.constexpr = PARTS * padded(SIZE)
    keys = K8 + head * tokens * k_row
    k_numbers = KNumbers + head * (PARTS * 3) * tokens
    values = V8 + head * DP * (blocks * T)
    v_numbers = VNumbers + head * (blocks * 3 * DP)

    n = tl.arange(0, T)
    last = offset + row
    seen = tl.minimum(blocks, (offset + first + 1) // T)
    for j in tl.range(0, seen):
        s = block_scores(query, keys + j * (T * k_row), k_numbers + j * T, tokens, SUMS, SIZE, T)
        p, share, decay, m, l = soften(s, True, (m, l), False)
        o = add_codes(o, p, share, decay, values + j * T, v_numbers + j * (3 * DP), blocks * T, SUMS, CHUNK, DP)
    for j in tl.range(seen, tl.minimum(blocks, tl.cdiv(offset + first + M, T)), num_stages=1):
        s = block_scores(query, keys + j * (T * k_row), k_numbers + j * T, tokens, SUMS, SIZE, T)
        p, share, decay, m, l = soften(s, (j * T + n)[None, :] <= last[:, None], (m, l), True)
        o = add_codes(o, p, share, decay, values + j * T, v_numbers + j * (3 * DP), blocks * T, SUMS, CHUNK, DP)
    start = blocks * T
    if (start < num_keys) & (start < offset + first + M):
        s = block_scores(query, keys + blocks * (T * k_row), k_numbers + start, tokens, SUMS, SIZE, T)
        p, share, decay, m, l = soften(s, (start + n)[None, :] <= last[:, None], (m, l), True)
        v = VTail + b.to(tl.int64) * v_stride_b + (h // GROUP).to(tl.int64) * v_stride_g
        o = add_exact(o, p, share, decay, v, v_stride_t, start + n < num_keys, D, CHUNK)

    store_rows(O, o, l, (b * tl.num_programs(1) + h) * length, row, length, D, CHUNK)


@dataclass(frozen=True)
class PrefillConfig:
    """What does not change the result beyond rounding: tile height, channels of the output at a time, warps, stages."""

    rows: int = 128
    chunk: int = 64
    warps: int = 8
    stages: int = 3


def default_config(codec: HackCodec) -> PrefillConfig:
    """Tiles that fit the registers: large heads and blocks take fewer rows."""
    small = codec.head_dim <= 128 and codec.page_tokens <= 64
    return PrefillConfig() if small else PrefillConfig(rows=64, chunk=32, warps=4, stages=2)


def hack_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    codec: HackCodec,
    softmax_scale: float,
    causal_offset: int = 0,
    config: PrefillConfig | None = None,
) -> Tensor:
    """Causal attention on codes, ``o [B, H, T, D]`` in q's dtype: homkv.formats.hack_prefill.quantized_prefill.

    ``q [B, H, T, D]``; ``k v [B, G, T + causal_offset, D]`` from position 0, float16, bfloat16 or float32, the last
    dimension contiguous. With requantization elimination the call can be captured in a CUDA graph. Values that are not
    finite are not refused. Raises ShapeError, DTypeError, UnsupportedError.
    """
    check_prefill(q, k, v, codec.head_dim, causal_offset)
    o, config = torch.empty(q.shape, dtype=q.dtype, device=q.device), config or default_config(codec)
    if q.numel() == 0:
        return o
    block, dim, num_keys = codec.page_tokens, codec.head_dim, k.shape[2]
    blocks, width = num_keys // block, triton.next_power_of_2(dim)
    chunk = min(config.chunk, width)
    shape = {"T": block, "SIZE": codec.partition, "D": dim, "DP": width, "CHUNK": chunk}
    operands = expand(k, v, codec, shape)
    tail = codec.requantize_window(v[:, :, blocks * block :], blocks * block)
    tail = tail if tail.stride(-1) == 1 else tail.contiguous()
    hack_prefill_kernel[(triton.cdiv(q.shape[2], config.rows), q.shape[1], q.shape[0])](
        q, *operands, tail, o, q.shape[2], num_keys, operands[0].shape[1], blocks, causal_offset, *q.stride()[:3],
        *tail.stride()[:3], softmax_scale * LOG2E.value, k.shape[1], GROUP=q.shape[1] // k.shape[1], **shape,
        SUMS=codec.options.summation_elimination, M=config.rows, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return o


def expand(k: Tensor, v: Tensor, codec: HackCodec, shape: dict[str, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes as int8 and their numbers, of keys and of whole blocks of values: what the kernels above document."""
    (batch, groups, num_keys, dim), block, device = k.shape, codec.page_tokens, k.device
    blocks, heads, parts = num_keys // block, batch * groups, dim // codec.partition
    tokens = triton.cdiv(num_keys, block) * block
    k8 = torch.empty(heads, tokens, parts * padded(codec.partition), dtype=torch.int8, device=device)
    v8 = torch.empty(heads, shape["DP"], max(blocks, 1) * block, dtype=torch.int8, device=device)
    k_numbers = torch.empty(heads, parts, 3, tokens, device=device)
    v_numbers = torch.empty(heads, max(blocks, 1), 3, shape["DP"], device=device)
    k_key, v_key = noise_keys(codec)
    options = {"T": block, "BITS": codec.options.bits, "D": dim, "STOCHASTIC": is_stochastic(codec)}
    options["enable_fp_fusion"] = False
    expand_keys_kernel[(tokens // block, parts, heads)](
        k, k8, k_numbers, num_keys, tokens, k_key, *k.stride()[:3], groups, SIZE=codec.partition, **options
    )
    if blocks:
        expand_values_kernel[(blocks, shape["DP"] // shape["CHUNK"], heads)](
            v, v8, v_numbers, blocks, v_key, *v.stride()[:3], groups, CHUNK=shape["CHUNK"], DP=shape["DP"], **options
        )
    return k8, k_numbers, v8, v_numbers


def check_prefill(q: Tensor, k: Tensor, v: Tensor, head_dim: int, causal_offset: int) -> None:
    """Check the arguments of a quantized prefill. Raises ShapeError, DTypeError, UnsupportedError."""
    fits = q.ndim == k.ndim == 4 and q.shape[-1] == head_dim and causal_offset >= 0
    fits = fits and k.shape[1] > 0 and q.shape[1] % k.shape[1] == 0
    if not fits or not k.shape == v.shape == (q.shape[0], k.shape[1], q.shape[2] + causal_offset, head_dim):
        raise ShapeError(
            f"expected q [B, H, T, D={head_dim}] and k, v [B, G, T + {causal_offset}, D] with G dividing H, found "
            f"{tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}; pass all keys from position 0"
        )
    if any(x.dtype not in EXACT_DTYPES or x.device != q.device for x in (q, k, v)):
        raise DTypeError(
            f"expected float16, bfloat16 or float32 on one device, found {q.dtype} on {q.device}, {k.dtype} on "
            f"{k.device} and {v.dtype} on {v.device}; cast or move them"
        )
    if q.numel() and not q.stride(-1) == k.stride(-1) == v.stride(-1) == 1:
        strides = f"{q.stride()}, {k.stride()}, {v.stride()}"
        raise ShapeError(f"expected a contiguous last dimension, found strides {strides}; call .contiguous()")
    if max(q.shape[0], q.shape[1], k.shape[0] * k.shape[1]) > MAX_GRID:
        raise UnsupportedError(f"expected at most {MAX_GRID} heads, found q {tuple(q.shape)}; split the batch")
    check_device(q.device)
