"""Decode attention on rows pages: exact tokens and pages in one wave of programs, then one merge."""

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from homkv.attention.triton.checks import check_attend, reachable
from homkv.attention.triton.combine import combine_kernel
from homkv.attention.triton.decode_pages import decode_kernel
from homkv.attention.triton.lanes import LOG2E
from homkv.attention.triton.runtime import has_dependent_launch, num_processors, shared_memory
from homkv.attention.triton.staging import room
from homkv.attention.view import LayerView
from homkv.formats.rows import RowsCodec
from homkv.spec import ChannelClass, PageLayout

MIN_UNITS = 1  # of a split: the time of few pages counts more than that of merging a few splits more
EXACT_TILE = 16  # exact tokens that are attended to at a time
MERGED_SPLITS = 256  # at most, of partial outputs that are merged at a time
WHOLE = 32  # channels that are worth a program of the merge
STATIC_SHARED = 48 * 1024  # bytes of a program, at most
RESERVED_SHARED = 1024  # bytes that the driver takes for each program
MERGED_NUMBERS = 4096  # of a warp of the merge: registers for its loads in flight


def exact_memory(rows: int, head_dim: int, itemsize: int) -> int:
    """Bytes of shared memory that a tile of exact tokens takes, at most."""
    return (EXACT_TILE + (8 if rows <= 8 else 16)) * triton.next_power_of_2(head_dim) * itemsize


def staging(rows: int, page_bytes: int, exact_bytes: int) -> tuple[int, int]:
    """Pages of a step, and how many steps' pages lie in shared memory at a time: two if they fit, else none."""
    most = 2 if rows <= 4 else 1
    for pages in range(most, 0, -1):
        if exact_bytes + 2 * pages * room(page_bytes) <= STATIC_SHARED:
            return pages, 2
    return most, 0


def wave(rows: int, shared_bytes: int, device: torch.device) -> tuple[int, int | None]:
    """Programs per multiprocessor that run at a time, and the registers per lane that this leaves them.

    Eight may use all there are: for two pages at a time, or two sets of columns. One page and one set take less.
    """
    programs, registers = (12, 168) if 4 < rows <= 8 else (8, None)
    return min(programs, shared_memory(device) // (shared_bytes + RESERVED_SHARED)), registers


@dataclass(frozen=True)
class Plan:
    """Sizes of one call."""

    batch: int
    heads: int
    rows: int  # query rows per kv head
    max_items: int  # splits of all sequences together
    head_dim: int
    pdl: bool
    stages: int
    registers: int | None
    splits: dict[str, Any]  # constants of the division into splits and of the partial outputs

    @classmethod
    def of(cls, q: Tensor, view: LayerView, codec: RowsCodec, programs: int | None) -> "Plan":
        """Lay a checked call out."""
        batch, heads = q.shape[0], view.pool.shape[1]
        rows = q.shape[1] // heads * q.shape[2]
        page_bytes = codec.layout.page_bytes
        exact_bytes = exact_memory(rows, codec.head_dim, max(q.dtype.itemsize, view.exact_k.dtype.itemsize))
        pages, stages = staging(rows, page_bytes, exact_bytes)
        most, registers = wave(rows, exact_bytes + stages * pages * room(page_bytes), q.device)
        splits = {
            "D": codec.head_dim, "ROWS": rows, "HEADS": heads, "EXACT_TILE": EXACT_TILE,
            "EXACT_TILES": triton.next_power_of_2(max(triton.cdiv(view.exact_k.shape[2], EXACT_TILE), 1)),
            "PAGES": pages, "STEP": MIN_UNITS,
            "BATCH_BLOCK": max(triton.next_power_of_2(batch), 32),
        }  # fmt: skip
        max_items = max(batch, (programs or most) * num_processors(q.device) // heads)
        pdl = has_dependent_launch(q.device)
        return cls(batch, heads, rows, max_items, codec.head_dim, pdl, stages, registers, splits)

    def partials(self, device: torch.device, *lead: int) -> tuple[Tensor, Tensor, Tensor]:
        """Partial outputs ``[*lead, rows, D]``, maxima and denominators ``[*lead, rows]``."""
        return (
            torch.empty(*lead, self.rows, self.head_dim, dtype=torch.float32, device=device),
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
    q = reachable(q)
    plan, device = Plan.of(q, view, codec, programs), q.device
    partial = plan.partials(device, plan.max_items, plan.heads)
    exact = plan.partials(device, plan.batch, plan.heads, plan.splits["EXACT_TILES"])
    launch_splits(q, view, codec, softmax_scale * LOG2E.value, plan, partial, exact)
    o = torch.empty(q.shape, dtype=torch.float32, device=device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=device)
    channels = runs(codec.layout, whole_blocks=False)
    combine_kernel[(plan.batch * plan.heads * plan.rows, len(channels))](
        o, lse, *partial, view.num_pages, plan.batch, plan.max_items, *exact, view.exact_len, view.exact_k.shape[2],
        V=channels, **plan.splits, **merging(plan.max_items, plan.batch, channels), PDL=plan.pdl, launch_pdl=plan.pdl,
    )  # fmt: skip
    return o, lse


def launch_splits(
    q: Tensor,
    view: LayerView,
    codec: RowsCodec,
    scale_log2: float,
    plan: Plan,
    partial: tuple[Tensor, Tensor, Tensor],
    exact: tuple[Tensor, Tensor, Tensor],
) -> None:
    """The partial outputs of a call."""
    layout, exact_k = codec.layout, view.exact_k
    decode_kernel[(plan.max_items, plan.heads)](
        q, order_on_device(codec.order, q.device), *q.stride()[:3], scale_log2, view.pool.view(torch.int8),
        view.page_table, view.num_pages, *partial, exact_k, view.exact_v, view.exact_len, view.slots, *exact,
        plan.batch, plan.max_items, view.page_table.shape[1], view.pool.shape[0], exact_k.shape[2], exact_k.shape[0],
        **plan.splits, K=classes(layout.k_classes), V=classes(layout.v_classes), CENTRE=layout.centre_offset,
        PAGE_BYTES=layout.page_bytes, DP=triton.next_power_of_2(codec.head_dim), Q_LEN=q.shape[2],
        SPLIT=q.dtype == torch.float32, STAGES=plan.stages, PDL=plan.pdl, num_warps=1, num_stages=1,
        maxnreg=plan.registers, launch_pdl=plan.pdl,
    )  # fmt: skip


def merging(max_items: int, batch: int, channels: tuple[tuple[int, int, bool], ...]) -> dict[str, int]:
    """How many partial outputs a program of the merge takes at a time, all if sequences are equal, and its warps."""
    splits = min(max(triton.next_power_of_2(triton.cdiv(max_items, batch)), 16), MERGED_SPLITS)
    width = triton.next_power_of_2(max(run[1] for run in channels))
    return {"SPLITS": splits, "num_warps": min(max(splits * width // MERGED_NUMBERS, 1), 16)}


def classes(of: tuple[ChannelClass, ...]) -> tuple[tuple[int, ...], ...]:
    """Channel classes as a kernel's constants: ``(start, width, bits, codes_offset, scales_offset)``."""
    return tuple((c.start, c.width, c.bits, c.codes_offset, c.scales_offset) for c in of)


def runs(layout: PageLayout, *, whole_blocks: bool) -> tuple[tuple[int, int, bool], ...]:
    """Values' channels in runs ``(start, width, stored)`` that cover the head: classes and what lies between them.

    A class is cut into runs of WHOLE channels, or, with ``whole_blocks``, into the blocks that its rotation works on;
    where that would leave shorter runs, it is one.
    """
    out, at = [], 0
    for cls in layout.v_classes:
        if cls.start > at:
            out.append((at, cls.start - at, False))
        block = cls.width & -cls.width
        width = block if whole_blocks else WHOLE
        width = width if width >= WHOLE and cls.width % width == 0 else cls.width
        out += [(start, width, True) for start in range(cls.start, cls.stop, width)]
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
