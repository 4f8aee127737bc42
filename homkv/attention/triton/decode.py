"""Decode attention on rows pages: split-KV over one wave of programs, then one merge."""

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from homkv.attention.triton.checks import check_attend
from homkv.attention.triton.combine import combine_kernel
from homkv.attention.triton.fragments import (
    centre_scores,
    count_blocks,
    load_centre,
    load_page_keys,
    load_page_values,
    max4,
    page_scores,
    row_scale,
    value_blocks,
)
from homkv.attention.triton.lanes import LOG2E, MAGIC, NEVER, fast_log2, fast_reciprocal, prefetch, to_int8
from homkv.attention.triton.prepare import count_steps, prepare_kernel
from homkv.attention.triton.runtime import has_dependent_launch, num_processors
from homkv.attention.triton.schedule import find_split, split_range
from homkv.attention.view import LayerView
from homkv.formats.rows import RowsCodec
from homkv.spec import ChannelClass, PageLayout

MIN_PAGES = 4  # of a split, and the step of its size: fewer would cost more to merge than to read
EXACT_TILE = 32  # exact tokens that one program attends to
PREPARE_WARPS = 2
COMBINE_SPLITS = 64  # partial outputs that are merged at a time
COMBINE_WARPS = 4
LOG2_127 = tl.constexpr(6.988684686772166)
LOG2_255 = tl.constexpr(7.994353436858858)


@triton.jit
def load_centre_query(centre, DP: tl.constexpr, N: tl.constexpr):
    """Right operands of the centre's product: ``(even, odd)``, tuples of ``[16, N]`` float16."""
    at = tl.arange(0, 16)[:, None] + tl.arange(0, N)[None, :] * (DP // 2)
    even = ()
    odd = ()
    for i in tl.static_range(DP // 32):
        even = even + (tl.load(centre + i * 16 + at),)
        odd = odd + (tl.load(centre + N * DP // 2 + i * 16 + at),)
    return even, odd


@triton.jit
def page_step(
    page, state, q8, unit, ratio, centre, nudge,
    K: tl.constexpr, V: tl.constexpr, CENTRE: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, N: tl.constexpr,
    SPLIT: tl.constexpr, SHIFTED: tl.constexpr,
):  # fmt: skip
    """Add one page to ``state = (o, m, l)``: rotated outputs ``[32, N]`` each, maximum and denominator ``[8, N]``.

    A value's scale joins its score as a logarithm, ``z = score + log2(v_scale)``, so that one maximum per page serves
    as the softmax's and as the weights' scale: ``p8 = round(L exp2(z - max z) + nudge)``, L = 255 for weights SHIFTED
    by -128 and 127 else. Outputs and denominator are L times too large. Numbers per query row are kept as 8 equal
    rows, which is how the centre's product gives them.
    """
    o, m, l = state
    # All loads first: nothing else hides their latency but other warps.
    keys = load_page_keys(page, K)
    middle = load_centre(page, CENTRE, D, DP)
    values = load_page_values(page, V)
    s = page_scores(keys, q8, ratio, K, N)
    bias = centre_scores(middle, centre[1], DP, N) * centre[0]
    if SPLIT:
        bias += centre_scores(middle, centre[2], DP, N) * (centre[0] * (1.0 / 2048.0))
    new = ()
    top = m
    decay = tl.full([8, N], 1.0, tl.float32)
    for c in tl.static_range(max(len(V), 1)):
        z = ()
        scale = (tl.full([16, 1], 1.0, tl.float32),) * 4
        if len(V) > 0:
            scale = ()
            for i in tl.static_range(4):
                scale = scale + (row_scale(values[c][1][i]),)
        for i in tl.static_range(4):
            z = z + (s[i] * unit + fast_log2(scale[i]),)
        peak = tl.max(max4(z), 0)[None, :]
        if c == 0:
            top = tl.maximum(m, peak + bias)
            decay = tl.exp2(m - top)
        beta = tl.exp2(peak + bias - top)
        p8 = ()
        total = tl.zeros([16, N], tl.float32)
        for i in tl.static_range(4):
            p = tl.exp2(z[i] - (peak - (LOG2_255 if SHIFTED else LOG2_127)))
            if c == 0:
                total += p * fast_reciprocal(scale[i])
            p8 = p8 + (to_int8(p + nudge),)
        if c == 0:
            l = l * decay + tl.sum(total.reshape([2, 8, N]), 0) * beta
        if len(V) > 0:
            acc = value_blocks(values[c][0], p8, V[c][2], N, SHIFTED)
            for i in tl.static_range(len(acc)):
                # (acc + MAGIC) beta - MAGIC beta: rounding costs one unit of acc, far below that of the weights.
                kept = o[len(new)].reshape([4, 8, N]) * decay[None] - (beta * MAGIC)[None]
                added = acc[i].to(tl.float32, bitcast=True).reshape([4, 8, N]) * beta[None] + kept
                new = new + (added.reshape([32, N]),)
    return new, top, l


# Sizes that differ from call to call must not compile a kernel each.
SIZES = ["batch", "max_items", "max_pages", "num_blocks"]


@triton.jit(do_not_specialize=SIZES)
def decode_kernel(
    Codes, Units, Centre, Pool, PageTable, NumPages, PartO, PartM, PartL, batch, max_items, max_pages,
    num_blocks,
    K: tl.constexpr, V: tl.constexpr, CENTRE: tl.constexpr, PAGE_BYTES: tl.constexpr, D: tl.constexpr,
    DP: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr, N: tl.constexpr, COLUMNS: tl.constexpr,
    SPLIT: tl.constexpr, STEP: tl.constexpr, BATCH_BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One split of one sequence and kv head: a partial output over its pages.

    Grid (max_items, HEADS). Weights have 8 bits in a signed operand of 8: where the query rows leave half the columns
    free, these repeat them, and the weights of the two halves are nudged by a quarter step in opposite directions
    before they are rounded, so that their sum has 8 bits; else they are shifted by 128.
    """
    item = tl.program_id(0)
    head = tl.program_id(1)
    b, split, count, pages = find_split(item, NumPages, batch, max_items, STEP, BATCH_BLOCK)
    if b >= batch:
        return
    n = tl.arange(0, N)
    own = n < ROWS

    first, stop = split_range(split, count, pages)
    table = PageTable + b.to(tl.int64) * max_pages
    ahead = tl.load(table + first, mask=first < stop, other=0)
    if PDL:
        tl.extra.cuda.gdc_wait()

    query = b * HEADS + head
    k = tl.arange(0, 32)[:, None] + n[None, :] * 32
    units = Units + query * ((len(K) + 1) * N) + n
    q8 = ()
    ratio = ()
    unit = tl.full([N], 1.0, tl.float32)
    for c in tl.static_range(len(K)):
        steps = ()
        for s in tl.static_range((K[c][1] + 31) // 32):
            codes = Codes + (query * count_steps(K, len(K)) + count_steps(K, c) + s).to(tl.int64) * (32 * N)
            steps = steps + (tl.load(codes + k),)
        q8 = q8 + (steps,)
        worth = tl.load(units + c * N)
        if c == 0:
            unit = tl.where(worth > 0, worth, 1.0)
        ratio = ratio + (worth / unit,)
    centre = Centre + query.to(tl.int64) * (DP * N * (1 + SPLIT))
    terms = (tl.load(units + len(K) * N)[None, :], load_centre_query(centre, DP, N))
    if SPLIT:
        terms = terms + (load_centre_query(centre + DP * N, DP, N),)
    SHIFTED: tl.constexpr = COLUMNS == N
    LARGEST: tl.constexpr = 255 if SHIFTED else 127
    nudge = -128.0
    if not SHIFTED:
        nudge = tl.where(n < COLUMNS, -0.25, 0.25)[None, :]

    o = ()
    for _ in tl.static_range(count_blocks(V, len(V))):
        o = o + (tl.zeros([32, N], tl.float32),)
    m = tl.full([8, N], NEVER, tl.float32)
    l = tl.zeros([8, N], tl.float32)
    pool = Pool + head * PAGE_BYTES
    page = pool + tl.minimum(tl.maximum(ahead, 0), num_blocks - 1).to(tl.int64) * (HEADS * PAGE_BYTES)
    ahead = tl.load(table + tl.minimum(first + 1, stop - 1), mask=first < stop, other=0)
    for at in tl.range(first, stop, num_stages=1):
        following = pool + tl.minimum(tl.maximum(ahead, 0), num_blocks - 1).to(tl.int64) * (HEADS * PAGE_BYTES)
        ahead = tl.load(table + tl.minimum(at + 2, stop - 1))
        prefetch(following, PAGE_BYTES)
        o, m, l = page_step(
            page, (o, m, l), q8, unit[None, :], ratio, terms, nudge, K, V, CENTRE, D, DP, N, SPLIT, SHIFTED
        )
        page = following

    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    at = (item * HEADS + head).to(tl.int64) * ROWS
    tl.store(PartM + at + n, tl.max(m, 0), mask=own)
    # Each of the 8 rows of l holds its own tokens' part of the denominator.
    tl.store(PartL + at + n, tl.sum(l, 0) * (1.0 / LARGEST), mask=own)
    column = tl.arange(0, COLUMNS)
    r = tl.arange(0, 32)
    for c in tl.static_range(len(V)):
        for i in tl.static_range((V[c][1] + 31) // 32):
            channel = V[c][0] + 32 * i + 4 * (r % 8) + r // 8
            inside = channel < V[c][0] + V[c][1]
            part = o[count_blocks(V, c) + i].reshape([32, N // COLUMNS, COLUMNS])
            part = tl.sum(part, 1) * (1.0 / (LARGEST * (N // COLUMNS)))
            place = PartO + (at + column)[None, :] * D + channel[:, None]
            tl.store(place, part, mask=inside[:, None] & (column < ROWS)[None, :])


@dataclass(frozen=True)
class DecodeConfig:
    """What does not change the result beyond rounding: programs per processor, register cap."""

    programs: int = 12  # per multiprocessor: the grid is one wave of these
    max_registers: int | None = 168
    warp: bool = True
    ahead: bool = False
    l2: bool = True
    step: int = 4
    merged: int = 64
    merge_warps: int = 4


@dataclass(frozen=True)
class Plan:
    """Sizes of one call."""

    batch: int
    heads: int
    rows: int  # query rows per kv head
    max_items: int  # splits of all sequences together
    tiles: int  # of exact tokens, a power of two
    shape: dict[str, Any]  # constants that all three kernels share or ignore

    @classmethod
    def of(cls, q: Tensor, view: LayerView, codec: RowsCodec, config: DecodeConfig) -> "Plan":
        """Lay a checked call out."""
        batch, heads, dim = q.shape[0], view.pool.shape[1], codec.head_dim
        rows = q.shape[1] // heads * q.shape[2]
        columns = 8 if rows <= 8 else 16
        shape = {
            "K": classes(codec.layout.k_classes), "D": dim, "DP": triton.next_power_of_2(dim), "ROWS": rows,
            "HEADS": heads, "N": columns, "COLUMNS": columns // 2 if 2 * rows <= columns else columns,
            "SPLIT": q.dtype == torch.float32, "PDL": has_dependent_launch(q.device),
        }  # fmt: skip
        max_items = max(batch, config.programs * num_processors(q.device) // heads)
        tiles = triton.next_power_of_2(max(triton.cdiv(view.exact_k.shape[2], EXACT_TILE), 1))
        return cls(batch, heads, rows, max_items, tiles, shape)

    def query_buffers(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Codes, units and the centre's operand; see prepare_kernel."""
        k, columns, lead = self.shape["K"], self.shape["N"], (self.batch, self.heads)
        terms = 1 + self.shape["SPLIT"]
        return (
            torch.empty(*lead, count_steps(k, len(k)), columns, 32, dtype=torch.int8, device=device),
            torch.empty(*lead, len(k) + 1, columns, dtype=torch.float32, device=device),
            torch.empty(*lead, terms, 2, columns, self.shape["DP"] // 2, dtype=torch.float16, device=device),
        )

    def partials(self, device: torch.device, *lead: int) -> tuple[Tensor, Tensor, Tensor]:
        """Partial outputs ``[*lead, rows, D]``, maxima and denominators ``[*lead, rows]``."""
        dim, rows = self.shape["D"], self.rows
        return (
            torch.empty(*lead, rows, dim, dtype=torch.float32, device=device),
            torch.empty(*lead, rows, dtype=torch.float32, device=device),
            torch.empty(*lead, rows, dtype=torch.float32, device=device),
        )


def attend_rows(
    q: Tensor, view: LayerView, codec: RowsCodec, softmax_scale: float, config: DecodeConfig | None = None
) -> tuple[Tensor, Tensor]:
    """Decode attention on rows pages; see homkv.attention.triton.attend."""
    check_attend(q, view, codec, softmax_scale)
    q = q if q.stride(-1) == 1 else q.contiguous()
    config = config or DecodeConfig()
    plan, layout, device = Plan.of(q, view, codec, config), codec.layout, q.device
    shape, tile_shape = plan.shape, {"EXACT_TILE": EXACT_TILE, "EXACT_TILES": plan.tiles}
    query = plan.query_buffers(device)
    partial = plan.partials(device, plan.max_items, plan.heads)
    exact = plan.partials(device, plan.batch, plan.heads, plan.tiles)
    o = torch.empty(q.shape, dtype=torch.float32, device=device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=device)
    exact_tokens, pdl = view.exact_k.shape[2], shape["PDL"]
    warp = config.warp and shape["N"] == 8
    order, strides, scale_log2 = order_on_device(codec.order, device), q.stride()[:3], softmax_scale * LOG2E.value
    prepare_kernel[(plan.batch, plan.heads, (0 if warp else len(shape["K"]) + 1) + plan.tiles)](
        q, order, *query, view.exact_k, view.exact_v, view.exact_len, view.slots, *exact,
        exact_tokens, view.exact_k.shape[0], *strides, scale_log2, **shape, **tile_shape, QUERIES=not warp,
        Q_LEN=q.shape[2], num_warps=PREPARE_WARPS, launch_pdl=pdl,
    )  # fmt: skip
    kernel, operands, extra = decode_kernel, query, {}
    if warp:
        from homkv.attention.triton.decode_warp import warp_kernel

        kernel, operands = warp_kernel, (q, order, *strides, scale_log2)
        extra = {"AHEAD": config.ahead, "L2": config.l2, "Q_LEN": q.shape[2]}
    splits = {"STEP": config.step, "BATCH_BLOCK": max(triton.next_power_of_2(plan.batch), 32)}
    kernel[(plan.max_items, plan.heads)](
        *operands, view.pool.view(torch.int8), view.page_table, view.num_pages, *partial, plan.batch,
        plan.max_items, view.page_table.shape[1], view.pool.shape[0], **shape, **splits, V=classes(layout.v_classes),
        CENTRE=layout.centre_offset, PAGE_BYTES=layout.page_bytes, num_warps=1, num_stages=1,
        maxnreg=config.max_registers, launch_pdl=pdl, **extra,
    )  # fmt: skip
    channels = runs(layout)
    combine_kernel[(plan.batch * plan.heads * plan.rows, len(channels))](
        o, lse, *partial, view.num_pages, plan.batch, plan.max_items, *exact, view.exact_len, exact_tokens,
        V=channels, D=codec.head_dim, ROWS=plan.rows, HEADS=plan.heads, **tile_shape, **splits, SPLITS=config.merged,
        PDL=pdl, num_warps=config.merge_warps, launch_pdl=pdl,
    )  # fmt: skip
    return o, lse


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
