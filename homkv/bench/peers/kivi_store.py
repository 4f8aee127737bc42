"""KIVI's codes made by a Triton kernel: of prompts, and one token at a time, a group whenever one is complete."""

import triton
import triton.language as tl
from torch import Tensor

from homkv.attention.triton.lanes import MAGIC
from homkv.bench.peers.kivi_codes import LARGEST, KiviCache, KiviWindow
from homkv.errors import ShapeError


@triton.jit
def fit_codes(x, inside, AXIS: tl.constexpr):
    """2-bit codes, float16 step and minimum of ``x`` along an axis, where ``inside``: kivi_codes.fit."""
    low = tl.min(tl.where(inside, x, float("inf")), AXIS, keep_dims=True)
    high = tl.max(tl.where(inside, x, float("-inf")), AXIS, keep_dims=True)
    step = tl.maximum((high - low) / 3, 1e-6).to(tl.float16)
    code = tl.where(inside, (x - low) / step.to(tl.float32) + MAGIC - MAGIC, 0.0)  # ties to even, as torch rounds
    return tl.minimum(tl.maximum(code, 0.0), 3.0).to(tl.int32), step, low.to(tl.float16)


@triton.jit
def code_group(
    k, v, k_t, v_t, KCodes, KScale, KOffset, VCodes, VScale, VOffset, Status, token, D: tl.constexpr,
    QUARTER: tl.constexpr, GROUP: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """Code the GROUP tokens at ``k v``, ``k_t v_t`` elements apart; ``token``: the first one's row among all rows."""
    c = tl.arange(0, QUARTER)
    t = tl.arange(0, GROUP)
    inside = (t >= 0)[:, None] & (c < D // 4)[None, :]
    there = (c < D // 4)[None, :]
    row = token + t
    packed_k = tl.zeros([GROUP, QUARTER], tl.int32)
    packed_v = tl.zeros([GROUP, QUARTER], tl.int32)
    worst = tl.zeros([GROUP, QUARTER], tl.int32)
    for i in tl.static_range(4):
        channel = (i * (D // 4) + c)[None, :]
        x = tl.load(k + t.to(tl.int64)[:, None] * k_t + channel, mask=inside, other=0.0).to(tl.float32)
        y = tl.load(v + t.to(tl.int64)[:, None] * v_t + channel, mask=inside, other=0.0).to(tl.float32)
        worst |= tl.where((tl.abs(x) <= LIMIT) & (tl.abs(y) <= LIMIT), 0, 1)
        code, step, low = fit_codes(x, inside, 0)
        packed_k |= code << (2 * i)
        tl.store(KScale + token // GROUP * D + channel, step, mask=there)
        tl.store(KOffset + token // GROUP * D + channel, low, mask=there)
        code, step, low = fit_codes(y, inside, 1)
        packed_v |= code << (2 * i)
        tl.store(VScale + row[:, None] * 4 + i, step)
        tl.store(VOffset + row[:, None] * 4 + i, low)
    at = row[:, None] * (D // 4) + c[None, :]
    tl.store(KCodes + at, packed_k.to(tl.uint8), mask=inside)
    tl.store(VCodes + at, packed_v.to(tl.uint8), mask=inside)
    tl.atomic_or(Status, 1, mask=tl.max(tl.max(worst, 1), 0) > 0)


@triton.jit(do_not_specialize=["capacity"])
def prompt_kernel(
    K, V, KCodes, KScale, KOffset, VCodes, VScale, VOffset, Status, capacity, k_g, k_t, v_g, v_t, D: tl.constexpr,
    QUARTER: tl.constexpr, GROUP: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """One group of one kv head of ``K V [G, capacity, D]``. Grid (capacity / GROUP, G)."""
    first = tl.program_id(0).to(tl.int64) * GROUP
    g = tl.program_id(1).to(tl.int64)
    code_group(
        K + g * k_g + first * k_t, V + g * v_g + first * v_t, k_t, v_t, KCodes, KScale, KOffset, VCodes, VScale,
        VOffset, Status, g * capacity + first, D, QUARTER, GROUP, LIMIT,
    )  # fmt: skip


@triton.jit(do_not_specialize=["capacity"])
def append_kernel(
    NewK, NewV, WindowK, WindowV, Totals, KCodes, KScale, KOffset, VCodes, VScale, VOffset, Status, capacity, k_b, k_g,
    v_b, v_g, D: tl.constexpr, QUARTER: tl.constexpr, GROUP: tl.constexpr, WINDOW: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """One new token of one sequence and kv head, ``NewK NewV [B, G, D]``. Grid (B, G)."""
    b = tl.program_id(0)
    g = tl.program_id(1)
    head = (b * tl.num_programs(1) + g).to(tl.int64)
    length = tl.load(Totals + b)
    d = tl.arange(0, 4 * QUARTER)
    inside = (d < D) & (length > 0)
    k = tl.load(NewK + b * k_b + g * k_g + d, mask=inside, other=0.0)
    v = tl.load(NewV + b * v_b + g * v_g + d, mask=inside, other=0.0)
    at = (head * WINDOW + (length - 1) % WINDOW) * D + d
    tl.store(WindowK + at, k.to(WindowK.dtype.element_ty), mask=inside)
    tl.store(WindowV + at, v.to(WindowV.dtype.element_ty), mask=inside)
    first = length - WINDOW  # of the group that WINDOW - GROUP newer tokens have made complete; not the new token's
    if (first >= 0) & (first % GROUP == 0):
        oldest = (head * WINDOW + first % WINDOW) * D
        code_group(
            WindowK + oldest, WindowV + oldest, D, D, KCodes, KScale, KOffset, VCodes, VScale, VOffset, Status,
            head * capacity + first, D, QUARTER, GROUP, LIMIT,
        )  # fmt: skip


def code_prompt(k: Tensor, v: Tensor, cache: KiviCache, status: Tensor) -> None:
    """Fill ``cache``, of one sequence, with the codes of ``k v [G, S, D]``, channels contiguous; waits for nothing.

    ``status [1] int32`` is set for values beyond float16's. Raises ShapeError.
    """
    _, heads, tokens, quarter = cache.k_codes.shape
    if not k.shape == v.shape == (heads, tokens, 4 * quarter) or k.stride(2) != 1 or v.stride(2) != 1:
        raise ShapeError(
            f"expected k and v [{heads}, {tokens}, {4 * quarter}] with contiguous channels, found {tuple(k.shape)} and "
            f"{tuple(v.shape)}"
        )
    prompt_kernel[(tokens // cache.group, heads)](
        k, v, *cache.tensors, status, tokens, *k.stride()[:2], *v.stride()[:2], **_sizes(cache), num_warps=4,
    )  # fmt: skip


def append(k: Tensor, v: Tensor, cache: KiviCache, window: KiviWindow, status: Tensor) -> None:
    """Store one token per sequence, ``k v [B, G, D]``, as the newest of ``window.lengths``; none where that is 0.

    A group is coded from the window once W - group tokens are behind it: ``max(n - W + group, 0)`` tokens in whole
    groups have codes. Waits for nothing. ``status`` as in code_prompt. Raises ShapeError.
    """
    batch, heads, tokens, quarter = cache.k_codes.shape
    if not k.shape == v.shape == (batch, heads, 4 * quarter) or k.stride(2) != 1 or v.stride(2) != 1:
        raise ShapeError(
            f"expected new tokens [{batch}, {heads}, {4 * quarter}] with contiguous channels, found {tuple(k.shape)} "
            f"and {tuple(v.shape)}"
        )
    append_kernel[(batch, heads)](
        k, v, window.k, window.v, window.lengths, *cache.tensors, status, tokens, *k.stride()[:2], *v.stride()[:2],
        WINDOW=window.k.shape[2], **_sizes(cache), num_warps=4,
    )  # fmt: skip


def _sizes(cache: KiviCache) -> dict[str, int | float]:
    """What kernels are compiled for."""
    dim = 4 * cache.k_codes.shape[3]
    quarter = max(triton.next_power_of_2(dim // 4), 16)
    return {"D": dim, "QUARTER": quarter, "GROUP": cache.group, "LIMIT": LARGEST}
