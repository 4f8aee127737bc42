"""Prefill: causal attention of a whole prompt, in int8 or exact through torch's fastest backend."""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.tools.tensor_descriptor import TensorDescriptor

from homkv.attention.triton.checks import EXACT_DTYPES, INT32_MAX, MAX_GRID
from homkv.attention.triton.lanes import LOG2E, MAGIC, MAGIC_BITS, NEVER, to_int8
from homkv.attention.triton.runtime import check_device
from homkv.attention.triton.tiles import (
    LOWEST,
    TILE,
    has_descriptors,
    load_scale,
    load_tile,
    pack_weights,
    regroup,
    rescale,
    sum_codes,
    sum_weights,
    token_at,
)
from homkv.errors import DTypeError, ShapeError, UnsupportedError

HEAD_DIMS = (64, 80, 96, 128, 256)
STATS_CHUNKS = 32  # programs that share one head's statistics, at most
LOG2_127 = tl.constexpr(math.log2(127))


@triton.jit(do_not_specialize=["T"])
def stats_kernel(
    K, V, Stats, T, chunk, stride_kb, stride_kg, stride_kt, stride_vb, stride_vg, stride_vt, G,
    D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Per chunk of tokens and channel: sum of some keys, and sum, maximum and minimum of all values.

    Grid (chunks, B * G). ``Stats [B * G, chunks, 4, DP] float32``. Any vector may be subtracted from the keys, so the
    first BLOCK keys of a chunk are enough for a mean.
    """
    part = tl.program_id(0)
    head = tl.program_id(1)
    d = tl.arange(0, DP)
    inside = (d < D)[None, :]
    first = part * chunk
    k_row = K + (head // G).to(tl.int64) * stride_kb + (head % G).to(tl.int64) * stride_kg
    v_row = V + (head // G).to(tl.int64) * stride_vb + (head % G).to(tl.int64) * stride_vg
    # Reduced once, at the end: across warps that costs barriers.
    k_sum = tl.zeros([ROWS, DP], tl.float32)
    v_sum = tl.zeros([ROWS, DP], tl.float32)
    high = tl.full([ROWS, DP], -float("inf"), tl.float32)
    low = tl.full([ROWS, DP], float("inf"), tl.float32)
    for start in range(first, tl.minimum(first + chunk, T), ROWS):
        t = start + tl.arange(0, ROWS)
        live = (t < T)[:, None] & inside
        sampled = live & (t < first + BLOCK)[:, None]
        at = t.to(tl.int64)[:, None]
        k_sum += tl.load(k_row + at * stride_kt + d[None, :], mask=sampled, other=0.0).to(tl.float32)
        v = tl.load(v_row + at * stride_vt + d[None, :], mask=live, other=0.0).to(tl.float32)
        v_sum += v
        high = tl.maximum(high, tl.where((t < T)[:, None], v, -float("inf")))
        low = tl.minimum(low, tl.where((t < T)[:, None], v, float("inf")))
    out = Stats + (head * tl.num_programs(0) + part).to(tl.int64) * (4 * DP) + d
    tl.store(out, tl.sum(k_sum, 0))
    tl.store(out + DP, tl.sum(v_sum, 0))
    tl.store(out + 2 * DP, tl.max(high, 0))
    tl.store(out + 3 * DP, tl.min(low, 0))


@triton.jit
def channel_stats(Stats, head, chunks, chunk, T, DP: tl.constexpr, BLOCK: tl.constexpr):
    """Mean of the sampled keys, mean of the values and what one unit of a value's code is worth, ``[DP]`` each."""
    d = tl.arange(0, DP)
    row = Stats + (head * chunks).to(tl.int64) * (4 * DP) + d
    k_sum = tl.zeros([DP], tl.float32)
    v_sum = tl.zeros([DP], tl.float32)
    high = tl.full([DP], -float("inf"), tl.float32)
    low = tl.full([DP], float("inf"), tl.float32)
    count = 0
    for i in range(chunks):
        k_sum += tl.load(row + i * (4 * DP))
        v_sum += tl.load(row + i * (4 * DP) + DP)
        high = tl.maximum(high, tl.load(row + i * (4 * DP) + 2 * DP))
        low = tl.minimum(low, tl.load(row + i * (4 * DP) + 3 * DP))
        count += tl.minimum(T - i * chunk, BLOCK)
    mean = v_sum / T
    reach = tl.maximum(high - mean, mean - low)
    return k_sum / count, mean, tl.maximum(reach, 1e-30) + 0.0 * mean


@triton.jit(do_not_specialize=["T", "chunks"])
def quantize_kernel(
    K, V, Stats, K8, VT, KScale, VScale, VChannel, T, chunks, chunk, stride_kb, stride_kg, stride_kt, stride_vb,
    stride_vg, stride_vt, G, D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Quantize BLOCK tokens of one head: keys less their mean with one scale, values with channel and block scale.

    Grid (tiles, B * G). ``K8 [B * G, tiles * BLOCK, DP]``, ``VT [B * G, DP, tiles * BLOCK]`` in stored order, int8;
    tokens from T on are zeros. ``KScale VScale [B * G, tiles]``; ``VChannel [B * G, 2, DP]``: channel scale, mean.
    """
    tile = tl.program_id(0)
    head = tl.program_id(1)
    tiles = tl.num_programs(0)
    d = tl.arange(0, DP)
    n = tl.arange(0, BLOCK)
    inside = (d < D)[None, :]
    k_mean, v_mean, reach = channel_stats(Stats, head, chunks, chunk, T, DP, BLOCK)
    if tile == 0:
        tl.store(VChannel + head * (2 * DP) + d, reach)
        tl.store(VChannel + head * (2 * DP) + DP + d, v_mean)

    t = tile * BLOCK + n
    live = (t < T)[:, None] & inside
    row = K + (head // G).to(tl.int64) * stride_kb + (head % G).to(tl.int64) * stride_kg
    k = tl.load(row + t.to(tl.int64)[:, None] * stride_kt + d[None, :], mask=live, other=0.0).to(tl.float32)
    k = tl.where(live, k - k_mean[None, :], 0.0)
    largest = tl.maximum(tl.max(tl.abs(k)), 1e-30)
    # A NaN or an infinity anywhere makes the scale NaN: attention carries it into every output that it belongs to.
    tl.store(KScale + head * tiles + tile, largest * (1.0 / 127.0) + tl.sum(tl.sum(k * 0.0, 1), 0))
    at = (head.to(tl.int64) * tiles + tile) * (BLOCK * DP)
    tl.store(K8 + at + n[:, None] * DP + d[None, :], to_int8(k * (127.0 / largest)))

    t = tile * BLOCK + token_at(n)
    live = (t < T)[:, None] & inside
    row = V + (head // G).to(tl.int64) * stride_vb + (head % G).to(tl.int64) * stride_vg
    v = tl.load(row + t.to(tl.int64)[:, None] * stride_vt + d[None, :], mask=live, other=0.0).to(tl.float32)
    v = tl.where(live, (v - v_mean[None, :]) / reach[None, :], 0.0)
    largest = tl.maximum(tl.max(tl.abs(v)), 1.0 / (1 << 20))
    tl.store(VScale + head * tiles + tile, largest * (1.0 / 127.0) + tl.sum(tl.sum(v * 0.0, 1), 0))
    at = head.to(tl.int64) * (DP * tiles * BLOCK) + tile * BLOCK
    code = to_int8(v * (127.0 / largest))
    tl.store(VT + at + d.to(tl.int64)[:, None] * (tiles * BLOCK) + n[None, :], tl.trans(code))


@triton.jit
def causal_tile(
    q8, unit, state, K8, VT, KScale, VScale, head, t, tokens, i,
    MASK: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr,
    EXACT_SUM: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Add KEYS keys from ``t`` on to ``state = (o, M, r, l, v_last, invalid)``.

    ``o`` is in units of the last tile's weights (relative to ``r``, base 2) and values (``v_last``); ``M`` is the
    maximum so far; ``invalid`` is 0 or NaN.
    """
    o, M, r, l, v_last, invalid = state
    block = head * (tokens // BLOCK) + t // BLOCK
    k_scale = load_scale(KScale + block)
    v_scale = load_scale(VScale + block)
    k = load_tile(K8, head * tokens + t, 0, DP, KEYS, DP, TMA)
    s = tl.dot(q8, k.T, tl.full([ROWS, KEYS], MAGIC_BITS, tl.int32), out_dtype=tl.int32).to(tl.float32, bitcast=True)
    if MASK:
        s = tl.where(i[:, None] >= (t + tl.arange(0, KEYS))[None, :], s, -float("inf"))
    unit = unit * k_scale
    # Rounding top * unit shifts the whole tile by up to one and a half units of the integer product: with four units
    # more for a peak, no weight exceeds 127.
    top = tl.maximum(tl.max(s, 1), LOWEST) + 4.0
    peak = (top - MAGIC) * unit
    M, new, decay = rescale(peak, M, r)
    p = tl.exp2(s * unit[:, None] - (top * unit + (new - peak) - LOG2_127)[:, None])
    p8 = regroup(pack_weights(p, False), ROWS, KEYS)
    vt = load_tile(VT, head * DP, t, tokens, DP, KEYS, TMA)
    acc = tl.dot(p8, vt.T, out_dtype=tl.int32)
    o = o * (decay * (v_last / v_scale))[:, None] + acc.to(tl.float32)
    total = sum_weights(p, ROWS, KEYS) if EXACT_SUM else sum_codes(p8, KEYS).to(tl.float32)
    return o, M, new, l * decay + total, v_scale, invalid + (k_scale * 0.0 + v_scale * 0.0)


@triton.jit(do_not_specialize=["T"])
def causal_kernel(
    Q, K8, VT, KScale, VScale, VChannel, O, T, tokens, stride_qb, stride_qh, stride_qt, scale_log2, G,
    GROUP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, BLOCK: tl.constexpr,
    EXACT_SUM: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """ROWS queries of one head over all keys up to them. Grid (row blocks, H, B), the longest rows first.

    ``Q O [B, H, T, D]``; ``tokens`` is the padded length of K8 and VT (see quantize_kernel).
    """
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    h = tl.program_id(1)
    b = tl.program_id(2)
    head = b * G + h // GROUP
    i = block * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, DP)
    live = (i < T)[:, None] & (d < D)[None, :]
    row = Q + b.to(tl.int64) * stride_qb + h.to(tl.int64) * stride_qh
    q = tl.load(row + i.to(tl.int64)[:, None] * stride_qt + d[None, :], mask=live, other=0.0).to(tl.float32)
    largest = tl.maximum(tl.max(tl.abs(q), 1), 1e-20)
    invalid = tl.sum(q * 0.0, 1)
    q8 = to_int8(q * (127.0 / largest)[:, None])
    unit = tl.maximum(largest * (scale_log2 * (1.0 / 127.0)), 1e-30)

    state = (
        tl.zeros([ROWS, DP], tl.float32), tl.full([ROWS], NEVER, tl.float32), tl.full([ROWS], NEVER, tl.float32),
        tl.zeros([ROWS], tl.float32), 1.0, 0.0,
    )  # fmt: skip
    whole = block * ROWS // KEYS * KEYS
    for t in tl.range(0, whole, KEYS):
        state = causal_tile(
            q8, unit, state, K8, VT, KScale, VScale, head, t, tokens, i, False, ROWS, KEYS, DP, BLOCK, EXACT_SUM, TMA
        )
    for t in tl.range(whole, tl.minimum(block * ROWS + ROWS, T), KEYS):
        state = causal_tile(
            q8, unit, state, K8, VT, KScale, VScale, head, t, tokens, i, True, ROWS, KEYS, DP, BLOCK, EXACT_SUM, TMA
        )
    o, _, _, l, v_scale, wrong = state
    reach = tl.load(VChannel + head * (2 * DP) + d)
    mean = tl.load(VChannel + head * (2 * DP) + DP + d)
    o = o * (v_scale / l)[:, None] * reach[None, :] + mean[None, :] + (invalid + wrong)[:, None]
    out = O + ((b * tl.num_programs(1) + h).to(tl.int64) * T + i)[:, None] * D + d[None, :]
    tl.store(out, o.to(O.dtype.element_ty), mask=live)


@dataclass(frozen=True)
class CausalConfig:
    """What does not change the result beyond rounding. ``exact_sum``: the denominator sums weights not yet rounded."""

    rows: int = 64
    keys: int = 128
    warps: int = 4
    stages: int = 3
    max_registers: int | None = None
    exact_sum: bool = True


def default_config(head_dim: int) -> CausalConfig:
    """Tile sizes by head_dim: an output of 256 channels needs the registers of eight warps."""
    return CausalConfig(keys=64, warps=8, stages=2) if head_dim > 128 else CausalConfig()


def causal_int8(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, config: CausalConfig | None = None) -> Tensor:
    """Causal attention of a prompt with both products in int8: ``[B, H, T, D]`` in q's dtype.

    ``o[t] = sum_{s <= t} softmax(softmax_scale q[t] . k[s]) v[s]``; ``q [B, H, T, D]``, ``k v [B, G, T, D]`` of
    float16, bfloat16 or float32, last dimension contiguous; query head h reads kv head ``h // (H / G)``; D in
    HEAD_DIMS.

    Q has one scale per row. Keys lose a mean over the tokens first, which softmax does not see (SageAttention, arXiv
    2410.02367), and have one scale per 128 tokens; values lose their mean, which is added to the output, and have a
    scale per channel times one per 128 tokens. Softmax weights have 7 bits relative to the largest in their tile.
    A NaN or an infinity makes NaN of every query that sees its block of 128 tokens. Safe in a CUDA graph.
    Raises ShapeError, DTypeError, UnsupportedError before anything is launched.
    """
    check_prefill(q, k, v, softmax_scale)
    batch, heads, length, dim = q.shape
    if q.numel() == 0:
        return torch.empty_like(q)
    config = config or default_config(dim)
    padded, groups = triton.next_power_of_2(dim), k.shape[1]
    k8, vt, *scales = quantize(k, v)
    tokens = k8.shape[1]
    tma = has_descriptors(q.device)
    sources: tuple[Tensor | TensorDescriptor, ...] = (k8, vt)
    if tma:
        sources = (descriptor(k8, [config.keys, padded]), descriptor(vt, [padded, config.keys]))
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    causal_kernel[(triton.cdiv(length, config.rows), heads, batch)](
        q, *sources, *scales, o, length, tokens, *q.stride()[:3], softmax_scale * LOG2E.value, groups,
        GROUP=heads // groups, D=dim, DP=padded, ROWS=config.rows, KEYS=config.keys, BLOCK=TILE,
        EXACT_SUM=config.exact_sum, TMA=tma, num_warps=config.warps, num_stages=config.stages,
        maxnreg=config.max_registers,
    )  # fmt: skip
    return o


def descriptor(x: Tensor, block: list[int]) -> TensorDescriptor:
    """Tensor descriptor of an int8 ``[heads, rows, columns]`` as one matrix of ``heads * rows`` rows."""
    return TensorDescriptor.from_tensor(x.flatten(0, 1), block)


def quantize(k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """Keys and values in int8, with their scales: what :func:`quantize_kernel` documents, in its order."""
    batch, groups, length, dim = k.shape
    padded, device = triton.next_power_of_2(dim), k.device
    tiles = triton.cdiv(length, TILE)
    chunk = max(4, triton.cdiv(tiles, STATS_CHUNKS)) * TILE
    chunks = triton.cdiv(length, chunk)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(batch * groups, *shape, dtype=dtype, device=device)

    stats = empty(chunks, 4, padded)
    out = (
        empty(tiles * TILE, padded, dtype=torch.int8), empty(padded, tiles * TILE, dtype=torch.int8), empty(tiles),
        empty(tiles), empty(2, padded),
    )  # fmt: skip
    strides = (*k.stride()[:3], *v.stride()[:3], groups)
    shape = {"D": dim, "DP": padded, "BLOCK": TILE, "num_warps": 8}
    stats_kernel[(chunks, batch * groups)](k, v, stats, length, chunk, *strides, **shape, ROWS=32)
    quantize_kernel[(tiles, batch * groups)](k, v, stats, *out, length, chunks, chunk, *strides, **shape)
    return out


def exact(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> Tensor:
    """Exact causal attention on a GPU by the fastest backend of torch that takes these tensors.

    Arguments and result as in :func:`causal_int8`, any head_dim. See :func:`exact_backend` for which one computes.
    Raises ShapeError, DTypeError, UnsupportedError.
    """
    check_causal(q, k, v, softmax_scale)
    options = {"is_causal": True, "scale": softmax_scale, "enable_gqa": q.shape[1] != k.shape[1]}
    backend = exact_backend(q, k, v)
    if backend is None:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, **options)
    with sdpa_kernel(backend):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, **options)


def exact_backend(q: Tensor, k: Tensor, v: Tensor) -> SDPBackend | None:
    """cuDNN if it takes these tensors, else flash; None leaves the choice to torch (float32, CPU)."""
    if q.device.type != "cuda":
        return None
    params = torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, True, q.shape[1] != k.shape[1])
    if torch.backends.cuda.can_use_cudnn_attention(params):
        return SDPBackend.CUDNN_ATTENTION
    if torch.backends.cuda.can_use_flash_attention(params):
        return SDPBackend.FLASH_ATTENTION
    return None


def check_causal(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> None:
    """Raise ShapeError or DTypeError unless these are one prompt's queries, keys and values, on one device."""
    fits = q.ndim == k.ndim == 4 and k.shape == v.shape and k.shape[1] > 0 and q.shape[1] % k.shape[1] == 0
    if not fits or q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]:
        raise ShapeError(
            f"expected q [B, H, T, D] and k, v [B, G, T, D] with H a multiple of G, found {tuple(q.shape)}, "
            f"{tuple(k.shape)} and {tuple(v.shape)}; transpose them to [B, heads, T, D]"
        )
    if q.dtype not in EXACT_DTYPES or not q.dtype == k.dtype == v.dtype or not q.device == k.device == v.device:
        raise DTypeError(
            f"expected q, k, v of one dtype (float16, bfloat16 or float32) on one device, found {q.dtype}, {k.dtype}, "
            f"{v.dtype} on {q.device}, {k.device}, {v.device}; cast or move them"
        )
    if not (math.isfinite(softmax_scale) and softmax_scale > 0):
        raise ShapeError(f"expected a positive, finite softmax_scale, found {softmax_scale}; use head_dim ** -0.5")


def check_prefill(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> None:
    """Check what the int8 kernels need on top of :func:`check_causal`. Raises UnsupportedError as well."""
    check_causal(q, k, v, softmax_scale)
    check_device(q.device)
    if q.shape[-1] not in HEAD_DIMS:
        raise UnsupportedError(f"expected head_dim in {HEAD_DIMS}, found {q.shape[-1]}; use exact()")
    if q.numel() and any(x.stride(-1) != 1 for x in (q, k, v)):
        raise ShapeError("expected q, k, v with contiguous channels (last stride 1); call .contiguous()")
    rows = k.shape[0] * k.shape[1] * max(triton.cdiv(k.shape[2], TILE) * TILE, 256)
    if rows > INT32_MAX or q.shape[0] > MAX_GRID or q.shape[1] > MAX_GRID or k.shape[0] * k.shape[1] > MAX_GRID:
        raise UnsupportedError(
            f"expected at most {INT32_MAX} rows of keys and {MAX_GRID} heads in a call, found {tuple(k.shape)}; split "
            "the batch"
        )
