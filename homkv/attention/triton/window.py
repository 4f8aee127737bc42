"""Append one token per sequence, and seal the page that is due, inside a CUDA graph."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from homkv.attention.triton.checks import check_tensor, check_view
from homkv.attention.triton.decode import order_on_device
from homkv.attention.triton.encode import ENCODE_WARPS, clear_padding, constants, encode_keys, encode_values
from homkv.attention.view import LayerView
from homkv.errors import ShapeError
from homkv.formats.rows import RowsCodec
from homkv.spec import PAGE_TOKENS


@triton.jit
def shift_window(exact, D: tl.constexpr, DP: tl.constexpr):
    """Move the newest 64 tokens of a full window to its front. Everybody has read what is overwritten."""
    tl.debug_barrier()
    t = tl.arange(0, 64)[:, None] * D
    d = tl.arange(0, DP)[None, :]
    newest = tl.load(exact + 64 * D + t + d, mask=d < D)
    tl.store(exact + t + d, newest, mask=d < D)


@triton.jit
def append_kernel(
    KIn, VIn, Due, Order, Pool, PageTable, NumPages, ExactK, ExactV, ExactLen, Slots, Scratch, Status, k_stride_b,
    k_stride_h, v_stride_b, v_stride_h, max_pages, num_blocks, num_slots, exact_tokens,
    K: tl.constexpr, V: tl.constexpr, RUNS: tl.constexpr, CENTRE: tl.constexpr, USED: tl.constexpr,
    PAGE_BYTES: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, HEADS: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """Grid (batch, HEADS, 2): the keys of a sequence and head, or the values."""
    b = tl.program_id(0)
    head = tl.program_id(1)
    slot = tl.minimum(tl.maximum(tl.load(Slots + b), 0), num_slots - 1)
    start = (slot * HEADS + head).to(tl.int64) * exact_tokens * D
    d = tl.arange(0, DP)
    if tl.program_id(2) == 0:
        exact = ExactK + start
        token = tl.load(KIn + b * k_stride_b + head * k_stride_h + d, mask=d < D, other=0.0)
    else:
        exact = ExactV + start
        token = tl.load(VIn + b * v_stride_b + head * v_stride_h + d, mask=d < D, other=0.0)
    token = token.to(ExactK.dtype.element_ty)
    finite = (tl.abs(token.to(tl.float32)) < float("inf")).to(tl.int32)
    tl.atomic_or(Status, 1, mask=tl.min(finite, 0) == 0)
    if tl.load(Due + b) != 0:
        window = exact + SINKS * D
        at = tl.minimum(tl.maximum(tl.load(NumPages + b) - 1, 0), max_pages - 1)
        block = tl.load(PageTable + b.to(tl.int64) * max_pages + at)
        block = tl.minimum(tl.maximum(block, 0), num_blocks - 1)
        page = Pool + (block.to(tl.int64) * HEADS + head) * PAGE_BYTES
        if tl.program_id(2) == 0:
            encode_keys(window, D, Order, page, Status, K, RUNS, CENTRE)
            clear_padding(page, USED, PAGE_BYTES)
        else:
            scratch = Scratch + (b * HEADS + head).to(tl.int64) * 64 * D
            encode_values(window, D, page, scratch, Status, V, D)
        shift_window(window, D, DP)
    last = tl.minimum(tl.maximum(tl.load(ExactLen + b) - 1, 0), exact_tokens - 1)
    tl.store(exact + last.to(tl.int64) * D + d, token, mask=d < D)


def append(k: Tensor, v: Tensor, view: LayerView, due: Tensor, codec: RowsCodec, status: Tensor) -> None:
    """Store one token per sequence, ``k v [B, G, D]``, behind the window of ``view``; seal where ``due [B]`` is true.

    The lengths in ``view`` already count the new token, and the new page of a due sequence: its oldest 64 window tokens
    become page ``num_pages - 1``, the newest 64 move to the window's front, and the token is written at
    ``exact_len - 1``. Sealed bytes are those of :func:`homkv.attention.triton.encode.encode`.
    ``status [1] int32`` is set to 1 where a value cannot be stored; nothing is read back, so the call can be captured.
    Raises ShapeError, DTypeError, UnsupportedError before the launch.
    """
    batch, heads = check_view(view, codec)
    device, dim, layout = view.pool.device, codec.head_dim, codec.layout
    if tuple(k.shape) != (batch, heads, dim) or tuple(v.shape) != (batch, heads, dim):
        raise ShapeError(
            f"expected k and v [B={batch}, G={heads}, D={dim}], found {tuple(k.shape)} and {tuple(v.shape)}; pass one "
            "token per sequence"
        )
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    check_tensor("due", due, (torch.bool, torch.int32), 1, device)
    check_tensor("status", status, (torch.int32,), 1, device)
    if due.shape[0] != batch or view.exact_k.shape[2] < codec.num_sinks + codec.max_window:
        raise ShapeError(
            f"expected due [{batch}] and room for {codec.num_sinks + codec.max_window} exact tokens, found "
            f"{tuple(due.shape)} and {view.exact_k.shape[2]}; take both from the cache"
        )
    scratch = torch.empty(batch, heads, PAGE_TOKENS, dim, dtype=torch.int8, device=device)
    append_kernel[(batch, heads, 2)](
        k, v, due, order_on_device(codec.order, device), view.pool, view.page_table, view.num_pages, view.exact_k,
        view.exact_v, view.exact_len, view.slots, scratch, status, k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        view.page_table.shape[1], view.pool.shape[0], view.exact_k.shape[0], view.exact_k.shape[2], **constants(layout),
        DP=triton.next_power_of_2(dim), HEADS=heads, SINKS=codec.num_sinks, num_warps=ENCODE_WARPS,
        enable_fp_fusion=False,
    )  # fmt: skip
