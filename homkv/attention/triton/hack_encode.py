"""Encode tokens into pages of both HACK formats, byte for byte as docs/hack.md says."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from homkv.attention.triton.checks import EXACT_DTYPES, check_status_word
from homkv.attention.triton.hack_common import (
    Codec,
    is_stochastic,
    noise_keys,
    over,
    page_constants,
    quantize,
    uniform_noise,
)
from homkv.attention.triton.hack_fragments import sum_type
from homkv.attention.triton.runtime import check_device
from homkv.errors import DTypeError, FormatError, ShapeError
from homkv.formats.hack import HackCodec

RUN = tl.constexpr(32)  # tokens of a channel that one thread holds


@triton.jit
def has_unstorable(x):
    """Whether a number is not finite."""
    return tl.max(tl.where(tl.abs(x) < float("inf"), 0, 1).reshape([x.numel]), 0)


@triton.jit
def store_numbers(page, START: tl.constexpr, DTYPE: tl.constexpr, at, x, inside):
    """Store numbers of a section, ``x`` at index ``at``, where ``inside``."""
    tl.store((page + START).to(tl.pointer_type(DTYPE), bitcast=True) + at, x.to(DTYPE), mask=inside)


@triton.jit
def encode_keys(
    k, stride_t, page, position, key, p, PAGE: tl.constexpr, STOCHASTIC: tl.constexpr, PER_TOKEN: tl.constexpr
):  # fmt: skip
    """One partition of a page of keys, packed along channels. Returns 1 if a value cannot be stored.

    A thread holds 16 neighbouring channels of some tokens: the tile is ``[SIZE / 16, T, 2, 8]``.
    """
    T: tl.constexpr = PAGE[0]
    SIZE: tl.constexpr = PAGE[1]
    BITS: tl.constexpr = PAGE[2]
    D: tl.constexpr = PAGE[3]
    UNITS: tl.constexpr = triton.next_power_of_2(SIZE // 16)
    unit = tl.arange(0, UNITS)[:, None, None, None]
    t = tl.arange(0, T)[None, :, None, None]
    c = p * SIZE + unit * 16 + tl.arange(0, 2)[None, None, :, None] * 8 + tl.arange(0, 8)[None, None, None, :]
    inside = (unit < SIZE // 16) & (t >= 0) & (c >= 0)
    x = tl.load(k + t.to(tl.int64) * stride_t + c, mask=inside, other=0.0).to(tl.float32)
    noise = 0.0
    if STOCHASTIC:
        noise = uniform_noise(key, position + t, c)
    if PER_TOKEN:
        code, scale, low = quantize(x, inside, noise, BITS, STOCHASTIC, (3, 2, 0))
        at = t * (D // SIZE) + p
        there = t >= 0
    else:
        code, scale, low = quantize(x, inside, noise, BITS, STOCHASTIC, (1,))
        at = c
        there = unit < SIZE // 16
    store_numbers(page, PAGE[4][2], tl.float16, at, scale, there)
    store_numbers(page, PAGE[4][3], tl.float16, at, low, there)
    code = code.to(tl.int32)
    if PAGE[4][6] >= 0:
        sums = over(code, (3, 2, 0), "sum")
        store_numbers(page, PAGE[4][6], sum_type(SIZE, BITS), t * (D // SIZE) + p, sums, t >= 0)
    fields = code.reshape([UNITS, T, BITS // 2, 32 // BITS]) << (tl.arange(0, 32 // BITS) * BITS)[None, None, None, :]
    u = tl.arange(0, UNITS)[:, None, None]
    word = tl.arange(0, T)[None, :, None] * (D * BITS // 32) + (p * SIZE // 16 + u) * (BITS // 2)
    word += tl.arange(0, BITS // 2)[None, None, :]
    words = (page + PAGE[4][0]).to(tl.pointer_type(tl.int32), bitcast=True)
    tl.store(words + word, tl.sum(fields, 3), mask=u < SIZE // 16)
    return has_unstorable(x) | has_unstorable(tl.where(there, scale + tl.abs(low), 0.0))


@triton.jit
def encode_values(
    v, stride_t, page, position, key, p, PAGE: tl.constexpr, STOCHASTIC: tl.constexpr, PER_TOKEN: tl.constexpr
):  # fmt: skip
    """One partition's channels of a page of values, packed along tokens. Returns 1 if a value cannot be stored.

    A thread holds two neighbouring channels of RUN tokens: the tile is ``[SIZE / 2, T / RUN, RUN, 2]``.
    """
    T: tl.constexpr = PAGE[0]
    SIZE: tl.constexpr = PAGE[1]
    BITS: tl.constexpr = PAGE[2]
    D: tl.constexpr = PAGE[3]
    PAIRS: tl.constexpr = triton.next_power_of_2(SIZE // 2)
    pair = tl.arange(0, PAIRS)[:, None, None, None]
    t = tl.arange(0, T // RUN)[None, :, None, None] * RUN + tl.arange(0, RUN)[None, None, :, None]
    c = p * SIZE + pair * 2 + tl.arange(0, 2)[None, None, None, :]
    inside = (pair < SIZE // 2) & (t >= 0) & (c >= 0)
    x = tl.load(v + t.to(tl.int64) * stride_t + c, mask=inside, other=0.0).to(tl.float32)
    noise = 0.0
    if STOCHASTIC:
        noise = uniform_noise(key, position + t, c)
    there = pair < SIZE // 2
    if PER_TOKEN:
        code, scale, low = quantize(x, inside, noise, BITS, STOCHASTIC, (3, 0))
        store_numbers(page, PAGE[4][4], tl.float16, t * (D // SIZE) + p, scale, t >= 0)
        store_numbers(page, PAGE[4][5], tl.float16, t * (D // SIZE) + p, low, t >= 0)
    else:
        code, scale, low = quantize(x, inside, noise, BITS, STOCHASTIC, (2, 1))
        store_numbers(page, PAGE[4][4], tl.float16, c, scale, there)
        store_numbers(page, PAGE[4][5], tl.float16, c, low, there)
    code = code.to(tl.int32)
    if PAGE[4][7] >= 0:
        store_numbers(page, PAGE[4][7], sum_type(T, BITS), c, over(code, (2, 1), "sum"), there)
    fields = code.reshape([PAIRS, T // RUN, BITS, 32 // BITS, 2])
    packed = tl.sum(fields << (tl.arange(0, 32 // BITS) * BITS)[None, None, None, :, None], 3).permute(0, 3, 1, 2)
    channel = p * SIZE + tl.arange(0, PAIRS)[:, None, None, None] * 2 + tl.arange(0, 2)[None, :, None, None]
    word = channel * (T * BITS // 32) + tl.arange(0, T // RUN)[None, None, :, None] * BITS
    words = (page + PAGE[4][1]).to(tl.pointer_type(tl.int32), bitcast=True)
    tl.store(words + word + tl.arange(0, BITS)[None, None, None, :], packed, mask=there)
    if PER_TOKEN:
        return has_unstorable(x) | has_unstorable(scale + tl.abs(low))
    else:
        return has_unstorable(x) | has_unstorable(tl.where(there, scale + tl.abs(low), 0.0))


@triton.jit(do_not_specialize=["position", "k_key", "v_key"])
def encode_kernel(
    KIn, VIn, Pages, Status, k_stride_h, k_stride_t, v_stride_h, v_stride_t, position, k_key, v_key,
    PAGE: tl.constexpr, HEADS: tl.constexpr, STOCHASTIC: tl.constexpr, KEY_PER_TOKEN: tl.constexpr,
):  # fmt: skip
    """Grid (pages, HEADS, 2 partitions): one partition of a page's keys, or the same channels of its values."""
    T: tl.constexpr = PAGE[0]
    PARTS: tl.constexpr = PAGE[3] // PAGE[1]
    n = tl.program_id(0)
    head = tl.program_id(1)
    page = Pages + (n.to(tl.int64) * HEADS + head) * PAGE[5]
    first = n.to(tl.int64) * T
    p = tl.program_id(2) % PARTS
    if tl.program_id(2) < PARTS:
        k = KIn + head.to(tl.int64) * k_stride_h + first * k_stride_t
        wrong = encode_keys(k, k_stride_t, page, position + n * T, k_key, p, PAGE, STOCHASTIC, KEY_PER_TOKEN)
    else:
        v = VIn + head.to(tl.int64) * v_stride_h + first * v_stride_t
        wrong = encode_values(v, v_stride_t, page, position + n * T, v_key, p, PAGE, STOCHASTIC, not KEY_PER_TOKEN)
    tl.atomic_or(Status, 1, mask=wrong > 0)


def encode(k: Tensor, v: Tensor, codec: Codec, first_position: int = 0, *, status: Tensor | None = None) -> Tensor:
    """Quantize and pack ``k v [G, n * page_tokens, D]`` into pages ``[n, G, P] uint8``: the bytes of ``codec.encode``.

    ``k v``: float16, bfloat16 or float32, any strides with the last dimension contiguous. ``status [1] int32``: set to
    1 where a value cannot be stored; nothing is read back then, and the call can be captured in a CUDA graph. Without
    it FormatError is raised. Raises ShapeError, DTypeError, UnsupportedError before the launch.
    """
    check_tokens(k, v, codec)
    heads, num_pages, device = k.shape[0], k.shape[1] // codec.page_tokens, k.device
    if status is not None:
        check_status_word(status, device)
    pages = torch.empty(num_pages, heads, codec.page_bytes, dtype=torch.uint8, device=device)
    if num_pages == 0 or heads == 0:
        return pages
    flag = torch.zeros(1, dtype=torch.int32, device=device) if status is None else status
    is_v1 = isinstance(codec, HackCodec)
    encode_kernel[(num_pages, heads, 2 * codec.head_dim // codec.partition)](
        k, v, pages.view(torch.int8), flag, k.stride(0), k.stride(1), v.stride(0), v.stride(1), first_position,
        *noise_keys(codec), PAGE=page_constants(codec), HEADS=heads, STOCHASTIC=is_stochastic(codec),
        KEY_PER_TOKEN=is_v1, num_warps=4 if codec.page_tokens > RUN.value else 2, enable_fp_fusion=False,
    )  # fmt: skip
    if status is None and int(flag):
        raise FormatError(
            "expected finite keys and values, and partitions whose minimum and (max - min) / (2^bits - 1) lie within "
            "fp16 (65504), found others; use --kv-cache-dtype bf16"
        )
    return pages


def check_tokens(k: Tensor, v: Tensor, codec: Codec) -> None:
    """Check ``k v [G, n * page_tokens, D]``. Raises ShapeError, DTypeError, UnsupportedError."""
    codec.check_tokens(k, v)
    if k.ndim != 3 or (k.numel() and (k.stride(2) != 1 or v.stride(2) != 1)):
        raise ShapeError(
            f"expected k and v [G, tokens, D] with a contiguous last dimension, found {tuple(k.shape)} with strides "
            f"{k.stride()} and {v.stride()}; call .contiguous()"
        )
    if k.dtype != v.dtype or k.dtype not in EXACT_DTYPES or k.device != v.device:
        raise DTypeError(
            f"expected k and v both float32, float16 or bfloat16 on one device, found {k.dtype} on {k.device} and "
            f"{v.dtype} on {v.device}; cast or move them"
        )
    check_device(k.device)
