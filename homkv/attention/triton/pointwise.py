"""What lies between a layer's matrix products, a kernel each: RoPE of queries and keys, and the gated activation."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def rotate_halves(
    X, Out, Cos, Sin, b, t, head, T, heads, stride_b, stride_h, stride_t, D: tl.constexpr, P: tl.constexpr
):  # fmt: skip
    """RoPE of one row: channel i and channel i + D / 2 are a pair."""
    i = tl.arange(0, P)
    own = i < D // 2
    row = X + b.to(tl.int64) * stride_b + head * stride_h + t * stride_t
    first = tl.load(row + i, mask=own, other=0.0).to(tl.float32)
    second = tl.load(row + D // 2 + i, mask=own, other=0.0).to(tl.float32)
    angle = (b * T + t).to(tl.int64) * D + i
    cos_1 = tl.load(Cos + angle, mask=own, other=0.0).to(tl.float32)
    cos_2 = tl.load(Cos + angle + D // 2, mask=own, other=0.0).to(tl.float32)
    sin_1 = tl.load(Sin + angle, mask=own, other=0.0).to(tl.float32)
    sin_2 = tl.load(Sin + angle + D // 2, mask=own, other=0.0).to(tl.float32)
    out = Out + ((b * heads + head).to(tl.int64) * T + t) * D + i
    tl.store(out, first * cos_1 - second * sin_1, mask=own)
    tl.store(out + D // 2, second * cos_2 + first * sin_2, mask=own)


@triton.jit(do_not_specialize=["T"])
def rope_kernel(
    Q, K, OutQ, OutK, Cos, Sin, T, q_b, q_h, q_t, k_b, k_h, k_t, H: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
    P: tl.constexpr,
):  # fmt: skip
    """One token's row of one head. Grid (B * T, H + G)."""
    b = tl.program_id(0) // T
    t = tl.program_id(0) % T
    head = tl.program_id(1)
    if head < H:
        rotate_halves(Q, OutQ, Cos, Sin, b, t, head, T, H, q_b, q_h, q_t, D, P)
    else:
        rotate_halves(K, OutK, Cos, Sin, b, t, head - H, T, G, k_b, k_h, k_t, D, P)


@triton.jit(do_not_specialize=["N"])
def gate_kernel(Gate, Up, Out, N, BLOCK: tl.constexpr):
    """``silu(gate) up``."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(Gate + i, mask=i < N, other=0.0).to(tl.float32)
    up = tl.load(Up + i, mask=i < N, other=0.0).to(tl.float32)
    tl.store(Out + i, gate / (1.0 + tl.exp(-gate)) * up, mask=i < N)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """RoPE of ``q [B, H, T, D]`` and ``k [B, G, T, D]`` by ``cos sin [B or 1, T, D]``, in q's dtype, rounded once."""
    batch, num_q, length, dim = q.shape
    num_kv = k.shape[1]
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    cos, sin = (x.expand(batch, length, dim).contiguous() for x in (cos, sin))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device), torch.empty(k.shape, dtype=k.dtype, device=k.device)
    rope_kernel[(batch * length, num_q + num_kv)](
        q, k, *out, cos, sin, length, *q.stride()[:3], *k.stride()[:3], H=num_q, G=num_kv, D=dim,
        P=triton.next_power_of_2(dim // 2), num_warps=1,
    )  # fmt: skip
    return out


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) up``, elementwise, rounded once."""
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    gate_kernel[(triton.cdiv(out.numel(), BLOCK),)](gate, up, out, out.numel(), BLOCK=BLOCK, num_warps=4)
    return out
