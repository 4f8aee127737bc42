"""Write one token per sequence behind the others, keys and values in one launch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from homkv.errors import ShapeError

FP8_MAX = 448.0  # largest e4m3


@triton.jit
def store_kernel(
    K, V, NewK, NewV, Lengths, KScale, VScale, capacity, k_b, k_g, v_b, v_g, D: tl.constexpr, DP: tl.constexpr,
    FP8: tl.constexpr, FP8_LIMIT: tl.constexpr,
):  # fmt: skip
    """One program per sequence and kv head: ``NewK NewV [B, G, D]`` to ``K V [B, G, S, D]`` at ``Lengths[b] - 1``."""
    b, g = tl.program_id(0), tl.program_id(1)
    at = tl.load(Lengths + b) - 1
    d = tl.arange(0, DP)
    inside = (d < D) & (at >= 0) & (at < capacity)
    row = ((b * tl.num_programs(1) + g).to(tl.int64) * capacity + at) * D + d
    k = tl.load(NewK + b * k_b + g * k_g + d, mask=d < D, other=0.0).to(tl.float32)
    v = tl.load(NewV + b * v_b + g * v_g + d, mask=d < D, other=0.0).to(tl.float32)
    if FP8:
        k = tl.minimum(tl.maximum(k / tl.load(KScale + g), -FP8_LIMIT), FP8_LIMIT)
        v = tl.minimum(tl.maximum(v / tl.load(VScale + g), -FP8_LIMIT), FP8_LIMIT)
    tl.store(K + row, k.to(K.dtype.element_ty), mask=inside)
    tl.store(V + row, v.to(V.dtype.element_ty), mask=inside)


def store_token(
    new_k: Tensor, new_v: Tensor, k: Tensor, v: Tensor, lengths: Tensor, k_scale: Tensor, v_scale: Tensor
) -> None:
    """``k[b, g, lengths[b] - 1] = new_k[b, g]``, values alike; e4m3 buffers hold ``x / scale[g]``, saturated.

    ``new_k new_v [B, G, D]`` with contiguous channels; ``k v [B, G, S, D]`` contiguous, 16 bits or float8_e4m3fn;
    ``lengths [B] int32``, beyond S nothing is written; ``k_scale v_scale [G] float32``. Waits for nothing. Raises
    ShapeError.
    """
    batch, heads, capacity, dim = k.shape
    expected = (batch, heads, dim)
    if new_k.shape != expected or new_v.shape != expected or new_k.stride(2) != 1 or new_v.stride(2) != 1:
        raise ShapeError(f"expected new tokens {expected}, found {tuple(new_k.shape)} and {tuple(new_v.shape)}")
    store_kernel[(batch, heads)](
        k, v, new_k, new_v, lengths, k_scale, v_scale, capacity, *new_k.stride()[:2], *new_v.stride()[:2],
        D=dim, DP=triton.next_power_of_2(dim), FP8=k.dtype == torch.float8_e4m3fn, FP8_LIMIT=FP8_MAX, num_warps=1,
    )  # fmt: skip
