"""The window of exact tokens inside a CUDA graph: append one token per sequence, seal what is due.

Sealing takes long next to a decode step, because a page's values must be encoded one token after another. Its pages do
not depend on the step's tokens, so :func:`seal_due` seals those of all layers at once, before the first layer.
"""

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from homkv.attention.triton.checks import ALIGNMENT, EXACT_DTYPES, check_status_word, check_tensor, check_view
from homkv.attention.triton.encode import (
    EncodeConfig,
    constants,
    interpreted,
    lanes_for,
    options,
    slots_on_device,
)
from homkv.attention.triton.encode_keys import encode_keys, pages_at_once
from homkv.attention.triton.encode_values import NOT_FINITE, encode_values
from homkv.attention.triton.runtime import is_interpreting
from homkv.attention.triton.threads import load_own, store_own, vector_of
from homkv.attention.triton.warp import load_number
from homkv.attention.view import LayerView
from homkv.errors import DTypeError, ShapeError
from homkv.formats.rows import RowsCodec
from homkv.spec import PAGE_TOKENS

VALUE_LANES = 8  # few pages are due at a time: latency counts
ALIGNED = tl.constexpr(ALIGNMENT)
AT_ONCE = tl.constexpr(8)  # loads of a thread before their stores


@triton.jit
def move_down(
    x, stride_h, first, stop, D: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr, KEPT: tl.constexpr,
    THREADS: tl.constexpr,
):  # fmt: skip
    """Move KEPT tokens of ``x``, a multiple of 64, down by 64: WIDTH channels of heads ``first .. stop``."""
    SIZE: tl.constexpr = x.dtype.element_ty.primitive_bitwidth // 8
    WORDS: tl.constexpr = vector_of(WIDTH * SIZE // 4, START * SIZE)
    EACH: tl.constexpr = WIDTH * SIZE // (4 * WORDS)  # accesses of a token
    thread = tl.arange(0, THREADS)
    for block in tl.range(0, KEPT, 64, num_stages=1):
        if block > 0:
            tl.debug_barrier()  # all threads have read the 64 tokens that are overwritten now
        for head in tl.range(first, stop, num_stages=1):
            token = (x + (tl.cast(head, tl.int64) * stride_h + (block * D + START))).to(tl.int64, bitcast=True)
            for start in tl.range(0, 64 * EACH, AT_ONCE * THREADS, num_stages=1):
                held = ()
                for i in tl.static_range(AT_ONCE):
                    n = start + i * THREADS + thread
                    at = token + (n // EACH * (D * SIZE) + n % EACH * (4 * WORDS))
                    held = held + (load_own(at + 64 * D * SIZE, n < 64 * EACH, WORDS, 4),)
                for i in tl.static_range(AT_ONCE):
                    n = start + i * THREADS + thread
                    at = token + (n // EACH * (D * SIZE) + n % EACH * (4 * WORDS))
                    store_own(at, held[i], n < 64 * EACH, 4)


@triton.jit
def bits_of(x):
    """A tensor of 16- or 32-bit floats as int32."""
    if x.dtype.primitive_bitwidth == 32:
        return x.to(tl.int32, bitcast=True)
    else:
        return x.to(tl.int16, bitcast=True).to(tl.int32)


@triton.jit
def put_token(
    x, stride_h, new, new_stride_h, Status, last, first, stop, D: tl.constexpr, START: tl.constexpr,
    WIDTH: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """Write WIDTH channels of the new token of heads ``first .. stop`` at index ``last`` of ``x``."""
    SIZE: tl.constexpr = x.dtype.element_ty.primitive_bitwidth // 8
    largest = tl.zeros([THREADS], tl.int32)
    for head in tl.range(first, stop, num_stages=1):
        source = new + tl.cast(head, tl.int64) * new_stride_h
        target = (x + (tl.cast(head, tl.int64) * stride_h + last * D)).to(tl.int64, bitcast=True)
        for start in tl.static_range(START, START + WIDTH, THREADS):
            c = start + tl.arange(0, THREADS)
            token = load_number(source + tl.minimum(c, START + WIDTH - 1)).to(x.dtype.element_ty)
            store_own(target + c * SIZE, (bits_of(token),), c < START + WIDTH, SIZE)
            largest = tl.maximum(largest, token.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    if tl.max(largest, 0) >= 0x7F800000:
        tl.atomic_or(Status, NOT_FINITE)


@triton.jit
def finish(
    x, stride_h, new, new_stride_h, Status, due, last, first, stop, D: tl.constexpr, START: tl.constexpr,
    WIDTH: tl.constexpr, SINKS: tl.constexpr, KEPT: tl.constexpr, NEW: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """What is left to do for some channels of heads ``first .. stop`` of a sequence, ``x`` its first exact token."""
    if due:
        move_down(x + SINKS * D, stride_h, first, stop, D, START, WIDTH, KEPT, THREADS)
        tl.debug_barrier()  # the new token overwrites what was moved by other threads
    if NEW:
        put_token(x, stride_h, new, new_stride_h, Status, last, first, stop, D, START, WIDTH, THREADS)


@triton.jit
def at_address(X, Table, layer, field, TABLE: tl.constexpr):
    """A layer's tensor: ``X`` itself, or the address in ``Table [layers, 3]`` with the type of ``X``."""
    if TABLE:
        return tl.multiple_of(tl.load(Table + layer * 3 + field).to(X.dtype), ALIGNED)
    else:
        return X


@triton.jit(do_not_specialize=["max_pages", "num_blocks", "num_slots"])
def window_kernel(
    KNew, VNew, k_stride_b, k_stride_h, v_stride_b, v_stride_h, Due, Pool, ExactK, ExactV, Table, PageTable, NumPages,
    ExactLen, Slots, SlotOf, Status, max_pages, num_blocks, num_slots,
    K: tl.constexpr, V: tl.constexpr, GAPS: tl.constexpr, ORDER: tl.constexpr, CENTRE: tl.constexpr,
    USED: tl.constexpr, PAGE_BYTES: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    K_LANES: tl.constexpr, V_LANES: tl.constexpr, OVERLAP: tl.constexpr, THREADS: tl.constexpr,
    HEADS: tl.constexpr, EXACT: tl.constexpr, SINKS: tl.constexpr, KEPT: tl.constexpr, NEW: tl.constexpr,
    TABLE: tl.constexpr,
):  # fmt: skip
    """Grid (items of a sequence, batch, layers): a class of values of some heads, or what is left of some heads."""
    item = tl.program_id(0)
    b = tl.program_id(1)
    layer = tl.program_id(2)
    due = tl.load(Due + b) != 0
    if not (due | NEW):
        return
    pool = at_address(Pool, Table, layer, 0, TABLE)
    slot = tl.minimum(tl.maximum(tl.load(Slots + b), 0), num_slots - 1).to(tl.int64)
    exact_k = at_address(ExactK, Table, layer, 1, TABLE) + slot * (HEADS * EXACT * D)
    exact_v = at_address(ExactV, Table, layer, 2, TABLE) + slot * (HEADS * EXACT * D)
    last = tl.minimum(tl.maximum(tl.load(ExactLen + b) - 1, 0), EXACT - 1)
    newest = tl.minimum(tl.maximum(tl.load(NumPages + b) - 1, 0), max_pages - 1)
    blocks = PageTable + b.to(tl.int64) * max_pages + newest
    k_new = KNew + b.to(tl.int64) * k_stride_b
    v_new = VNew + b.to(tl.int64) * v_stride_b
    STRIDE: tl.constexpr = EXACT * D

    V_PAGES: tl.constexpr = THREADS // V_LANES
    K_PAGES: tl.constexpr = pages_at_once(THREADS // K_LANES)
    V_ITEMS: tl.constexpr = (HEADS + V_PAGES - 1) // V_PAGES * len(V)
    if item < V_ITEMS:
        first = item // max(len(V), 1) * V_PAGES
        stop = tl.minimum(first + V_PAGES, HEADS)
        for c in tl.static_range(len(V)):
            if item % len(V) == c:
                if due:
                    encode_values(
                        exact_v + SINKS * D, STRIDE, D, pool, blocks, Status, first, HEADS, HEADS, num_blocks, V, c,
                        PAGE_BYTES, V_LANES, OVERLAP, THREADS, True,
                    )  # fmt: skip
                    tl.debug_barrier()
                finish(
                    exact_v, STRIDE, v_new, v_stride_h, Status, due, last, first, stop, D, V[c][0], V[c][1], SINKS,
                    KEPT, NEW, THREADS,
                )  # fmt: skip
    else:
        first = (item - V_ITEMS) * K_PAGES
        stop = tl.minimum(first + K_PAGES, HEADS)
        if due:
            encode_keys(
                exact_k + SINKS * D, STRIDE, D, exact_v + SINKS * D, STRIDE, D, pool, blocks, SlotOf, Status, first,
                HEADS, HEADS, num_blocks, K, GAPS, ORDER, CENTRE, USED, PAGE_BYTES, D, DP, K_LANES, THREADS, True,
            )  # fmt: skip
            tl.debug_barrier()
        finish(exact_k, STRIDE, k_new, k_stride_h, Status, due, last, first, stop, D, 0, D, SINKS, KEPT, NEW, THREADS)
        for i in tl.static_range(len(GAPS)):
            finish(
                exact_v, STRIDE, v_new, v_stride_h, Status, due, last, first, stop, D, GAPS[i][0], GAPS[i][1], SINKS,
                KEPT, NEW, THREADS,
            )  # fmt: skip


def append(k: Tensor, v: Tensor, view: LayerView, due: Tensor, codec: RowsCodec, status: Tensor) -> None:
    """Store one token per sequence, ``k v [B, G, D]``, behind the window of ``view``; seal where ``due [B]`` is true.

    The lengths in ``view`` already count the new token, and the new page of a due sequence: its oldest 64 window tokens
    become page ``num_pages - 1``, the others move to the window's front, and the token is written at
    ``exact_len - 1``. Sealed bytes are those of :func:`homkv.attention.triton.encode.encode`.
    ``status [1] int32`` is set to non-zero where a value cannot be stored; nothing is read back, so the call can be
    captured. Indices outside their array are clamped into it. Raises ShapeError, DTypeError, UnsupportedError before
    the launch.
    """
    batch, heads = check_window(view, due, codec, status)
    if tuple(k.shape) != (batch, heads, codec.head_dim) or k.shape != v.shape:
        raise ShapeError(
            f"expected k and v [B={batch}, G={heads}, D={codec.head_dim}], found {tuple(k.shape)} and "
            f"{tuple(v.shape)}; pass one token per sequence"
        )
    if k.dtype != v.dtype or k.dtype not in EXACT_DTYPES or {k.device, v.device} != {due.device}:
        raise DTypeError(
            f"expected k and v both float32, float16 or bfloat16 on {due.device}, found {k.dtype} on {k.device} and "
            f"{v.dtype} on {v.device}; cast or move them"
        )
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    _launch((view,), due, codec, status, k, v)


def seal_due(views: Sequence[LayerView], due: Tensor, codec: RowsCodec, status: Tensor) -> None:
    """Seal the oldest 64 window tokens of every sequence where ``due [B]`` is true, in all ``views`` at once.

    The views are layers that share page table, counters and slots; their lengths already count the new page and no
    longer its tokens. Afterwards :func:`append` may be called with ``due`` all false. Otherwise as :func:`append`.
    """
    for view in views:
        check_window(view, due, codec, status)
    first = views[0]
    if any(
        getattr(view, name) is not getattr(first, name)
        for view in views
        for name in ("page_table", "num_pages", "exact_len", "slots")
    ) or any(v.pool.shape != first.pool.shape or v.exact_k.shape != first.exact_k.shape for v in views):
        raise ShapeError("expected layers that share page_table, counters and slots, and their shapes; seal them apart")
    _launch(tuple(views), due, codec, status, first.exact_k[:1, :, 0], first.exact_v[:1, :, 0], is_new=False)


def _launch(
    views: tuple[LayerView, ...],
    due: Tensor,
    codec: RowsCodec,
    status: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    is_new: bool = True,
) -> None:
    view, config = views[0], window_config(codec)
    batch, heads = view.page_table.shape[0], view.pool.shape[1]
    if batch == 0 or heads == 0:
        return
    device, order = view.pool.device, tuple(codec.order.tolist())
    table = _addresses(views) if len(views) > 1 else view.slots
    window_kernel[(config.items(heads, len(codec.layout.v_classes)), batch, len(views))](
        k, v, *k.stride()[:2], *v.stride()[:2], due, view.pool, view.exact_k, view.exact_v, table, view.page_table,
        view.num_pages, view.exact_len, view.slots, slots_on_device(order, device), status, view.page_table.shape[1],
        view.pool.shape[0], view.exact_k.shape[0], **constants(codec.layout, order, config), HEADS=heads,
        EXACT=view.exact_k.shape[2], SINKS=codec.num_sinks, KEPT=codec.max_window - PAGE_TOKENS, NEW=is_new,
        TABLE=len(views) > 1, **options(config),
    )  # fmt: skip


@functools.lru_cache(maxsize=64)
def window_config(codec: RowsCodec) -> EncodeConfig:
    """How the few pages of a window are spread over threads: many lanes per row of values."""
    if is_interpreting():
        return interpreted(codec.layout)
    quarter = codec.head_dim // 4
    return EncodeConfig(lanes_for(codec.layout.k_classes, 4), min(VALUE_LANES, quarter & -quarter), overlap=True)


def _addresses(views: tuple[LayerView, ...]) -> Tensor:
    addresses = tuple((x.pool.data_ptr(), x.exact_k.data_ptr(), x.exact_v.data_ptr()) for x in views)
    return _table(addresses, views[0].pool.device)


@functools.lru_cache(maxsize=64)
def _table(addresses: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    return torch.tensor(addresses, dtype=torch.int64, device=device)


def check_window(view: LayerView, due: Tensor, codec: RowsCodec, status: Tensor) -> tuple[int, int]:
    """Check what :func:`append` and :func:`seal_due` share. Returns batch and kv heads.

    Raises ShapeError, DTypeError.
    """
    batch, heads = check_view(view, codec)
    device, full = view.pool.device, codec.num_sinks + codec.max_window
    check_tensor("due", due, (torch.bool, torch.int32), 1, device)
    check_status_word(status, device)
    if due.shape[0] != batch or view.exact_k.shape[2] < full:
        raise ShapeError(
            f"expected due [{batch}] and room for {full} exact tokens, found {tuple(due.shape)} and "
            f"{view.exact_k.shape[2]}; take both from the cache"
        )
    return batch, heads
