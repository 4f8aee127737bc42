"""Decode attention on an 8-bit cache (e4m3, one scale per kv head): what serving engines offer today.

Queries, softmax weights and products stay in float16: keys and values are restored in registers, two per instruction.
Matrix instructions on 8-bit floats would round queries and weights to 8 bits as well, which is another quality.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from homkv.attention.triton.lanes import LOG2E, NEVER, USE_PTX
from homkv.bench.peers.split import Partials, SplitConfig, check_call, columns, plan, share, weigh
from homkv.errors import DTypeError, ShapeError

DEFAULT = SplitConfig(tile=64, warps=1, stages=3, programs=6)
MAX_E4M3 = 448.0
HAS_CVT = (8, 9)  # first compute capability with conversions from e4m3

# Two e4m3 pairs (a0 a1) (b0 b1) in one register become float16 pairs (a0 b0) and (a1 b1).
_CVT = tl.constexpr(
    "{.reg .b16 x, y; .reg .b32 t; prmt.b32 t, $2, 0, 0x3120; mov.b32 {x, y}, t;"
    "cvt.rn.f16x2.e4m3x2 $0, x; cvt.rn.f16x2.e4m3x2 $1, y;}"
)


@triton.jit
def restore_byte(x):
    """e4m3 in the low byte of ``x`` (int16) to float16: sign, exponent and mantissa move, the factor mends the bias."""
    bits = ((x & 0x80) << 8) | ((x & 0x7F) << 7)
    return bits.to(tl.int16).to(tl.float16, bitcast=True) * 256.0


@triton.jit
def restore(x, CVT: tl.constexpr):
    """Pairs of e4m3 (int16) to two float16 tensors: low bytes (even channels) and high ones. Exact, NaN aside."""
    if USE_PTX and CVT:
        return tl.inline_asm_elementwise(
            _CVT, "=r,=r,r", [x], dtype=(tl.float16, tl.float16), is_pure=True, pack=2
        )  # fmt: skip
    else:
        return restore_byte(x), restore_byte(x >> 8)


@triton.jit(do_not_specialize=["capacity", "splits"])
def fp8_kernel(
    Q, K, V, KScale, VScale, Lengths, PartO, PartM, PartSum, capacity, splits, scale_log2, D: tl.constexpr,
    HALF: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr, N: tl.constexpr, TILE: tl.constexpr,
    CVT: tl.constexpr,
):  # fmt: skip
    """One split of one sequence and kv head. Grid (batch * HEADS, splits).

    ``Q [batch, HEADS, ROWS, D]``; ``K V [batch, HEADS, capacity, D / 2] int16``, two e4m3 each; even and odd channels
    are separate operands. HALF: D / 2, padded to a power of two.
    """
    head = tl.program_id(0)
    split = tl.program_id(1)
    first, stop = share(Lengths, head // HEADS, capacity, split, splits, TILE)
    n = tl.arange(0, N)
    pair = tl.arange(0, HALF)
    inside = (pair < D // 2)[:, None] & (n < ROWS)[None, :]
    row = head * ROWS + n
    q = Q + row[None, :] * D + 2 * pair[:, None]
    q0 = tl.load(q, mask=inside, other=0.0).to(tl.float16)
    q1 = tl.load(q + 1, mask=inside, other=0.0).to(tl.float16)
    unit = tl.load(KScale + head % HEADS) * scale_log2
    m = tl.full([N], NEVER, tl.float32)
    total = tl.zeros([N], tl.float32)
    o0 = tl.zeros([HALF, N], tl.float32)
    o1 = tl.zeros([HALF, N], tl.float32)
    K += head.to(tl.int64) * capacity * (D // 2)
    V += head.to(tl.int64) * capacity * (D // 2)
    for at in range(first, stop, TILE):
        token = tl.minimum(at + tl.arange(0, TILE), stop - 1) * (D // 2)
        if HALF == D // 2:
            k = tl.load(K + token[:, None] + pair[None, :])
            v = tl.load(V + token[None, :] + pair[:, None])
        else:
            k = tl.load(K + token[:, None] + pair[None, :], mask=(pair < D // 2)[None, :], other=0)
            v = tl.load(V + token[None, :] + pair[:, None], mask=(pair < D // 2)[:, None], other=0)
        k0, k1 = restore(k, CVT)
        s = tl.dot(k1, q1, tl.dot(k0, q0, tl.zeros([TILE, N], tl.float32)))
        p, decay, m, total = weigh(s, unit, m, total, at, stop, N, TILE)
        v0, v1 = restore(v, CVT)
        o0 = tl.dot(v0, p.to(tl.float16), o0 * decay[None, :])
        o1 = tl.dot(v1, p.to(tl.float16), o1 * decay[None, :])
    row = row.to(tl.int64) * splits + split
    tl.store(PartM + row, m, mask=n < ROWS)
    tl.store(PartSum + row, total, mask=n < ROWS)
    o = PartO + row[None, :] * D + 2 * pair[:, None]
    scale = tl.load(VScale + head % HEADS)
    tl.store(o, o0 * scale, mask=inside)
    tl.store(o + 1, o1 * scale, mask=inside)


def quantize(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``k v [B, G, S, D]`` to e4m3 with one scale per kv head: ``k8, v8, k_scale [G], v_scale [G]``, ``x = scale x8``.

    The scale maps the head's largest magnitude to the largest e4m3, 448.
    """
    out = []
    for x in (k, v):
        scale = x.float().abs().amax((0, 2, 3)).clamp_min(1e-20) / MAX_E4M3
        out.append(((x.float() / scale[:, None, None]).clamp(-MAX_E4M3, MAX_E4M3).to(torch.float8_e4m3fn), scale))
    (k8, k_scale), (v8, v_scale) = out
    return k8, v8, k_scale, v_scale


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    softmax_scale: float,
    k_scale: Tensor,
    v_scale: Tensor,
    config: SplitConfig = DEFAULT,
) -> Tensor:
    """``softmax(softmax_scale q (k_scale k)^T) (v_scale v)`` over the first ``lengths[b]`` tokens of each sequence.

    ``q [B, H, 1, D]`` 16 bits, H / G <= 16; ``k v [B, G, S, D] float8_e4m3fn``; ``lengths [B] int32``; ``k_scale
    v_scale [G] float32``. All contiguous, on one device; nothing is read back, so a CUDA graph may hold the call and
    lengths may grow to S between replays. Returns ``[B, H, 1, D]`` in q's dtype; a sequence without tokens gives
    zeros. Raises ShapeError, DTypeError, CapacityError, UnsupportedError.
    """
    batch, heads, tokens, dim = k.shape
    check_call(q, (k, v, k_scale, v_scale), (batch, heads), lengths)
    if v.shape != k.shape or q.shape[3] != dim or dim % 2 or k_scale.shape != (heads,) or v_scale.shape != (heads,):
        raise ShapeError(
            f"expected k and v [B, G, S, D={q.shape[3]}] and scales [G], found {tuple(k.shape)}, {tuple(v.shape)}, "
            f"{tuple(k_scale.shape)} and {tuple(v_scale.shape)}; quantize() makes them"
        )
    if k.dtype != torch.float8_e4m3fn or v.dtype != k.dtype or not k_scale.dtype == v_scale.dtype == torch.float32:
        raise DTypeError(f"expected float8_e4m3fn with float32 scales, found {k.dtype} and {k_scale.dtype}; quantize()")
    group, splits = q.shape[1] // heads, plan(q, heads, tokens, config)
    part = Partials.empty(batch * q.shape[1], splits, dim, q.device)
    has_cvt = q.device.type == "cuda" and torch.cuda.get_device_capability(q.device) >= HAS_CVT
    fp8_kernel[(batch * heads, splits)](
        q, k.view(torch.int16), v.view(torch.int16), k_scale, v_scale, lengths, part.o, part.m, part.total, tokens,
        splits, softmax_scale * LOG2E.value, D=dim, HALF=triton.next_power_of_2(dim // 2), ROWS=group, HEADS=heads,
        N=columns(group), TILE=config.tile, CVT=has_cvt, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return part.merge(q)
