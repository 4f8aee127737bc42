"""Quantize and pack whole pages of keys and values in one launch, byte for byte as docs/format.md says.

Every sum follows the format's tree and nothing is fused that rounds differently, so all encoders agree. (The one
exception: rotated keys below 2**-130 next to scales above 2**-20, where the reference's products underflow.)
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from homkv.attention.triton.checks import EXACT_DTYPES, check_aligned, check_status_word, check_tensor
from homkv.attention.triton.decode import classes
from homkv.attention.triton.encode_keys import encode_keys, pages_at_once
from homkv.attention.triton.encode_values import KEY_MEAN, KEY_SCALE, VALUE_SCALE, encode_values
from homkv.attention.triton.runtime import check_device, is_interpreting, num_processors
from homkv.errors import DTypeError, FormatError, ShapeError
from homkv.quant import quantize_keys, quantize_values, require_finite
from homkv.spec import PAGE_TOKENS, ChannelClass, PageLayout

CHANNELS_PER_THREAD = 32  # of a row: 64 are fewer instructions but 12 warps per multiprocessor, not 16; 19 % slower
MAX_VALUE_LANES = 8
MAX_REGISTERS = 128
OVERLAP_LANES = 4  # with more of them a thread has the registers, and the need, to work on two tokens
WARPS_PER_PROCESSOR = 4  # of values, below which rows are spread over more lanes: latency counts, not throughput


@triton.jit(do_not_specialize=["count", "heads", "num_blocks"])
def encode_kernel(
    KIn, VIn, Pages, Blocks, SlotOf, Status, k_stride_h, k_stride_t, v_stride_h, v_stride_t, count, heads, num_blocks,
    K: tl.constexpr, V: tl.constexpr, GAPS: tl.constexpr, ORDER: tl.constexpr, CENTRE: tl.constexpr,
    USED: tl.constexpr, PAGE_BYTES: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    K_LANES: tl.constexpr, V_LANES: tl.constexpr, OVERLAP: tl.constexpr, THREADS: tl.constexpr, SCATTER: tl.constexpr,
):  # fmt: skip
    """Values first, as they take longest: a class of many pages per program; then keys, a few pages per program."""
    item = tl.program_id(0)
    v_items = tl.cdiv(count, THREADS // V_LANES) * len(V)
    if item < v_items:
        for c in tl.static_range(len(V)):
            if item % len(V) == c:
                encode_values(
                    VIn, v_stride_h, v_stride_t, Pages, Blocks, Status, item // len(V) * (THREADS // V_LANES), count,
                    heads, num_blocks, V, c, PAGE_BYTES, V_LANES, OVERLAP, THREADS, SCATTER,
                )  # fmt: skip
    else:
        encode_keys(
            KIn, k_stride_h, k_stride_t, VIn, v_stride_h, v_stride_t, Pages, Blocks, SlotOf, Status,
            (item - v_items) * pages_at_once(THREADS // K_LANES), count, heads, num_blocks, K, GAPS, ORDER, CENTRE,
            USED, PAGE_BYTES, D, DP, K_LANES, THREADS, SCATTER,
        )  # fmt: skip


@dataclass(frozen=True)
class EncodeConfig:
    """What does not change the bytes: how rows are spread over threads."""

    key_lanes: int  # threads that share a row: 1, 2 or 4
    value_lanes: int  # a power of two that divides a quarter of the head
    overlap: bool  # rotate a token's values while the sums of the one before are waited for
    threads: int = 32  # more in the interpreter only
    max_registers: int | None = 168

    def items(self, count: int, num_classes: int) -> int:
        """Programs for ``count`` pages, with ``num_classes`` classes of values."""
        values = triton.cdiv(count, self.threads // self.value_lanes) * num_classes
        return int(values + triton.cdiv(count, pages_at_once(self.threads // self.key_lanes)))


def lanes_for(of: tuple[ChannelClass, ...], most: int) -> int:
    """Threads per row so that each has at most CHANNELS_PER_THREAD channels of the widest class."""
    widest = max((cls.width for cls in of), default=1)
    return min(int(triton.next_power_of_2(triton.cdiv(widest, CHANNELS_PER_THREAD))), most)


def default_config(layout: PageLayout, count: int, device: torch.device) -> EncodeConfig:
    """The configuration for ``count`` pages."""
    if is_interpreting():
        return interpreted(layout)
    quarter = layout.head_dim // 4
    channels = min(quarter & -quarter, MAX_VALUE_LANES)
    key_lanes, value_lanes = lanes_for(layout.k_classes, 4), lanes_for(layout.v_classes, channels)
    enough = WARPS_PER_PROCESSOR * num_processors(device) * 32
    while value_lanes < channels and count * value_lanes * len(layout.v_classes) < enough:
        value_lanes *= 2
    return EncodeConfig(key_lanes, value_lanes, value_lanes > OVERLAP_LANES, max_registers=MAX_REGISTERS)


def interpreted(layout: PageLayout) -> EncodeConfig:
    """The interpreter's time is a matter of operations, not of their size: many lanes and rows."""
    quarter = layout.head_dim // 4
    return EncodeConfig(4, quarter & -quarter, overlap=False, threads=512)


def encode(
    k: Tensor,
    v: Tensor,
    layout: PageLayout,
    order: Tensor,
    *,
    out: Tensor | None = None,
    block_ids: Tensor | None = None,
    status: Tensor | None = None,
    config: EncodeConfig | None = None,
) -> Tensor:
    """Quantize and pack ``k v [G, n * 64, D]`` into pages, byte for byte as docs/format.md says.

    ``k v``: float16, bfloat16 or float32, any strides with the last dimension contiguous. ``order [D]``: slot ->
    channel, on the CPU. Without ``out`` returns new pages ``[n, G, P] uint8``; ``out [blocks, G, P]`` with
    ``block_ids [n] int32``: page i of every head goes to ``out[block_ids[i]]``, which is returned whole.

    With ``status [1] int32`` nothing is read back, and the call can be captured in a CUDA graph: values that cannot be
    stored set it to non-zero, and block ids outside ``out`` are clamped. Without it the call waits, and raises
    FormatError, as the reference does, or ShapeError for block ids outside or twice; pages hold undefined bytes then.
    Raises ShapeError, DTypeError, UnsupportedError before anything is launched.
    """
    check_tokens(k, v, layout)
    heads, num_pages, device = k.shape[0], k.shape[1] // PAGE_TOKENS, k.device
    pages = torch.empty(num_pages, heads, layout.page_bytes, dtype=torch.uint8, device=device) if out is None else out
    check_out(pages, num_pages, heads, layout, block_ids, device)
    if status is not None:
        check_status_word(status, device)
    elif block_ids is not None:
        check_block_ids(block_ids, pages.shape[0])
    if num_pages == 0 or heads == 0:
        return pages
    flag = torch.zeros(1, dtype=torch.int32, device=device) if status is None else status
    k, v = aligned(k), aligned(v)
    launch(k, v, pages, block_ids, flag, layout, order, config)
    if status is None:
        raise_status(flag, k, v, layout, order)
    return pages


def launch(
    k: Tensor,
    v: Tensor,
    pages: Tensor,
    block_ids: Tensor | None,
    status: Tensor,
    layout: PageLayout,
    order: Tensor,
    config: EncodeConfig | None = None,
) -> None:
    """Encode checked ``k v [G, n * 64, D]`` to ``pages``."""
    heads = k.shape[0]
    count = k.shape[1] // PAGE_TOKENS * heads
    config = config or default_config(layout, count, k.device)
    channels = tuple(order.tolist())
    head_strides = [x.stride(0) if heads > 1 else 0 for x in (k, v)]
    encode_kernel[(config.items(count, len(layout.v_classes)),)](
        k, v, pages, pages if block_ids is None else block_ids, slots_on_device(channels, k.device), status,
        head_strides[0], k.stride(1), head_strides[1], v.stride(1), count, heads, pages.shape[0],
        SCATTER=block_ids is not None, **constants(layout, channels, config), **options(config),
    )  # fmt: skip


def aligned(x: Tensor) -> Tensor:
    """``x [G, T, D]``, or a copy of it where its rows do not start at multiples of 16 bytes: loads take so many."""
    strides = (n for n, size in zip(x.stride(), x.shape, strict=True) if size > 1 and n != 1)
    return (
        x
        if x.data_ptr() % 16 == 0 and all(n % 16 == 0 for n in strides)
        else x.clone(memory_format=torch.contiguous_format)
    )


def constants(layout: PageLayout, order: tuple[int, ...], config: EncodeConfig) -> dict[str, Any]:
    """What the kernels know of the format and of how they are to work."""
    return {
        "K": classes(layout.k_classes),
        "V": classes(layout.v_classes),
        "GAPS": gaps(layout),
        "ORDER": order,
        "CENTRE": layout.centre_offset,
        "USED": layout.used_bytes,
        "PAGE_BYTES": layout.page_bytes,
        "D": layout.head_dim,
        "DP": triton.next_power_of_2(layout.head_dim),
        "K_LANES": config.key_lanes,
        "V_LANES": config.value_lanes,
        "OVERLAP": config.overlap,
        "THREADS": config.threads,
    }


def options(config: EncodeConfig) -> dict[str, Any]:
    """How the kernels are compiled. Fusing a product with a sum would round differently."""
    return {
        "num_warps": config.threads // 32,
        "num_stages": 1,
        "maxnreg": config.max_registers,
        "enable_fp_fusion": False,
    }


def gaps(layout: PageLayout) -> tuple[tuple[int, int], ...]:
    """Runs of values' channels that no class stores: ``(start, width)``."""
    stored = {slot for cls in layout.v_classes for slot in range(cls.start, cls.stop)}
    quarter = layout.head_dim // 4
    return tuple((start, quarter) for start in range(0, layout.head_dim, quarter) if start not in stored)


@functools.lru_cache(maxsize=256)
def slots_on_device(order: tuple[int, ...], device: torch.device) -> Tensor:
    """Channel -> slot, int32 on the device; made once."""
    slots = torch.empty(len(order), dtype=torch.int32, device="cpu")
    slots[list(order)] = torch.arange(len(order), dtype=torch.int32, device="cpu")
    return slots.to(device)


# -- checks --------------------------------------------------------------------------------------------------------


def raise_status(status: Tensor, k: Tensor, v: Tensor, layout: PageLayout, order: Tensor) -> None:
    """Raise the reference's FormatError for ``k v [G, n * 64, D]`` if their encoding set ``status``. Waits."""
    wrong = int(status)
    if wrong == 0:
        return
    require_finite(k, "keys")
    for head in k if wrong & (KEY_MEAN.value | KEY_SCALE.value) else ():
        quantize_keys(head.unflatten(0, (-1, PAGE_TOKENS)), order, layout)
    require_finite(v, "values")
    for head in v if wrong & VALUE_SCALE.value else ():
        quantize_values(head.unflatten(0, (-1, PAGE_TOKENS)), layout)
    raise FormatError(f"expected keys and values that the format can hold, found status {wrong}; please report this")


def check_tokens(k: Tensor, v: Tensor, layout: PageLayout) -> None:
    """Check ``k v [G, n * 64, D]``. Raises ShapeError, DTypeError, UnsupportedError."""
    if k.shape != v.shape or k.ndim != 3 or k.shape[2] != layout.head_dim or k.shape[1] % PAGE_TOKENS:
        raise ShapeError(
            f"expected k and v [G, n * {PAGE_TOKENS}, {layout.head_dim}], found {tuple(k.shape)} and "
            f"{tuple(v.shape)}; pass whole pages and keep the rest in the window"
        )
    if k.dtype != v.dtype or k.dtype not in EXACT_DTYPES or k.device != v.device:
        raise DTypeError(
            f"expected k and v both float32, float16 or bfloat16 on one device, found {k.dtype} on {k.device} and "
            f"{v.dtype} on {v.device}; cast or move them"
        )
    if k.numel() and (k.stride(2) != 1 or v.stride(2) != 1):
        raise ShapeError(
            f"expected a contiguous last dimension, found strides {k.stride()} and {v.stride()}; call .contiguous()"
        )
    check_device(k.device)


def check_out(
    pages: Tensor, num_pages: int, heads: int, layout: PageLayout, block_ids: Tensor | None, device: torch.device
) -> None:
    """Check where encoded pages go. Raises ShapeError or DTypeError."""
    check_tensor("out", pages, (torch.uint8,), 3, device)
    check_aligned("out", pages)
    blocks = num_pages if block_ids is None else pages.shape[0]
    if tuple(pages.shape) != (blocks, heads, layout.page_bytes):
        raise ShapeError(
            f"expected out [{'blocks' if block_ids is not None else num_pages}, G={heads}, P={layout.page_bytes}], "
            f"found {tuple(pages.shape)}; was the pool built for another format?"
        )
    if block_ids is not None:
        check_tensor("block_ids", block_ids, (torch.int32,), 1, device)
        if block_ids.shape[0] != num_pages:
            raise ShapeError(f"expected {num_pages} block_ids, found {block_ids.shape[0]}; one per page")


def check_block_ids(block_ids: Tensor, blocks: int) -> None:
    """Raise ShapeError unless block ids are different and in range. Waits for the device."""
    ids = block_ids.tolist()
    if len(set(ids)) != len(ids) or (ids and not 0 <= min(ids) <= max(ids) < blocks):
        raise ShapeError(f"expected {len(ids)} different block_ids in 0..{blocks - 1}, found {ids}; one per page")
