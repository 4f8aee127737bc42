"""Decode attention that dequantizes our pages: the same bytes, page table, sinks and window, products in float16.

This is the honest rival of multiplying on int8 codes. Codes become float16 in registers, two per instruction (see
dequant_tiles.py). What is left of dequantizing moves out of the products: scales and powers of two go to scores and
weights, the half step to one term per query. Queries and softmax weights stay float16, so the result is nearer to exact
attention than with int8. Everything else (splits, loads, centre, exact tokens, merge) is what homkv's own kernel does.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from homkv.attention.triton.checks import check_attend
from homkv.attention.triton.combine import combine_kernel
from homkv.attention.triton.decode import (
    EXACT_TILE,
    classes,
    merging,
    order_on_device,
    runs,
)
from homkv.attention.triton.exact_tile import exact_tile, query_rows
from homkv.attention.triton.lanes import LOG2E, NEVER, fast_log2, fast_reciprocal, hadamard, prefetch
from homkv.attention.triton.runtime import has_dependent_launch, num_processors
from homkv.attention.triton.schedule import count_pages, count_tiles, find_split, of_sequence, split_range
from homkv.attention.triton.warp_page import count_blocks
from homkv.attention.view import LayerView
from homkv.bench.peers.dequant_centre import (
    centre_scores,
    count_steps,
    load_centre,
    load_centre_query,
    max4,
    store_centre,
)
from homkv.bench.peers.dequant_tiles import (
    UNIT,
    half_step,
    load_page_keys,
    load_page_values,
    page_scores,
    plane_exponent,
    row_scale,
    value_block,
    weight_tile,
)
from homkv.bench.peers.split import SIXTEEN_BITS
from homkv.errors import DTypeError, UnsupportedError
from homkv.formats.rows import RowsCodec

MARGIN = tl.constexpr(14.0)  # log2 of the largest float16 weight: tokens far below it keep their precision

MIN_PAGES = 4  # of a split
PREPARE_WARPS = 2


@triton.jit
def page_step(
    page, state, q16, offsets, unit, centre,
    K: tl.constexpr, V: tl.constexpr, CENTRE: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Add one page to ``state = (o, sums, m, total)``: sums of codes ``[32, N]`` each, sums of weights ``[8, N]``.

    A value's scale and its plane's power of two join the score as a logarithm, ``z = score + log2(v_scale) + plane``;
    ``w = exp2(z - max z + MARGIN)`` is the float16 weight of a code. m and total ``[8, N]``: maximum and denominator.
    """
    o, sums, m, total = state
    # All loads first: nothing else hides their latency but other warps.
    keys = load_page_keys(page, K)
    middle = load_centre(page, CENTRE, D, DP)
    values = load_page_values(page, V)
    s = page_scores(keys, q16, offsets, K, N)
    bias = centre_scores(middle, centre, DP, N) * unit
    z = ()
    largest = tl.full([16, N], NEVER, tl.float32)
    for c in tl.static_range(len(V)):
        tiles = ()
        for i in tl.static_range(4):
            tiles += (s[i] * unit + fast_log2(row_scale(values[c][1][i], plane_exponent(i, V[c][2]))),)
        largest = tl.maximum(largest, max4(tiles))
        z += (tiles,)
    top = tl.maximum(m, tl.max(largest, 0)[None, :] + bias)
    decay = tl.exp2(m - top)
    new = ()
    new_sums = ()
    for c in tl.static_range(len(V)):
        w = ()
        part = tl.zeros([16, N], tl.float32)
        added = tl.zeros([16, N], tl.float32)
        for i in tl.static_range(4):
            p = tl.exp2((z[c][i].reshape([2, 8, N]) - (top - bias - MARGIN)[None]).reshape([16, N]))
            if c == 0:
                part += p * fast_reciprocal(row_scale(values[c][1][i], plane_exponent(i, V[c][2])))
            added += p * 2.0 ** -plane_exponent(i, V[c][2])
            w += (p,)
        if c == 0:
            total = total * decay + tl.sum(part.reshape([2, 8, N]), 0)
        w0 = weight_tile(w[0], w[1], N)
        w1 = weight_tile(w[2], w[3], N)
        new_sums += (sums[c] * decay + tl.sum(added.reshape([2, 8, N]), 0),)
        for i in tl.static_range(len(values[c][0])):
            block = value_block(values[c][0][i], w0, w1, V[c][2], N).reshape([4, 8, N])
            new += ((o[count_blocks(V, c) + i].reshape([4, 8, N]) * decay[None] + block).reshape([32, N]),)
    return new, new_sums, top, total


@triton.jit
def store_queries(
    q_row, Order, live, inverse, operands, CLASSES: tl.constexpr, C: tl.constexpr, N: tl.constexpr
):  # fmt: skip
    """Rotate one class and store it as right operands ``[steps, 32, N]`` float16; returns the half step's product.

    Even channels come first, then odd ones. ``inverse [N]``: a power of two that brings the row near 1, for all classes
    alike.
    """
    WIDTH: tl.constexpr = CLASSES[C][1]
    PADDED: tl.constexpr = max(32, triton.next_power_of_2(WIDTH))
    c = tl.arange(0, PADDED)
    channel = tl.load(Order + CLASSES[C][0] + c, mask=c < WIDTH, other=0)
    q = tl.load(q_row[:, None] + channel[None, :], mask=live[:, None] & (c < WIDTH)[None, :], other=0.0)
    q = (hadamard(q.to(tl.float32), N, PADDED, WIDTH & -WIDTH) * inverse[:, None]).to(tl.float16)
    k = c // 32 * 32 + c % 2 * 16 + c % 32 // 2
    at = k[None, :] * N + tl.arange(0, N)[:, None]
    tl.store(operands + at, q, mask=(c < (WIDTH + 31) // 32 * 32)[None, :])
    return tl.sum(q.to(tl.float32), 1) * half_step(CLASSES[C][2])


@triton.jit
def row_exponent(q_row, live, D: tl.constexpr, DP: tl.constexpr):
    """Bits of the largest power of two up to the row's largest magnitude, ``[N]``, the same as store_centre's."""
    d = tl.arange(0, DP)
    q = tl.load(q_row[None, :] + d[:, None], mask=live[None, :] & (d < D)[:, None], other=0.0).to(tl.float32)
    return tl.maximum(tl.max(tl.abs(q), 0).to(tl.int32, bitcast=True) & 0x7F800000, 30 << 23)


@triton.jit(do_not_specialize=["exact_tokens", "num_slots", "stride_b", "stride_h"])
def dequant_prepare_kernel(
    Q, Order, Operands, Units, Centre, ExactK, ExactV, ExactLen, Slots, ExactO, ExactM, ExactSum, exact_tokens,
    num_slots, stride_b, stride_h, scale_log2,
    K: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr, N: tl.constexpr,
    EXACT_TILE: tl.constexpr, EXACT_TILES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (batch, HEADS, len(K) + 1 + EXACT_TILES): one class of the queries each, the centre, tiles of exact tokens.

    ``Operands [batch, HEADS, steps, 32, N] float16``; ``Units [batch, HEADS, len(K) + 1, N] float32``: the classes'
    half-step products, then what one unit is worth in the score, base 2; ``Centre [batch, HEADS, 2, DP / 2, N]
    float16``; ``ExactO [batch, HEADS, EXACT_TILES, ROWS, D]`` with maxima and denominators.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    b = tl.program_id(0)
    head = tl.program_id(1)
    part = tl.program_id(2)
    q_row, live = query_rows(Q, b, head, stride_b, stride_h, 0, ROWS, 1, N, N)
    at = b * HEADS + head
    n = tl.arange(0, N)
    if part <= len(K):
        value = tl.zeros([N], tl.float32)
        operands = Operands + at.to(tl.int64) * (count_steps(K, len(K)) * 32 * N)
        inverse = ((254 << 23) - row_exponent(q_row, live, D, DP)).to(tl.float32, bitcast=True)
        for c in tl.static_range(len(K)):
            if part == c:
                value = store_queries(q_row, Order, live, inverse, operands + count_steps(K, c) * 32 * N, K, c, N)
        if part == len(K):
            value = store_centre(q_row, Order, live, Centre + at.to(tl.int64) * (DP * N), D, DP, N, False) * scale_log2
        tl.store(Units + (at * (len(K) + 1) + part) * N + n, value)
    else:
        start = (part - len(K) - 1) * EXACT_TILE
        length = tl.minimum(tl.load(ExactLen + b), exact_tokens)
        if start < length:
            slot = tl.minimum(tl.maximum(tl.load(Slots + b), 0), num_slots - 1)
            exact = (slot * HEADS + head).to(tl.int64) * exact_tokens * D
            o, m, total = exact_tile(
                ExactK + exact, ExactV + exact, start, length, q_row, live, scale_log2, D, DP, N, EXACT_TILE
            )
            d = tl.arange(0, DP)
            own = n < ROWS
            row = (at * EXACT_TILES + part - len(K) - 1).to(tl.int64) * ROWS + n
            tl.store(ExactM + row, m, mask=own)
            tl.store(ExactSum + row, total, mask=own)
            tl.store(ExactO + row[None, :] * D + d[:, None], o, mask=own[None, :] & (d < D)[:, None])


SIZES = ["batch", "max_items", "max_pages", "num_blocks", "exact_tokens"]


@triton.jit(do_not_specialize=SIZES)
def dequant_kernel(
    Operands, Units, Centre, Pool, PageTable, NumPages, ExactLen, PartO, PartM, PartSum, batch, max_items, max_pages,
    num_blocks, exact_tokens,
    K: tl.constexpr, V: tl.constexpr, CENTRE: tl.constexpr, PAGE_BYTES: tl.constexpr, D: tl.constexpr,
    DP: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr, N: tl.constexpr, STEP: tl.constexpr,
    EXACT_TILE: tl.constexpr, BATCH_BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One split of one sequence and kv head: a partial output over its pages. Grid (max_items, HEADS)."""
    item = tl.program_id(0)
    head = tl.program_id(1)
    counts = count_pages(NumPages, batch, BATCH_BLOCK)
    tiles = count_tiles(ExactLen, exact_tokens, batch, EXACT_TILE, BATCH_BLOCK)  # counted by the merge, too
    b, split, count = find_split(item, tiles + counts, batch, max_items, STEP, BATCH_BLOCK)
    if b >= batch:
        return
    pages = of_sequence(counts, b, BATCH_BLOCK)
    n = tl.arange(0, N)
    own = n < ROWS
    first, stop = split_range(split, count, pages)
    table = PageTable + b.to(tl.int64) * max_pages
    ahead = tl.load(table + first, mask=first < stop, other=0)
    if PDL:
        tl.extra.cuda.gdc_wait()

    query = b * HEADS + head
    even = tl.arange(0, 16)[:, None] * N + n[None, :]
    units = Units + query * ((len(K) + 1) * N) + n
    q16 = ()
    offsets = ()
    for c in tl.static_range(len(K)):
        steps = ()
        for step in tl.static_range((K[c][1] + 31) // 32):
            at = (query * count_steps(K, len(K)) + count_steps(K, c) + step).to(tl.int64) * (32 * N)
            steps += ((tl.load(Operands + at + even), tl.load(Operands + at + 16 * N + even)),)
        q16 += (steps,)
        offsets += (tl.load(units + c * N)[None, :],)
    unit = tl.load(units + len(K) * N)[None, :]
    centre = load_centre_query(Centre + query.to(tl.int64) * (DP * N), DP, N)

    o = ()
    sums = ()
    for _ in tl.static_range(count_blocks(V, len(V))):
        o += (tl.zeros([32, N], tl.float32),)
    for _ in tl.static_range(len(V)):
        sums += (tl.zeros([8, N], tl.float32),)
    m = tl.full([8, N], NEVER, tl.float32)
    total = tl.zeros([8, N], tl.float32)
    pool = Pool + head * PAGE_BYTES
    page = pool + tl.minimum(tl.maximum(ahead, 0), num_blocks - 1).to(tl.int64) * (HEADS * PAGE_BYTES)
    ahead = tl.load(table + tl.minimum(first + 1, stop - 1), mask=first < stop, other=0)
    for at in tl.range(first, stop, num_stages=1):
        following = pool + tl.minimum(tl.maximum(ahead, 0), num_blocks - 1).to(tl.int64) * (HEADS * PAGE_BYTES)
        ahead = tl.load(table + tl.minimum(at + 2, stop - 1))
        prefetch(following, PAGE_BYTES)
        o, sums, m, total = page_step(page, (o, sums, m, total), q16, offsets, unit, centre, K, V, CENTRE, D, DP, N)
        page = following

    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    at = (item * HEADS + head).to(tl.int64) * ROWS
    tl.store(PartM + at + n, tl.max(m, 0), mask=own)
    # Each of the 8 rows of total and sums holds its own tokens' part.
    tl.store(PartSum + at + n, tl.sum(total, 0) * (2.0**-MARGIN), mask=own)
    r = tl.arange(0, 32)
    for c in tl.static_range(len(V)):
        shift = tl.sum(sums[c], 0)[None, :] * (half_step(V[c][2]) * 2.0**-MARGIN)
        for i in tl.static_range((V[c][1] + 31) // 32):
            channel = V[c][0] + 32 * i + 4 * (r % 8) + r // 8
            inside = (channel < V[c][0] + V[c][1])[:, None] & own[None, :]
            part = o[count_blocks(V, c) + i] * (UNIT * 2.0**-MARGIN) - shift
            tl.store(PartO + (at + n)[None, :] * D + channel[:, None], part, mask=inside)


@dataclass(frozen=True)
class DequantConfig:
    """What does not change the result beyond rounding: programs per processor, register cap."""

    programs: int = 12  # per multiprocessor: the grid is one wave of these
    max_registers: int | None = 168


def default_config(codec: RowsCodec, rows: int) -> DequantConfig:
    """Few programs with many registers where the values' classes or the query rows need them."""
    return DequantConfig() if len(codec.layout.v_classes) == 1 and rows <= 8 else DequantConfig(8, None)


def attend(
    q: Tensor, view: LayerView, codec: RowsCodec, softmax_scale: float, config: DequantConfig | None = None
) -> Tensor:
    """``softmax(softmax_scale q . k) v`` over every token of ``view``, keys and values dequantized to float16.

    ``q [B, H, 1, D]`` 16 bits, contiguous channels, H / G <= 16; the view as homkv.attention.triton.attend takes it.
    Returns ``[B, H, 1, D] float32``. Nothing is read back. Raises ShapeError, DTypeError, UnsupportedError.
    """
    check_attend(q, view, codec, softmax_scale)
    layout, device = codec.layout, q.device
    if q.dtype not in SIXTEEN_BITS or q.stride(-1) != 1:
        raise DTypeError(f"expected q in 16 bits with contiguous channels, found {q.dtype} {q.stride()}; cast it")
    if q.shape[2] != 1 or not layout.k_classes or not layout.v_classes:
        raise UnsupportedError(f"expected one token and stored keys and values, found {q.shape[2]}, {codec.name}")
    batch, heads, dim = q.shape[0], view.pool.shape[1], codec.head_dim
    rows, exact_tokens = q.shape[1] // heads, view.exact_k.shape[2]
    config = config or default_config(codec, rows)
    tiles = triton.next_power_of_2(max(triton.cdiv(exact_tokens, EXACT_TILE), 1))
    k_classes, pdl = classes(layout.k_classes), has_dependent_launch(device)
    shape: dict[str, Any] = {
        "K": k_classes, "D": dim, "DP": triton.next_power_of_2(dim), "ROWS": rows, "HEADS": heads,
        "N": 8 if rows <= 8 else 16,
    }  # fmt: skip
    splits = {"STEP": MIN_PAGES, "BATCH_BLOCK": max(triton.next_power_of_2(batch), 32)}
    work = make_workspace(shape, batch, tiles, max(batch, config.programs * num_processors(device) // heads), device)
    dequant_prepare_kernel[(batch, heads, len(k_classes) + 1 + tiles)](
        q, order_on_device(codec.order, device), *work.query, view.exact_k, view.exact_v, view.exact_len, view.slots,
        *work.exact, exact_tokens, view.exact_k.shape[0], *q.stride()[:2], softmax_scale * LOG2E.value, **shape,
        EXACT_TILE=EXACT_TILE, EXACT_TILES=tiles, PDL=pdl, num_warps=PREPARE_WARPS, launch_pdl=pdl,
    )  # fmt: skip
    dequant_kernel[(work.max_items, heads)](
        *work.query, view.pool.view(torch.int8), view.page_table, view.num_pages, view.exact_len, *work.partial, batch,
        work.max_items, view.page_table.shape[1], view.pool.shape[0], exact_tokens, **shape,
        V=classes(layout.v_classes), EXACT_TILE=EXACT_TILE, CENTRE=layout.centre_offset, PAGE_BYTES=layout.page_bytes,
        **splits, PDL=pdl, num_warps=1, num_stages=1, maxnreg=config.max_registers, launch_pdl=pdl,
    )  # fmt: skip
    o, channels = torch.empty(q.shape, device=device), runs(layout, whole_blocks=True)
    combine_kernel[(batch * heads * rows, len(channels))](
        o, torch.empty(q.shape[:3], device=device), *work.partial, view.num_pages, batch, work.max_items, *work.exact,
        view.exact_len, exact_tokens, V=channels, D=dim, ROWS=rows, HEADS=heads, EXACT_TILE=EXACT_TILE,
        EXACT_TILES=tiles, PAGES=1, ROTATE=True, **splits, **merging(work.max_items, batch, channels), PDL=pdl,
        launch_pdl=pdl,
    )  # fmt: skip
    return o


@dataclass(frozen=True)
class Workspace:
    """What the three kernels of a call hand on; shapes as the kernels state them."""

    query: tuple[Tensor, Tensor, Tensor]  # operands, units, centre
    exact: tuple[Tensor, Tensor, Tensor]  # output, maximum, denominator of tiles of exact tokens
    partial: tuple[Tensor, Tensor, Tensor]  # the same of splits
    max_items: int


def make_workspace(shape: dict[str, Any], batch: int, tiles: int, max_items: int, device: torch.device) -> Workspace:
    """Room that kernels fill; in a CUDA graph the graph owns it."""
    heads, rows, dim, columns, k_classes = (shape[name] for name in ("HEADS", "ROWS", "D", "N", "K"))

    def empty(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    def parts(*lead: int) -> tuple[Tensor, Tensor, Tensor]:
        return empty(*lead, rows, dim), empty(*lead, rows), empty(*lead, rows)

    steps = count_steps(k_classes, len(k_classes))
    operands = empty(batch, heads, steps, 32, columns, dtype=torch.float16)
    centre = empty(batch, heads, shape["DP"], columns, dtype=torch.float16)
    return Workspace(
        (operands, empty(batch, heads, len(k_classes) + 1, columns), centre),
        parts(batch, heads, tiles),
        parts(max_items, heads),
        max_items,
    )
