"""Decode attention on rows pages: exact tokens, the pages' splits in one wave of programs, one merge."""

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from homkv.attention.triton.checks import check_attend
from homkv.attention.triton.combine import combine_kernel
from homkv.attention.triton.decode_pages import decode_kernel
from homkv.attention.triton.lanes import LOG2E
from homkv.attention.triton.prepare import exact_tokens_kernel
from homkv.attention.triton.runtime import has_dependent_launch, num_processors
from homkv.attention.view import LayerView
from homkv.formats.rows import RowsCodec
from homkv.spec import ChannelClass, PageLayout

MIN_PAGES = 4  # of a split, and the step of its size: fewer would cost more to merge than to read
EXACT_TILE = 32  # exact tokens that one program attends to
PREPARE_WARPS = 2
COMBINE_SPLITS = 64  # partial outputs that are merged at a time
COMBINE_WARPS = 4


def wave(rows: int) -> tuple[int, int | None]:
    """Programs per multiprocessor that run at a time, and the registers per lane that this leaves them.

    Eight may use all there are: for two pages at a time, or two sets of columns. One page and one set take less.
    """
    return (12, 168) if 4 < rows <= 8 else (8, None)


@dataclass(frozen=True)
class Plan:
    """Sizes of one call."""

    batch: int
    heads: int
    rows: int  # query rows per kv head
    max_items: int  # splits of all sequences together
    shape: dict[str, Any]  # constants that several kernels share
    exact: dict[str, Any]  # of the exact tokens' tiles; their number is a power of two
    splits: dict[str, Any]  # of the division into splits

    @classmethod
    def of(cls, q: Tensor, view: LayerView, codec: RowsCodec, programs: int | None) -> "Plan":
        """Lay a checked call out."""
        batch, heads, dim = q.shape[0], view.pool.shape[1], codec.head_dim
        rows = q.shape[1] // heads * q.shape[2]
        programs = programs or wave(rows)[0]
        shape = {"D": dim, "ROWS": rows, "HEADS": heads, "PDL": has_dependent_launch(q.device)}
        tiles = triton.next_power_of_2(max(triton.cdiv(view.exact_k.shape[2], EXACT_TILE), 1))
        return cls(
            batch, heads, rows, max(batch, programs * num_processors(q.device) // heads), shape,
            {"EXACT_TILE": EXACT_TILE, "EXACT_TILES": tiles},
            {"STEP": MIN_PAGES, "BATCH_BLOCK": max(triton.next_power_of_2(batch), 32)},
        )  # fmt: skip

    def partials(self, device: torch.device, *lead: int) -> tuple[Tensor, Tensor, Tensor]:
        """Partial outputs ``[*lead, rows, D]``, maxima and denominators ``[*lead, rows]``."""
        return (
            torch.empty(*lead, self.rows, self.shape["D"], dtype=torch.float32, device=device),
            torch.empty(*lead, self.rows, dtype=torch.float32, device=device),
            torch.empty(*lead, self.rows, dtype=torch.float32, device=device),
        )


def attend_rows(
    q: Tensor, view: LayerView, codec: RowsCodec, softmax_scale: float, programs: int | None = None
) -> tuple[Tensor, Tensor]:
    """Decode attention on rows pages; see homkv.attention.triton.attend.

    The grid has ``programs`` per multiprocessor, one wave unless given; it changes the result by rounding only.
    """
    check_attend(q, view, codec, softmax_scale)
    q = q if q.stride(-1) == 1 else q.contiguous()
    plan, device = Plan.of(q, view, codec, programs), q.device
    partial = plan.partials(device, plan.max_items, plan.heads)
    exact = plan.partials(device, plan.batch, plan.heads, plan.exact["EXACT_TILES"])
    scale_log2, pdl = softmax_scale * LOG2E.value, plan.shape["PDL"]
    # The pages' programs do not wait for the exact tokens' ones: they run side by side, and the merge waits for both.
    exact_tokens_kernel[(plan.batch, plan.heads, plan.exact["EXACT_TILES"])](
        q, view.exact_k, view.exact_v, view.exact_len, view.slots, *exact, view.exact_k.shape[2],
        view.exact_k.shape[0], *q.stride()[:3], scale_log2, **plan.shape, **plan.exact,
        DP=triton.next_power_of_2(codec.head_dim), N=8 if plan.rows <= 8 else 16, Q_LEN=q.shape[2],
        num_warps=PREPARE_WARPS, launch_pdl=pdl,
    )  # fmt: skip
    launch_pages(q, view, codec, scale_log2, plan, partial)
    o = torch.empty(q.shape, dtype=torch.float32, device=device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=device)
    channels = runs(codec.layout)
    combine_kernel[(plan.batch * plan.heads * plan.rows, len(channels))](
        o, lse, *partial, view.num_pages, plan.batch, plan.max_items, *exact, view.exact_len, view.exact_k.shape[2],
        V=channels, **plan.shape, **plan.exact, **plan.splits, SPLITS=COMBINE_SPLITS, num_warps=COMBINE_WARPS,
        launch_pdl=pdl,
    )  # fmt: skip
    return o, lse


def launch_pages(
    q: Tensor,
    view: LayerView,
    codec: RowsCodec,
    scale_log2: float,
    plan: Plan,
    partial: tuple[Tensor, Tensor, Tensor],
) -> None:
    """The pages' part of a call."""
    layout = codec.layout
    decode_kernel[(plan.max_items, plan.heads)](
        q, order_on_device(codec.order, q.device), *q.stride()[:3], scale_log2, view.pool.view(torch.int8),
        view.page_table, view.num_pages, *partial, plan.batch, plan.max_items, view.page_table.shape[1],
        view.pool.shape[0], **plan.shape, **plan.splits, K=classes(layout.k_classes), V=classes(layout.v_classes),
        CENTRE=layout.centre_offset, PAGE_BYTES=layout.page_bytes, DP=triton.next_power_of_2(codec.head_dim),
        Q_LEN=q.shape[2], SPLIT=q.dtype == torch.float32, num_warps=1, num_stages=1,
        maxnreg=wave(plan.rows)[1], launch_pdl=plan.shape["PDL"],
    )  # fmt: skip


def classes(of: tuple[ChannelClass, ...]) -> tuple[tuple[int, ...], ...]:
    """Channel classes as a kernel's constants: ``(start, width, bits, codes_offset, scales_offset)``."""
    return tuple((c.start, c.width, c.bits, c.codes_offset, c.scales_offset) for c in of)


def runs(layout: PageLayout) -> tuple[tuple[int, int, bool], ...]:
    """Values' channels in runs ``(start, width, stored)`` that cover the head: classes and what lies between them."""
    out, at = [], 0
    for cls in layout.v_classes:
        if cls.start > at:
            out.append((at, cls.start - at, False))
        out.append((cls.start, cls.width, True))
        at = cls.stop
    if at < layout.head_dim:
        out.append((at, layout.head_dim - at, False))
    return tuple(out)


@functools.lru_cache(maxsize=256)
def _order(order: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(order, dtype=torch.int32, device=device)


def order_on_device(order: Tensor, device: torch.device) -> Tensor:
    """A channel order (on the CPU) as int32 on a device; made once."""
    return _order(tuple(order.tolist()), device)
