"""Attention of many query rows over pages in scratch: the int8 kernel, its epilogue and the merge of its splits."""

import math

import triton
import triton.language as tl

from homkv.attention.triton.lanes import MAGIC, NEVER, dot16
from homkv.attention.triton.schedule import split_range
from homkv.attention.triton.tiles import load_scale, load_tile, pack_weights, regroup, rescale, sum_codes

LOG2_255 = tl.constexpr(math.log2(255))


@triton.jit
def load_start(VStart, block, DP: tl.constexpr):
    """What the integer accumulator of a tile starts at, ``[DP]`` int32."""
    return tl.load(VStart + block.to(tl.int64) * DP + tl.arange(0, DP))


@triton.jit
def page_tile(
    q8, unit, state, K8, VT, KScale, VStart, VUnit, Bias, head, tile, tokens, rows_room,
    ROWS: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Add one tile of two pages to ``state = (o, M, r, l, v_last, start)``.

    ``score[row, t] = unit[row] k_scale[t] (q8 . code[t]) + bias[row, page]``, base 2. Weights have 8 bits relative to
    the tile's largest (see tiles.rescale for ``M`` and ``r``) and are stored less 128, which ``start`` makes up for.
    ``o`` is in units of the last tile's weights and values (``v_last``).
    """
    o, M, r, l, v_last, start = state
    n = tl.arange(0, BLOCK)
    tiles = tokens // BLOCK
    block = head * tiles + tile
    k = load_tile(K8, block * BLOCK, 0, DP, BLOCK, DP, TMA)
    k_scale = tl.load(KScale + block.to(tl.int64) * BLOCK + n)
    v_unit = load_scale(VUnit + block)
    bias0 = load_scale(Bias + tile * 2 * rows_room)
    bias1 = load_scale(Bias + (tile * 2 + 1) * rows_room)
    s = tl.dot(q8, k.T, out_dtype=tl.int32).to(tl.float32) * k_scale[None, :]
    # Which page a column belongs to is known when this is compiled: choosing between two of them costs nothing.
    in_first = (n < BLOCK // 2)[None, :]
    top0 = tl.max(tl.where(in_first, s, -float("inf")), 1) * unit + bias0
    top1 = tl.max(tl.where(in_first, -float("inf"), s), 1) * unit + bias1
    # A little more than the maximum, so that no rounding error lifts a weight above 255.
    peak0 = top0 + (tl.abs(top0) + tl.abs(bias0)) * (1.0 / (1 << 22))
    peak1 = top1 + (tl.abs(top1) + tl.abs(bias1)) * (1.0 / (1 << 22))
    M, new, decay = rescale(tl.maximum(peak0, peak1), M, r)
    shift = tl.where(in_first, (bias0 - (new - LOG2_255))[:, None], (bias1 - (new - LOG2_255))[:, None])
    p8 = regroup(pack_weights(tl.exp2(s * unit[:, None] + shift), True), ROWS, BLOCK)
    # The next tile's: on the path to this tile's product its latency would show.
    next_start = load_start(VStart, head * tiles + tl.minimum(tile + 1, tiles - 1), DP)
    vt = load_tile(VT, head * DP, tile * BLOCK, tokens, DP, BLOCK, TMA)
    acc = tl.dot(p8, vt.T, tl.broadcast_to(start[None, :], [ROWS, DP]), out_dtype=tl.int32)
    o = (o * (decay * (v_last / v_unit))[:, None] - MAGIC) + acc.to(tl.float32, bitcast=True)
    l = l * decay + (sum_codes(p8, BLOCK) + 128 * BLOCK).to(tl.float32)
    return o, M, new, l, v_unit, next_start


@triton.jit
def finish(
    o, l, r, v_unit, Back, BackScale, O, Old, OldLse, old_at, out_at, live, last,
    D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Rotate the pages' output back and merge it into the old partial; the ``last`` call writes the result.

    Rotating is a product with a matrix of signs, in two float16 terms relative to the row's largest: exact to float32.
    """
    CHUNK: tl.constexpr = 64
    d = tl.arange(0, DP)
    some = l > 0
    lse = tl.where(some, r + tl.log2(tl.where(some, l, 1.0)) - LOG2_255, NEVER)
    old_lse = tl.load(OldLse + old_at, mask=live, other=0.0)
    top = tl.maximum(lse, old_lse)
    share = tl.exp2(lse - top)
    old_share = tl.exp2(old_lse - top)
    total = share + old_share
    stored = tl.load(BackScale + d) > 0
    x = tl.where(some[:, None] & stored[None, :], o * (1.0 / tl.where(some, l, 1.0))[:, None], 0.0)
    exponent = tl.maximum(tl.max(tl.abs(x), 1).to(tl.int32, bitcast=True) & 0x7F800000, 30 << 23)
    x = x * ((254 << 23) - exponent).to(tl.float32, bitcast=True)[:, None]
    high = x.to(tl.float16)
    low = ((x - high.to(tl.float32)) * 2048.0).to(tl.float16)
    gain = share / total * v_unit * exponent.to(tl.float32, bitcast=True)
    for c in tl.static_range(DP // CHUNK):
        channel = c * CHUNK + tl.arange(0, CHUNK)
        back = tl.load(Back + d[:, None] * DP + channel[None, :])
        part = dot16(low, back, tl.zeros([ROWS, CHUNK], tl.float32)) * (1.0 / 2048.0)
        part = dot16(high, back, part) * tl.load(BackScale + channel)[None, :]
        inside = live[:, None] & (channel < D)[None, :]
        place = Old + old_at[:, None] * D + channel[None, :]
        old = tl.load(place, mask=inside, other=0.0)
        part = part * gain[:, None] + old * (old_share / total)[:, None]
        if last:
            tl.store(O + out_at[:, None] * D + channel[None, :], part.to(O.dtype.element_ty), mask=inside)
        else:
            tl.store(place, part, mask=inside)
    if not last:
        tl.store(OldLse + old_at, top + tl.log2(total), mask=live)


@triton.jit(do_not_specialize=["first", "rows", "first_row", "splits"])
def pages_kernel(
    Q8, QScale, K8, VT, KScale, VStart, VUnit, Bias, NumPages, Back, BackScale, O, Old, OldLse, PartO, PartM, PartL,
    first, rows, first_row, splits, tokens, rows_room, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, PAGE: tl.constexpr, SPLIT: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """ROWS query rows of one kv head over the pages in scratch, merged into ``Old``. Grid (row blocks * splits, G, B).

    Every row sees every page. With SPLIT a program takes its share of the tiles and leaves the merging to
    :func:`merge_kernel`: ``PartO [splits, B, G, rows_room, DP]``, ``PartM PartL [splits, B, G, rows_room]``.
    """
    g = tl.program_id(1)
    b = tl.program_id(2)
    split = tl.program_id(0) % splits
    pages = tl.load(NumPages + b) - first
    if first > 0 and pages <= 0:
        return
    head = b * tl.num_programs(1) + g
    r = tl.program_id(0) // splits * ROWS + tl.arange(0, ROWS)
    i = first_row + r
    row = head.to(tl.int64) * rows_room + r
    q8 = tl.load(Q8 + row[:, None] * DP + tl.arange(0, DP)[None, :])
    unit = tl.load(QScale + row)
    tiles = tl.minimum(tl.maximum((pages * PAGE + BLOCK - 1) // BLOCK, 0), tokens // BLOCK)
    tile, stop = split_range(split, splits, tiles)
    state = (
        tl.zeros([ROWS, DP], tl.float32), tl.full([ROWS], NEVER, tl.float32), tl.full([ROWS], NEVER, tl.float32),
        tl.zeros([ROWS], tl.float32), 1.0,
        load_start(VStart, head * (tokens // BLOCK) + tl.minimum(tile, tokens // BLOCK - 1), DP),
    )  # fmt: skip
    bias = Bias + head.to(tl.int64) * (tokens // PAGE) * rows_room + r
    for at in tl.range(tile, stop):
        state = page_tile(
            q8, unit, state, K8, VT, KScale, VStart, VUnit, bias, head, at, tokens, rows_room, ROWS, DP, BLOCK, TMA
        )
    o, _, m, l, v_unit, _ = state
    if SPLIT:
        d = tl.arange(0, DP)
        at = (split * tl.num_programs(2) * tl.num_programs(1) + head).to(tl.int64) * rows_room + r
        tl.store(PartO + at[:, None] * DP + d[None, :], o * v_unit)
        tl.store(PartM + at, m)
        tl.store(PartL + at, l)
    else:
        live = i < rows
        out_at = head.to(tl.int64) * rows + i
        finish(
            o, l, m, v_unit, Back, BackScale, O, Old, OldLse, row, out_at, live, pages <= tokens // PAGE, D, DP, ROWS
        )


@triton.jit(do_not_specialize=["first", "rows", "first_row", "splits"])
def merge_kernel(
    NumPages, Back, BackScale, O, Old, OldLse, PartO, PartM, PartL, first, rows, first_row, splits, tokens, rows_room,
    D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Merge the splits of :func:`pages_kernel` with one another and into ``Old``. Grid (row blocks, G, B)."""
    g = tl.program_id(1)
    b = tl.program_id(2)
    pages = tl.load(NumPages + b) - first
    if first > 0 and pages <= 0:
        return
    heads = tl.num_programs(1) * tl.num_programs(2)
    head = b * tl.num_programs(1) + g
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, DP)
    o = tl.zeros([ROWS, DP], tl.float32)
    top = tl.full([ROWS], NEVER, tl.float32)
    l = tl.zeros([ROWS], tl.float32)
    for split in range(splits):
        at = (split * heads + head).to(tl.int64) * rows_room + r
        m = tl.load(PartM + at)
        new = tl.maximum(top, m)
        share = tl.exp2(m - new)
        decay = tl.exp2(top - new)
        o = o * decay[:, None] + tl.load(PartO + at[:, None] * DP + d[None, :]) * share[:, None]
        l = l * decay + tl.load(PartL + at) * share
        top = new
    old_at = head.to(tl.int64) * rows_room + r
    out_at = head.to(tl.int64) * rows + first_row + r
    live = first_row + r < rows
    finish(o, l, top, 1.0, Back, BackScale, O, Old, OldLse, old_at, out_at, live, pages <= tokens // PAGE, D, DP, ROWS)
