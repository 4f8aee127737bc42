"""Quantize and pack whole pages of K and V in one launch, byte for byte as docs/format.md says.

Every sum follows the format's tree and nothing is fused (``enable_fp_fusion=False``), so that all encoders agree.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from homkv.attention.triton.checks import EXACT_DTYPES, check_tensor
from homkv.attention.triton.decode import classes, order_on_device
from homkv.attention.triton.lanes import hadamard, scale_value
from homkv.attention.triton.runtime import check_device
from homkv.errors import DTypeError, FormatError, ShapeError
from homkv.quant import DIFFUSION, SMALLEST_SCALE, STEP
from homkv.spec import PAGE_TOKENS, PageLayout

STEP_2, STEP_4 = tl.constexpr(STEP[2]), tl.constexpr(STEP[4])
SMALLEST = tl.constexpr(SMALLEST_SCALE)
CARRIED = tl.constexpr(DIFFUSION)
ENCODE_WARPS = 8


@triton.jit
def tree_sum(x, ROWS: tl.constexpr, SIZE: tl.constexpr):
    """Sum of every row of ``x [ROWS, SIZE]``: halves are added until one is left. SIZE is a power of two."""
    for level in tl.static_range(SIZE.bit_length() - 1):
        half = x.reshape([ROWS, 2, SIZE >> (level + 1)]).permute(0, 2, 1)
        low, high = tl.split(half)
        x = low + high
    return x.reshape([ROWS])


@triton.jit
def code_rows(y, s, BITS: tl.constexpr):
    """Lane values (float32 integers) of rows ``y [R, W]`` at scales ``s [R]``."""
    u = y * tl.div_rn(1.0, s)[:, None]
    if BITS == 8:
        rounded = (u + 12582912.0) - 12582912.0  # half to even
        return tl.minimum(tl.maximum(rounded, -127.0), 127.0)
    elif BITS == 4:
        return tl.minimum(tl.maximum(tl.floor(u * 0.0625), -8.0), 7.0) * 16.0 + 8.0
    else:
        return tl.minimum(tl.maximum(tl.floor(u * 0.015625), -2.0), 1.0) * 64.0 + 32.0


@triton.jit
def fit_rows(y, inside, WIDTH: tl.constexpr, PADDED: tl.constexpr, BITS: tl.constexpr, R: tl.constexpr):
    """Lane values, E5M3 bytes (int32) and whether a scale is too large, of rows ``y [R, PADDED]``, zero outside."""
    if BITS == 8:
        s = tl.maximum(tl.max(tl.abs(y), 1) * (1.0 / 127.0), SMALLEST)
        byte = ((s.to(tl.int32, bitcast=True) + ((1 << 20) - 1)) >> 20) - (103 << 3)
    else:
        s = tl.sqrt_rn(tree_sum(y * y, R, PADDED) * (1.0 / WIDTH)) * (STEP_2 if BITS == 2 else STEP_4)
        s = tl.maximum(s, SMALLEST)
        for _ in tl.static_range(2):
            lane = tl.where(inside[None, :], code_rows(y, s, BITS), 0.0)
            s = tl.div_rn(tree_sum(lane * y, R, PADDED), tree_sum(lane * lane, R, PADDED))
            s = tl.maximum(s, SMALLEST)
        byte = ((s.to(tl.int32, bitcast=True) + (1 << 19)) >> 20) - (103 << 3)
    large = byte > 255
    byte = tl.minimum(tl.maximum(byte, 0), 255)
    return code_rows(y, scale_value(byte), BITS), byte, large


@triton.jit
def not_finite(x):
    """1 where x is NaN or infinite."""
    return (tl.abs(x) < float("inf")).to(tl.int32) ^ 1


@triton.jit
def encode_keys(k, stride_t, Order, page, status, K: tl.constexpr, RUNS: tl.constexpr, CENTRE: tl.constexpr):
    """One page of keys ``k`` (pointer to 64 tokens). RUNS: ``(start, width, class or -1)`` cover the head."""
    wrong = 0
    for i in tl.static_range(len(RUNS)):
        wrong += encode_key_run(k, stride_t, Order, page, K, RUNS, i, CENTRE)
    tl.atomic_or(status, 1, mask=wrong > 0)


@triton.jit
def encode_key_run(
    k, stride_t, Order, page, K: tl.constexpr, RUNS: tl.constexpr, I: tl.constexpr, CENTRE: tl.constexpr
):
    """Centre and, where a class stores them, codes and scales of one run of slots; returns a count of wrong values."""
    WIDTH: tl.constexpr = RUNS[I][1]
    PADDED: tl.constexpr = triton.next_power_of_2(WIDTH)
    t = tl.arange(0, 64)
    c = tl.arange(0, PADDED)
    inside = c < WIDTH
    channel = tl.load(Order + RUNS[I][0] + c, mask=inside, other=0)
    x = tl.load(k + t[:, None].to(tl.int64) * stride_t + channel[None, :], mask=inside[None, :], other=0.0)
    x = x.to(tl.float32)
    centre = (tree_sum(tl.trans(x), PADDED, 64) * (1.0 / 64.0)).to(tl.float16)
    pointer = (page + (CENTRE + 2 * RUNS[I][0])).to(tl.pointer_type(tl.float16), bitcast=True)
    tl.store(pointer + c, centre, mask=inside)
    wrong = tl.sum(tl.sum(not_finite(x), 1), 0) + tl.sum(not_finite(centre.to(tl.float32)), 0)
    if RUNS[I][2] >= 0:
        BITS: tl.constexpr = K[RUNS[I][2]][2]
        LANES: tl.constexpr = 8 * BITS
        y = hadamard(x - centre.to(tl.float32)[None, :], 64, PADDED, WIDTH & -WIDTH)
        lane, byte, large = fit_rows(y, inside, WIDTH, PADDED, BITS, 64)
        wrong += tl.sum(large.to(tl.int32), 0)
        packed = pack(lane.to(tl.int32), PADDED, BITS)
        at = tl.arange(0, LANES)[:, None] * 4 + (c // 4 * (4 * LANES) + c % 4)[None, :]
        tl.store(page + K[RUNS[I][2]][3] + at, packed.to(tl.uint8), mask=inside[None, :])
        tl.store(page + K[RUNS[I][2]][4] + t, byte.to(tl.uint8))
    return wrong


@triton.jit
def pack(lane, PADDED: tl.constexpr, BITS: tl.constexpr):
    """Lane values ``[64, PADDED]`` (int32) of a page to bytes ``[8 * BITS, PADDED]``: plane 0 in the top bits."""
    MASK: tl.constexpr = 0xC0 if BITS == 2 else 0xF0 if BITS == 4 else 0xFF
    shift = tl.arange(0, 8 // BITS)[:, None, None] * BITS
    return tl.sum((lane & MASK).reshape([8 // BITS, 8 * BITS, PADDED]) >> shift, 0)


@triton.jit
def encode_value_class(v, stride_t, page, scratch, V: tl.constexpr, C: tl.constexpr, D: tl.constexpr):
    """One class of a page of values: tokens in order, each taking over part of its predecessor's error."""
    WIDTH: tl.constexpr = V[C][1]
    BITS: tl.constexpr = V[C][2]
    PADDED: tl.constexpr = triton.next_power_of_2(WIDTH)
    LANES: tl.constexpr = 8 * BITS
    c = tl.arange(0, PADDED)
    inside = c < WIDTH
    error = tl.zeros([1, PADDED], tl.float32)
    wrong = 0
    for t in range(64):
        x = tl.load(v + t * stride_t + V[C][0] + c, mask=inside, other=0.0).to(tl.float32)[None, :]
        wrong += tl.sum(tl.sum(not_finite(x), 1), 0)
        y = hadamard(x, 1, PADDED, WIDTH & -WIDTH) + error * CARRIED
        lane, byte, large = fit_rows(y, inside, WIDTH, PADDED, BITS, 1)
        wrong += tl.sum(large.to(tl.int32), 0)
        error = tl.where(inside[None, :], y - lane * scale_value(byte)[:, None], 0.0)
        tl.store(scratch + t * D + V[C][0] + c, lane.reshape([PADDED]).to(tl.int8), mask=inside)
        tl.store(page + (V[C][4] + t) + tl.arange(0, 1), byte.to(tl.uint8))
    tl.debug_barrier()
    token = tl.arange(0, 64)
    lane = tl.load(scratch + token[:, None] * D + V[C][0] + c[None, :], mask=inside[None, :], other=0)
    packed = pack(lane.to(tl.int32), PADDED, BITS)
    row = tl.arange(0, LANES)
    at = (row // 4 * (4 * WIDTH) + row % 4)[:, None] + 4 * c[None, :]
    tl.store(page + V[C][3] + at, packed.to(tl.uint8), mask=inside[None, :])
    return wrong


@triton.jit
def encode_values(v, stride_t, page, scratch, status, V: tl.constexpr, D: tl.constexpr):
    """One page of values ``v`` (pointer to 64 tokens); ``scratch [64, D] int8`` holds its lanes on the way."""
    wrong = 0
    for i in tl.static_range(len(V)):
        wrong += encode_value_class(v, stride_t, page, scratch, V, i, D)
    tl.atomic_or(status, 1, mask=wrong > 0)


@triton.jit(do_not_specialize=["k_stride_h", "k_stride_t", "v_stride_h", "v_stride_t"])
def encode_kernel(
    KIn, VIn, Order, Pages, Blocks, Scratch, Status, k_stride_h, k_stride_t, v_stride_h, v_stride_t,
    K: tl.constexpr, V: tl.constexpr, RUNS: tl.constexpr, CENTRE: tl.constexpr, USED: tl.constexpr,
    PAGE_BYTES: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, SCATTER: tl.constexpr,
):  # fmt: skip
    """Grid (pages, HEADS, 2): keys of a page and head, or values."""
    n = tl.program_id(0)
    head = tl.program_id(1)
    block = n
    if SCATTER:
        block = tl.load(Blocks + n)
    page = Pages + (block.to(tl.int64) * HEADS + head) * PAGE_BYTES
    if tl.program_id(2) == 0:
        k = KIn + head.to(tl.int64) * k_stride_h + n.to(tl.int64) * 64 * k_stride_t
        encode_keys(k, k_stride_t, Order, page, Status, K, RUNS, CENTRE)
        clear_padding(page, USED, PAGE_BYTES)
    else:
        v = VIn + head.to(tl.int64) * v_stride_h + n.to(tl.int64) * 64 * v_stride_t
        scratch = Scratch + (n * HEADS + head).to(tl.int64) * 64 * D
        encode_values(v, v_stride_t, page, scratch, Status, V, D)


@triton.jit
def clear_padding(page, USED: tl.constexpr, PAGE_BYTES: tl.constexpr):
    """Zero the bytes between the last section and the page's end."""
    if PAGE_BYTES > USED:
        i = tl.arange(0, 64)
        tl.store(page + USED + i, tl.zeros([64], tl.uint8), mask=USED + i < PAGE_BYTES)


def key_runs(layout: PageLayout) -> tuple[tuple[int, int, int], ...]:
    """Runs of slots that cover the head, as powers of two of quarters: ``(start, width, class or -1)``."""
    out, at, quarter = [], 0, layout.head_dim // 4
    for i, cls in enumerate(layout.k_classes):
        out += [(start, quarter, -1) for start in range(at, cls.start, quarter)]
        out.append((cls.start, cls.width, i))
        at = cls.stop
    out += [(start, quarter, -1) for start in range(at, layout.head_dim, quarter)]
    return tuple(out)


def encode(
    k: Tensor,
    v: Tensor,
    layout: PageLayout,
    order: Tensor,
    *,
    out: Tensor | None = None,
    block_ids: Tensor | None = None,
    status: Tensor | None = None,
) -> Tensor:
    """Quantize and pack ``k v [G, n * 64, D]`` into pages, byte for byte as docs/format.md says.

    ``k v``: float16, bfloat16 or float32, any strides with the last dimension contiguous. Without ``out`` returns new
    pages ``[n, G, P] uint8``; ``out [blocks, G, P]`` with ``block_ids [n] int32``: page i of every head goes to
    ``out[block_ids[i]]``, which is returned whole. ``status [1] int32``: set to 1 where a value cannot be stored;
    nothing is read back then, and the call can be captured in a CUDA graph. Without it FormatError is raised.
    Raises ShapeError, DTypeError, UnsupportedError before the launch.
    """
    check_tokens(k, v, layout)
    heads, num_pages, device = k.shape[0], k.shape[1] // PAGE_TOKENS, k.device
    pages = torch.empty(num_pages, heads, layout.page_bytes, dtype=torch.uint8, device=device) if out is None else out
    check_out(pages, num_pages, heads, layout, block_ids, device)
    if num_pages == 0 or heads == 0:
        return pages
    flag = torch.zeros(1, dtype=torch.int32, device=device) if status is None else status
    scratch = torch.empty(num_pages, heads, PAGE_TOKENS, layout.head_dim, dtype=torch.int8, device=device)
    encode_kernel[(num_pages, heads, 2)](
        k, v, order_on_device(order, device), pages, flag if block_ids is None else block_ids, scratch, flag,
        k.stride(0), k.stride(1), v.stride(0), v.stride(1), **constants(layout), HEADS=heads,
        SCATTER=block_ids is not None, num_warps=ENCODE_WARPS, enable_fp_fusion=False,
    )  # fmt: skip
    if status is None:
        raise_status(flag)
    return pages


def constants(layout: PageLayout) -> dict[str, object]:
    """What the encoding kernels know of a layout."""
    return {
        "K": classes(layout.k_classes),
        "V": classes(layout.v_classes),
        "RUNS": key_runs(layout),
        "CENTRE": layout.centre_offset,
        "USED": layout.used_bytes,
        "PAGE_BYTES": layout.page_bytes,
        "D": layout.head_dim,
    }


def raise_status(status: Tensor) -> None:
    """Raise FormatError if an encoder has set ``status``. Waits for the device."""
    if int(status):
        raise FormatError(
            "expected finite keys and values, key means within fp16 (65504) and row scales up to 240, found larger ones, "
            "NaN or infinity; use --kv-cache-dtype fp16, or compute the model in a wider dtype"
        )


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
        raise ShapeError(f"expected a contiguous last dimension, found strides {k.stride()} and {v.stride()}")
    check_device(k.device)


def check_out(
    pages: Tensor, num_pages: int, heads: int, layout: PageLayout, block_ids: Tensor | None, device: torch.device
) -> None:
    """Check where encoded pages go. Raises ShapeError or DTypeError."""
    check_tensor("out", pages, (torch.uint8,), 3, device)
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
