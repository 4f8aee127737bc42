"""Rotary embedding of queries and keys in one kernel, with the roundings of transformers' ten."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from homkv.attention.triton.checks import EXACT_DTYPES


@triton.jit
def rotate_row(X, Out, stride, out_stride, cos, sin, D: tl.constexpr, DP: tl.constexpr):
    """``x cos + (-x[D/2:], x[:D/2]) sin`` of one head; both products and their sum are rounded to the dtype."""
    d = tl.arange(0, DP)
    x = tl.load(X + stride + d, mask=d < D, other=0.0)
    half = tl.load(X + stride + (d + D // 2) % D, mask=d < D, other=0.0)
    half = tl.where(d < D // 2, -half, half)
    DTYPE: tl.constexpr = Out.dtype.element_ty
    first = (x.to(tl.float32) * cos).to(DTYPE).to(tl.float32)
    second = (half.to(tl.float32) * sin).to(DTYPE).to(tl.float32)
    tl.store(Out + out_stride + d, (first + second).to(DTYPE), mask=d < D)


@triton.jit
def rotary_kernel(
    Q, K, Cos, Sin, OutQ, OutK, length, q_b, q_h, q_t, k_b, k_h, k_t, oq_b, oq_h, oq_t, ok_b, ok_h, ok_t, c_b, c_t,
    s_b, s_t, HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """One token of one head. Grid (B * T, query heads and then key heads)."""
    b = (tl.program_id(0) // length).to(tl.int64)
    t = (tl.program_id(0) % length).to(tl.int64)
    head = tl.program_id(1)
    d = tl.arange(0, DP)
    cos = tl.load(Cos + b * c_b + t * c_t + d, mask=d < D, other=0.0).to(tl.float32)
    sin = tl.load(Sin + b * s_b + t * s_t + d, mask=d < D, other=0.0).to(tl.float32)
    if head < HEADS:
        rotate_row(Q, OutQ, b * q_b + head * q_h + t * q_t, b * oq_b + head * oq_h + t * oq_t, cos, sin, D, DP)
    else:
        head -= HEADS
        rotate_row(K, OutK, b * k_b + head * k_h + t * k_t, b * ok_b + head * ok_h + t * ok_t, cos, sin, D, DP)


def can_rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether :func:`rotate` takes these: one dtype, whole heads, contiguous channels."""
    batch, _, length, dim = q.shape
    tables = {tuple(cos.shape), tuple(sin.shape)}
    return (
        {x.dtype for x in (k, cos, sin)} == {q.dtype}
        and q.dtype in EXACT_DTYPES
        and (k.shape[0], *k.shape[2:]) == (batch, length, dim)
        and (tables == {(batch, length, dim)} or tables == {(1, length, dim)})
        and dim % 2 == 0
        and all(x.stride(-1) == 1 for x in (q, k, cos, sin))
    )


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """``x cos + (-x[D/2:], x[:D/2]) sin`` of ``q [B, H, T, D]`` and ``k [B, G, T, D]``; ``cos sin [B or 1, T, D]``.

    Bit for bit transformers' ``apply_rotary_pos_emb``. What :func:`can_rotate` takes.
    """
    batch, heads, length, dim = q.shape
    out_q, out_k = torch.empty_like(q), torch.empty_like(k)
    tables = [n for x in (cos, sin) for n in (x.stride(0) if x.shape[0] > 1 else 0, x.stride(1))]
    rotary_kernel[(batch * length, heads + k.shape[1])](
        q, k, cos, sin, out_q, out_k, length, *q.stride()[:3], *k.stride()[:3], *out_q.stride()[:3],
        *out_k.stride()[:3], *tables, HEADS=heads, D=dim, DP=triton.next_power_of_2(dim), num_warps=1,
        enable_fp_fusion=False,
    )  # fmt: skip
    return out_q, out_k
