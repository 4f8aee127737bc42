"""Partial outputs of a decode call: split-KV, one warp per program, two pages at a time for few query rows."""

import triton
import triton.language as tl

from homkv.attention.triton.exact_tile import prefetch_tile, store_tiles
from homkv.attention.triton.lanes import MAGIC, MAGIC_BITS, NEVER, fast_log2, fast_reciprocal, prefetch_bytes
from homkv.attention.triton.schedule import count_pages, count_tiles, find_split, of_sequence, split_range, tiles_before
from homkv.attention.triton.staging import await_copies, copy_page, page_buffer, room
from homkv.attention.triton.warp import (
    across,
    lane_parts,
    max_over_rows,
    store_number,
    sum_over_rows,
    transpose_bytes,
)
from homkv.attention.triton.warp_page import (
    centre_products,
    count_blocks,
    load_centre,
    load_keys,
    load_scales,
    load_values,
    page_scores,
    two_scales,
    value_step,
)
from homkv.attention.triton.warp_queries import gather_queries, load_order, prepare_queries

LOG2_255 = tl.constexpr(7.994353436858858)
DEAD = tl.constexpr(4 * NEVER.value)  # bias of a page that is not there: below the maximum of no page


@triton.jit
def page_bias(centres, query, alive, own, DP: tl.constexpr, PAGES: tl.constexpr, SPLIT: tl.constexpr):
    """The centres' terms of the lane's two columns, base 2. ``own``: whether the first page is the lane's."""
    _, _, _, unit, operands = query
    product = centre_products(centres, operands[0], DP, PAGES)
    out = ()
    for e in tl.static_range(2):
        x = tl.where(own, product[e], product[2 + e]) * unit[e]
        out = out + (x,)
    if SPLIT:
        product = centre_products(centres, operands[1], DP, PAGES)
        first = out[0] + tl.where(own, product[0], product[2]) * (unit[0] * (1.0 / 2048.0))
        second = out[1] + tl.where(own, product[1], product[3]) * (unit[1] * (1.0 / 2048.0))
        out = (first, second)
    return tl.where(alive, out[0], DEAD), tl.where(alive, out[1], DEAD)


@triton.jit
def column_maxima(z):
    """Maxima over 64 tokens of the lane's two columns, from four tiles."""
    out = ()
    for e in tl.static_range(2):
        x = tl.maximum(z[0][e], z[0][2 + e])
        for i in tl.static_range(3):
            x = tl.maximum(x, tl.maximum(z[i + 1][e], z[i + 1][2 + e]))
        out = out + (max_over_rows(x),)
    return out


@triton.jit
def add_scales(s, scales, unit):
    """``(z, inverse)``: scores in base 2 with the values' scales joined as logarithms, and one over these scales."""
    z = ()
    inverse = ()
    for i in tl.static_range(4):
        scale = two_scales(scales[i])
        logs = (fast_log2(scale[0]), fast_log2(scale[1]))
        inverse = inverse + ((fast_reciprocal(scale[0]), fast_reciprocal(scale[1])),)
        tile = ()
        for r in tl.static_range(4):
            tile = tile + (s[i][r] * unit[r % 2] + logs[r // 2],)
        z = z + (tile,)
    return z, inverse


@triton.jit
def weights(z, inverse, peak):
    """``(w, total)``: weights ``round(255 exp2(z - peak))`` as right operands, and per column the sum of unrounded ones
    over the values' scales, of the lane's own tokens."""
    w = ()
    first = tl.zeros([32], tl.float32)
    second = first
    for i in tl.static_range(4):
        p = ()
        code = ()
        for r in tl.static_range(4):
            p = p + (tl.exp2(z[i][r] - (peak[r % 2] - LOG2_255)),)
            code = code + ((p[r] + MAGIC).to(tl.int32, bitcast=True),)
        first = first + p[0] * inverse[i][0]
        first = first + p[2] * inverse[i][1]
        second = second + p[1] * inverse[i][0]
        second = second + p[3] * inverse[i][1]
        w = w + (transpose_bytes(code),)
    return w, (first, second)


@triton.jit
def add_block(values, w, o, decay, beta, BITS: tl.constexpr, CLASS: tl.constexpr, BLOCK: tl.constexpr):
    """``o decay + (values w) beta`` of 32 channels; every page has its own weights, zero in the others' columns."""
    magic = tl.full([32], MAGIC_BITS, tl.int32)
    out = ()
    for t in tl.static_range(2):
        acc = (magic, magic, magic, magic)
        for p in tl.static_range(len(values)):
            acc = value_step(values[p][CLASS][BLOCK], w[p], acc, 2 * t, BITS)
        for r in tl.static_range(4):
            # (acc + MAGIC) beta - MAGIC beta: rounding costs one unit of acc, far below that of the weights.
            kept = o[4 * t + r] * decay[r % 2] - beta[r % 2] * MAGIC
            out = out + (acc[r].to(tl.float32, bitcast=True) * beta[r % 2] + kept,)
    return out


@triton.jit
def page_step(
    data, state, query, alive, own, masks, K: tl.constexpr, V: tl.constexpr, DP: tl.constexpr, PAGES: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """Add PAGES pages to ``state = (o, m, l)``: eight outputs per block of 32 channels, two maxima and denominators.

    With two pages, columns 0 to 3 are the first one's and 4 to 7 the second one's: each multiplies its queries and
    weights with the others' columns zero into the same accumulators, so that everything between the matrix
    instructions is done once for both. A value's scale joins its score as a logarithm, ``z = score + log2(v_scale)``,
    so that one maximum per page serves as the softmax's and as the scale of its weights. Outputs and denominators are
    255 times too large, and each lane's denominator counts its own tokens only.
    """
    keys, values, scales, centres = data
    o, m, l = state
    s = page_scores(keys, scales, query, K)
    bias = page_bias(centres, query, alive, own, DP, PAGES, SPLIT)
    new = ()
    top = m
    decay = m
    for c in tl.static_range(max(len(V), 1)):
        z, inverse = add_scales(s, scales[len(K) + c], query[1])
        peak = column_maxima(z)
        if c == 0:
            top = (tl.maximum(m[0], peak[0] + bias[0]), tl.maximum(m[1], peak[1] + bias[1]))
            decay = (tl.exp2(m[0] - top[0]), tl.exp2(m[1] - top[1]))
        beta = (tl.exp2(peak[0] + bias[0] - top[0]), tl.exp2(peak[1] + bias[1] - top[1]))
        w, total = weights(z, inverse, peak)
        if c == 0:
            l = (l[0] * decay[0] + total[0] * beta[0], l[1] * decay[1] + total[1] * beta[1])
        if len(V) > 0:
            masked = ()
            for p in tl.static_range(PAGES):
                masked = masked + ((w[0] & masks[p], w[1] & masks[p], w[2] & masks[p], w[3] & masks[p]),)
            for i in tl.static_range((V[c][1] + 31) // 32):
                new = new + (add_block(values, masked, o[len(new)], decay, beta, V[c][2], c, i),)
    return new, top, l


@triton.jit
def load_pages(
    pages, own_page, g, q, K: tl.constexpr, V: tl.constexpr, CENTRE: tl.constexpr, D: tl.constexpr, DP: tl.constexpr
):  # fmt: skip
    """A step's pages in registers; ``own_page`` is the one whose columns the lane holds."""
    keys = ()
    values = ()
    centres = ()
    for p in tl.static_range(len(pages)):
        keys = keys + (load_keys(pages[p], g, q, K),)
        centres = centres + (load_centre(pages[p], q, CENTRE, D, DP),)
        values = values + (load_values(pages[p], g, q, V),)
    scales = ()
    for c in tl.static_range(len(K)):
        scales = scales + (load_scales(own_page, g, K[c][4]),)
    for c in tl.static_range(len(V)):
        scales = scales + (load_scales(own_page, g, V[c][4]),)
    if len(V) == 0:
        one = tl.full([32], 0xC0C0, tl.int32)
        scales = scales + ((one, one, one, one),)
    return keys, values, scales, centres


@triton.jit
def pages_in(pages, slot, PAGE_BYTES: tl.constexpr, STAGES: tl.constexpr):
    """Pages to read, from the buffer at ``slot`` if they are staged."""
    out = ()
    for p in tl.static_range(len(pages)):
        out = out + ((pages[p], slot + p * room(PAGE_BYTES)) if STAGES > 0 else (pages[p],),)
    return out


@triton.jit
def ask_for(pages, alive, PAGE_BYTES: tl.constexpr):
    """Start copying pages to their buffers, or to the L2 cache if they have none."""
    for p in tl.static_range(len(pages)):
        if len(pages[p]) == 2:
            copy_page(pages[p], alive, PAGE_BYTES)
        else:
            prefetch_bytes(pages[p][0], PAGE_BYTES, PAGE_BYTES)


@triton.jit
def choose(own, pages):
    """The page whose columns the lane holds."""
    if len(pages) == 1:
        return pages[0]
    else:
        out = ()
        for i in tl.static_range(len(pages[0])):
            out = out + (tl.where(own, pages[0][i], pages[1][i]),)
        return out


@triton.jit
def find_pages(pool, table, at, last, num_blocks, PAGES: tl.constexpr, STRIDE: tl.constexpr):
    """Addresses of PAGES pages from index ``at`` on; behind index ``last``, of that page."""
    out = ()
    for p in tl.static_range(PAGES):
        block = tl.load(table + tl.minimum(at + p, last))
        out = out + (pool + tl.minimum(tl.maximum(block, 0), num_blocks - 1).to(tl.int64) * STRIDE,)
    return out


@triton.jit
def empty_state(BLOCKS: tl.constexpr):
    """Outputs, maxima and denominators of no page."""
    zero = tl.zeros([32], tl.float32)
    o = ()
    for _ in tl.static_range(BLOCKS):
        o = o + ((zero, zero, zero, zero, zero, zero, zero, zero),)
    return o, (zero + NEVER, zero + NEVER), (zero, zero)


@triton.constexpr_function
def register_bit(level):
    """What the index of a register differs by between partners of a butterfly; see rotate_back."""
    return 2 << level if level < 2 else 8 << (level - 5)


@triton.constexpr_function
def block_of(width):
    """Channels that are rotated together."""
    return width & -width


@triton.jit
def rotate_back(x, g, BLOCK: tl.constexpr):
    """Hadamard transform, not normalized, of blocks of channels ``32 i + 4 g + 2 a + b``.

    Registers are in order (i, a, b, column).
    """
    for level in tl.static_range(BLOCK.bit_length() - 1):
        new = ()
        if level >= 2 and level < 5:
            sign = 1.0 - 2.0 * ((g >> (level - 2)) & 1).to(tl.float32)
            for i in tl.static_range(len(x)):
                new = new + (x[i] * sign + across(x[i], 1 << level),)
        else:
            for i in tl.static_range(len(x)):
                if i & register_bit(level):
                    new = new + (x[i - register_bit(level)] - x[i],)
                else:
                    new = new + (x[i] + x[i + register_bit(level)],)
        x = new
    return x


@triton.jit
def store_partial(
    PartO, PartM, PartL, state, at, row, g, ROWS: tl.constexpr, V: tl.constexpr, D: tl.constexpr, PAGES: tl.constexpr
):  # fmt: skip
    """Store a partial output; with two pages, columns r and r + 4 are one query row. ``row``: the lane's first one."""
    o, m, l = state
    top = m
    if PAGES == 2:
        top = (tl.maximum(m[0], across(m[0], 2)), tl.maximum(m[1], across(m[1], 2)))
    share = (tl.exp2(m[0] - top[0]) * (1.0 / 255), tl.exp2(m[1] - top[1]) * (1.0 / 255))
    for e in tl.static_range(2):
        total = sum_over_rows(l[e]) * share[e]
        if PAGES == 2:
            total += across(total, 2)
        own = (row + e < ROWS) & (g == 0)
        store_number(PartM + at + row + e, top[e], own)
        store_number(PartL + at + row + e, total, own)
    for c in tl.static_range(len(V)):
        x = ()
        for i in tl.static_range((V[c][1] + 31) // 32):
            for r in tl.static_range(8):
                y = o[count_blocks(V, c) + i][r] * (share[r % 2] * block_of(V[c][1]) ** -0.5)
                if PAGES == 2:
                    y += across(y, 2)
                x = x + (y,)
        x = rotate_back(x, g, block_of(V[c][1]))
        for i in tl.static_range(len(x)):
            channel = i // 8 * 32 + 4 * g + i // 4 % 2 * 2 + i // 2 % 2
            place = PartO + (at + row + i % 2) * D + (V[c][0] + channel)
            store_number(place, x[i], (row + i % 2 < ROWS) & (channel < V[c][1]))


# Sizes that differ from call to call must not compile a kernel each.
STRIDES = ["stride_b", "stride_h", "stride_t"]
SIZES = ["batch", "max_items", "max_pages", "num_blocks", "exact_tokens", "num_slots"]


@triton.jit(do_not_specialize=STRIDES + SIZES)
def decode_kernel(
    Q, Order, stride_b, stride_h, stride_t, scale_log2, Pool, PageTable, NumPages, PartO, PartM, PartL, ExactK, ExactV,
    ExactLen, Slots, ExactO, ExactM, ExactL, batch, max_items, max_pages, num_blocks, exact_tokens, num_slots,
    K: tl.constexpr, V: tl.constexpr, CENTRE: tl.constexpr, PAGE_BYTES: tl.constexpr, D: tl.constexpr,
    DP: tl.constexpr, ROWS: tl.constexpr, Q_LEN: tl.constexpr, HEADS: tl.constexpr, SPLIT: tl.constexpr,
    EXACT_TILE: tl.constexpr, EXACT_TILES: tl.constexpr, PAGES: tl.constexpr, STAGES: tl.constexpr, STEP: tl.constexpr,
    BATCH_BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One split of one sequence and kv head: partial outputs of its exact tiles and pages. Grid (max_items, HEADS).

    PAGES: a unit's, two for up to 4 query rows, else one; more than 8 rows are two sets of columns. STAGES: buffers in
    shared memory, to which a step's pages are copied during the step before; 0: they are asked into the L2 cache then.
    """
    item = tl.program_id(0)
    head = tl.program_id(1)
    g, q = lane_parts()
    channels = load_order(Order, q, K, D, DP)
    if PDL:
        tl.extra.cuda.gdc_wait()
    counts = count_pages(NumPages, batch, BATCH_BLOCK)
    all_tiles = count_tiles(ExactLen, exact_tokens, batch, EXACT_TILE, BATCH_BLOCK)
    units = all_tiles + tl.cdiv(counts, PAGES)
    b, split, count = find_split(item, units, batch, max_items, STEP, BATCH_BLOCK)
    if b >= batch:
        return
    SETS: tl.constexpr = (ROWS + 7) // 8
    STRIDE: tl.constexpr = HEADS * PAGE_BYTES
    own = (q < 2) | (PAGES == 1)
    every = tl.full([32], -1, tl.int32)
    masks = (every,)
    if PAGES == 2:
        masks = (tl.where(g < 4, -1, 0), tl.where(g < 4, 0, -1))

    tiles, row = of_sequence(all_tiles, b, BATCH_BLOCK), of_sequence(units, b, BATCH_BLOCK)
    first_unit, stop_unit = split_range(split, count, row)
    first_tile, stop_tile = tiles_before(first_unit, tiles, row), tiles_before(stop_unit, tiles, row)
    first = (first_unit - first_tile) * PAGES
    stop = tl.minimum((stop_unit - stop_tile) * PAGES, of_sequence(counts, b, BATCH_BLOCK))
    slot = tl.minimum(tl.maximum(tl.load(Slots + b), 0), num_slots - 1)
    if first_tile < stop_tile:  # ahead of the pages: behind the whole machine's first pages it would wait for them
        prefetch_tile(ExactK, slot, head, first_tile, exact_tokens, D, HEADS, EXACT_TILE)
        prefetch_tile(ExactV, slot, head, first_tile, exact_tokens, D, HEADS, EXACT_TILE)
    last = tl.minimum(tl.maximum(stop - 1, 0), max_pages - 1)
    table = PageTable + b.to(tl.int64) * max_pages
    pool = (Pool + head * PAGE_BYTES).to(tl.int64, bitcast=True) + tl.zeros([32], tl.int64)
    gathered = ()
    q_head = Q + b.to(tl.int64) * stride_b + head * (ROWS // Q_LEN) * stride_h
    for i in tl.static_range(SETS):
        n = i * 8 + (g % 4 if PAGES == 2 else g)
        row = tl.minimum(n, ROWS - 1)
        q_row = q_head + (row // Q_LEN * stride_h + row % Q_LEN * stride_t)
        gathered = gathered + (gather_queries(q_row, channels, n < ROWS, q, K, D, DP),)
    now = find_pages(pool, table, first, last, num_blocks, PAGES, STRIDE)
    following = find_pages(pool, table, first + PAGES, last, num_blocks, PAGES, STRIDE)
    # Pages are on their way while exact tokens are attended to and the queries are made ready.
    STAGE: tl.constexpr = PAGES * room(PAGE_BYTES)
    buffer = page_buffer(STAGES * STAGE)
    ask_for(pages_in(now, buffer, PAGE_BYTES, STAGES), first < stop, PAGE_BYTES)
    if first_tile < stop_tile:
        length = tl.minimum(tl.load(ExactLen + b), exact_tokens)
        store_tiles(
            Q, ExactK, ExactV, length, slot, ExactO, ExactM, ExactL, first_tile, stop_tile, b, head,
            stride_b, stride_h, stride_t, exact_tokens, scale_log2, D, DP, ROWS, Q_LEN, HEADS, EXACT_TILE, EXACT_TILES,
        )  # fmt: skip
    queries = ()
    states = ()
    for i in tl.static_range(SETS):
        queries = queries + (prepare_queries(gathered[i], masks, q, scale_log2, K, DP, PAGES, SPLIT),)
        states = states + (empty_state(count_blocks(V, len(V))),)

    for at in tl.range(first, stop, PAGES, num_stages=1):
        await_copies(STAGES)
        stage = buffer + (at - first) // PAGES % 2 * STAGE
        here = pages_in(now, stage, PAGE_BYTES, STAGES)
        ask_for(pages_in(following, 2 * buffer + STAGE - stage, PAGE_BYTES, STAGES), at + PAGES < stop, PAGE_BYTES)
        data = load_pages(here, choose(own, here), g, q, K, V, CENTRE, D, DP)
        later = find_pages(pool, table, at + 2 * PAGES, last, num_blocks, PAGES, STRIDE)
        alive = own | (at + 1 < stop)
        new = ()
        for i in tl.static_range(SETS):
            new = new + (page_step(data, states[i], queries[i], alive, own, masks, K, V, DP, PAGES, SPLIT),)
        states = new
        now = following
        following = later

    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    at = (item * HEADS + head).to(tl.int64) * ROWS
    for i in tl.static_range(SETS):
        store_partial(PartO, PartM, PartL, states[i], at, i * 8 + q * 2, g, ROWS, V, D, PAGES)
