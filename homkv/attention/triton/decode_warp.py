"""Decode attention on rows pages for Hopper: two pages at a time through one set of columns."""

import triton
import triton.language as tl

from homkv.attention.triton.fragments import count_blocks
from homkv.attention.triton.lanes import MAGIC, MAGIC_BITS, NEVER, PLANE_2, PLANE_4, USE_PTX, fast_log2, fast_reciprocal
from homkv.attention.triton.schedule import find_split, split_range
from homkv.attention.triton.warp_queries import both_columns, centre_operands, class_codes
from homkv.attention.triton.warp import (
    across,
    lane_parts,
    load2,
    load4,
    load_short,
    max_over_rows,
    mma8,
    mma16,
    sum_over_rows,
    transpose_bytes,
)

LOG2_255 = tl.constexpr(7.994353436858858)
DEAD = tl.constexpr(4 * NEVER.value)  # bias of a page that is not there: below the maximum of no page


@triton.jit
def plane32(x, PLANE: tl.constexpr, BITS: tl.constexpr):
    """Four lane values of one plane of four packed bytes."""
    if BITS == 8:
        return x
    elif USE_PTX:
        asm: tl.constexpr = PLANE_2[PLANE] if BITS == 2 else PLANE_4[PLANE]
        return tl.inline_asm_elementwise(asm, "=r,r", [x], dtype=tl.int32, is_pure=True, pack=1)
    else:
        MASK: tl.constexpr = -0x3F3F3F40 if BITS == 2 else -0x0F0F0F10
        HALF: tl.constexpr = 0x20202020 if BITS == 2 else 0x08080808
        return ((x << (BITS * PLANE)) & MASK) | HALF


@triton.jit
def load_key_step(page, g, q, OFFSET: tl.constexpr, GROUPS: tl.constexpr, BITS: tl.constexpr):
    """32 channels of keys, registers in order (half, block, pair)."""
    out = ()
    for half in tl.static_range(2):
        if GROUPS >= 8:
            for block in tl.static_range(BITS // 2):
                out = out + load2(page + (q * (32 * BITS) + g * 8), OFFSET + half * 128 * BITS + 64 * block)
        else:
            address = page + (tl.minimum(half * 4 + q, GROUPS - 1) * (32 * BITS) + g * 8)
            for block in tl.static_range(BITS // 2):
                out = out + load2(address, OFFSET + 64 * block)
    return out


@triton.jit
def load_keys(page, g, q, K: tl.constexpr):
    """All keys of a page: per class a tuple of steps."""
    out = ()
    for c in tl.static_range(len(K)):
        steps = ()
        for s in tl.static_range((K[c][1] + 31) // 32):
            steps = steps + (load_key_step(page, g, q, K[c][3] + s * 256 * K[c][2], K[c][1] // 4 - s * 8, K[c][2]),)
        out = out + (steps,)
    return out


@triton.jit
def load_all_keys(pages, g, q, K: tl.constexpr):
    """Keys of all pages of a step."""
    out = ()
    for p in tl.static_range(len(pages)):
        out = out + (load_keys(pages[p], g, q, K),)
    return out


@triton.jit
def key_step(x, b, acc, BITS: tl.constexpr):
    """Add the products of 32 channels to four tiles."""
    out = ()
    for i in tl.static_range(4):
        a = ()
        for r in tl.static_range(4):
            a = a + (plane32(x[r // 2 * BITS + 2 * (i % (BITS // 2)) + r % 2], i // (BITS // 2), BITS),)
        out = out + (mma8(a, b[0], b[1], acc[i], False),)
    return out


@triton.jit
def load_pair_scales(own, g, OFFSET: tl.constexpr):
    """Scale bytes of the lane's rows: one register of two tokens per tile."""
    out = ()
    for m in tl.static_range(4):
        out = out + (load_short(own + g * 2, OFFSET + 16 * m),)
    return out


@triton.jit
def two_scales(x):
    """Two E5M3 bytes to float32."""
    low = ((x & 255) * (1 << 20) + (103 << 23)).to(tl.float32, bitcast=True)
    high = ((x >> 8) * (1 << 20) + (103 << 23)).to(tl.float32, bitcast=True)
    return low, high


@triton.jit
def scores(keys, scales, q8, unit, ratio, K: tl.constexpr, PAGES: tl.constexpr):
    """Scores in units of the first class: four tiles of (row g: columns 2 q and 2 q + 1; row g + 8: the same)."""
    out = ()
    zero = tl.zeros([32], tl.int32)
    magic = zero + MAGIC_BITS
    for c in tl.static_range(len(K)):
        acc = ((magic, magic, magic, magic),) * 4
        for p in tl.static_range(PAGES):
            for s in tl.static_range(len(keys[p][c])):
                acc = key_step(keys[p][c][s], q8[p][c][s], acc, K[c][2])
        new = ()
        for m in tl.static_range(4):
            scale = two_scales(scales[c][m])
            tile = ()
            for r in tl.static_range(4):
                y = acc[m][r].to(tl.float32, bitcast=True) * scale[r // 2] - scale[r // 2] * MAGIC
                if c > 0:
                    y = y * ratio[c][r % 2] + out[m][r]
                tile = tile + (y,)
            new = new + (tile,)
        out = new
    return out


@triton.jit
def load_centres(page, q, OFFSET: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """The centre, a run of DP / 4 channels per q."""
    out = ()
    for i in tl.static_range(DP // 32):
        if D == DP:
            out = out + load4(page + q * (DP // 2), OFFSET + 16 * i)
        else:
            out = out + load4(page + 2 * tl.minimum(q * (DP // 4) + 8 * i, D - 8), OFFSET)
    return out


@triton.jit
def centre_products(centres, queries, DP: tl.constexpr, PAGES: tl.constexpr):
    """``centre . q``: rows g of the first page, rows g + 8 of the last."""
    zero = tl.zeros([32], tl.float32)
    acc = (zero, zero, zero, zero)
    first = centres[0]
    last = centres[PAGES - 1]
    for i in tl.static_range(DP // 16):
        a = (first[2 * i], last[2 * i], first[2 * i + 1], last[2 * i + 1])
        acc = mma16(a, queries[2 * i], queries[2 * i + 1], acc)
    return acc


@triton.jit
def load_value_block(page, g, q, OFFSET: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr, BITS: tl.constexpr):
    """32 channels of values, registers in order (block, channel)."""
    out = ()
    address = page + (q * (4 * WIDTH) + tl.minimum(g, GROUPS - 1) * 16)
    for block in tl.static_range(BITS // 2):
        out = out + load4(address, OFFSET + block * 16 * WIDTH)
    return out


@triton.jit
def load_values(page, g, q, V: tl.constexpr):
    """All values of a page: per class a tuple of blocks of 32 channels."""
    out = ()
    for c in tl.static_range(len(V)):
        blocks = ()
        for i in tl.static_range((V[c][1] + 31) // 32):
            blocks = blocks + (load_value_block(page, g, q, V[c][3] + i * 128, V[c][1], V[c][1] // 4 - i * 8, V[c][2]),)
        out = out + (blocks,)
    return out


@triton.jit
def value_step(x, w, acc, U: tl.constexpr, BITS: tl.constexpr):
    """Add 64 tokens' weighted values of channels ``4 g + U`` and ``4 g + U + 1`` of a block."""
    for k in tl.static_range(2):
        a = ()
        for half in tl.static_range(2):
            for u in tl.static_range(2):
                a = a + (plane32(x[4 * ((2 * k + half) % (BITS // 2)) + U + u], (2 * k + half) // (BITS // 2), BITS),)
        acc = mma8(a, w[2 * k], w[2 * k + 1], acc, True)
    return acc


@triton.jit
def page_step(
    keys, values, scales, centres, alive, state, q8, unit, ratio, centre, own_first, masks,
    K: tl.constexpr, V: tl.constexpr, DP: tl.constexpr, PAGES: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Add PAGES pages to ``state = (o, m, l)``."""
    o, m, l = state
    s = scores(keys, scales, q8, unit, ratio, K, PAGES)
    product = centre_products(centres, centre[2], DP, PAGES)
    bias = ()
    if SPLIT:
        low = centre_products(centres, centre[3], DP, PAGES)
    for e in tl.static_range(2):
        x = tl.where(own_first, product[e], product[2 + e]) * centre[e]
        if SPLIT:
            x += tl.where(own_first, low[e], low[2 + e]) * (centre[e] * (1.0 / 2048.0))
        bias = bias + (tl.where(alive, x, DEAD),)
    new = ()
    magic = tl.zeros([32], tl.int32) + MAGIC_BITS
    top = m
    decay = m
    for c in tl.static_range(max(len(V), 1)):
        z = ()
        inverse = ()
        for i in tl.static_range(4):
            tile = ()
            if len(V) > 0:
                scale = two_scales(scales[len(K) + c][i])
                logs = (fast_log2(scale[0]), fast_log2(scale[1]))
                inverse = inverse + (fast_reciprocal(scale[0]), fast_reciprocal(scale[1]))
                for r in tl.static_range(4):
                    tile = tile + (s[i][r] * unit[r % 2] + logs[r // 2],)
            else:
                for r in tl.static_range(4):
                    tile = tile + (s[i][r] * unit[r % 2],)
            z = z + (tile,)
        peak = ()
        for e in tl.static_range(2):
            x = tl.maximum(z[0][e], z[0][2 + e])
            for i in tl.static_range(3):
                x = tl.maximum(x, tl.maximum(z[i + 1][e], z[i + 1][2 + e]))
            peak = peak + (max_over_rows(x),)
        if c == 0:
            top = (tl.maximum(m[0], peak[0] + bias[0]), tl.maximum(m[1], peak[1] + bias[1]))
            decay = (tl.exp2(m[0] - top[0]), tl.exp2(m[1] - top[1]))
        beta = (tl.exp2(peak[0] + bias[0] - top[0]), tl.exp2(peak[1] + bias[1] - top[1]))
        low = (peak[0] - LOG2_255, peak[1] - LOG2_255)
        w = ()
        total = (tl.zeros([32], tl.float32), tl.zeros([32], tl.float32))
        for i in tl.static_range(4):
            code = ()
            p = ()
            for r in tl.static_range(4):
                x = tl.exp2(z[i][r] - low[r % 2])
                p = p + (x,)
                code = code + ((x + MAGIC).to(tl.int32, bitcast=True),)
            if c == 0:
                if len(V) > 0:
                    total = (
                        total[0] + p[0] * inverse[2 * i] + p[2] * inverse[2 * i + 1],
                        total[1] + p[1] * inverse[2 * i] + p[3] * inverse[2 * i + 1],
                    )
                else:
                    total = (total[0] + p[0] + p[2], total[1] + p[1] + p[3])
            w = w + (transpose_bytes(code),)
        if c == 0:
            l = (l[0] * decay[0] + total[0] * beta[0], l[1] * decay[1] + total[1] * beta[1])
        if len(V) > 0:
            weights = (w,)
            if PAGES == 2:
                weights = (
                    (w[0] & masks[0], w[1] & masks[0], w[2] & masks[0], w[3] & masks[0]),
                    (w[0] & masks[1], w[1] & masks[1], w[2] & masks[1], w[3] & masks[1]),
                )
            shift = (beta[0] * MAGIC, beta[1] * MAGIC)
            for i in tl.static_range((V[c][1] + 31) // 32):
                block = ()
                for t in tl.static_range(2):
                    acc = (magic, magic, magic, magic)
                    for p in tl.static_range(PAGES):
                        acc = value_step(values[p][c][i], weights[p], acc, 2 * t, V[c][2])
                    for r in tl.static_range(4):
                        kept = o[len(new)][4 * t + r] * decay[r % 2] - shift[r % 2]
                        block = block + (acc[r].to(tl.float32, bitcast=True) * beta[r % 2] + kept,)
                new = new + (block,)
    return new, top, l


@triton.jit
def mask_codes(q8, mask):
    """Right operands with columns of other pages zeroed."""
    out = ()
    for c in tl.static_range(len(q8)):
        steps = ()
        for s in tl.static_range(len(q8[c])):
            steps = steps + ((q8[c][s][0] & mask, q8[c][s][1] & mask),)
        out = out + (steps,)
    return out


@triton.jit
def page_address(pool, block, num_blocks, HEADS: tl.constexpr, PAGE_BYTES: tl.constexpr):
    return pool + tl.minimum(tl.maximum(block, 0), num_blocks - 1).to(tl.int64) * (HEADS * PAGE_BYTES)


@triton.jit
def load_rest(pages, own, g, q, K: tl.constexpr, V: tl.constexpr, CENTRE: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """Scales and centres."""
    scales = ()
    for c in tl.static_range(len(K)):
        scales = scales + (load_pair_scales(own, g, K[c][4]),)
    for c in tl.static_range(len(V)):
        scales = scales + (load_pair_scales(own, g, V[c][4]),)
    centres = ()
    for p in tl.static_range(len(pages)):
        centres = centres + (load_centres(pages[p], q, CENTRE, D, DP),)
    return scales, centres


SIZES = ["stride_b", "stride_h", "stride_t", "batch", "max_items", "max_pages", "num_blocks"]


@triton.jit(do_not_specialize=SIZES)
def warp_kernel(
    Q, Order, stride_b, stride_h, stride_t, scale_log2, Pool, PageTable, NumPages, PartO, PartM, PartL, batch,
    max_items, max_pages, num_blocks,
    K: tl.constexpr, V: tl.constexpr, CENTRE: tl.constexpr, PAGE_BYTES: tl.constexpr, D: tl.constexpr,
    DP: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr, N: tl.constexpr, COLUMNS: tl.constexpr,
    SPLIT: tl.constexpr, STEP: tl.constexpr, BATCH_BLOCK: tl.constexpr, PDL: tl.constexpr, Q_LEN: tl.constexpr, AHEAD: tl.constexpr,
    L2: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0)
    head = tl.program_id(1)
    b, split, count, pages = find_split(item, NumPages, batch, max_items, STEP, BATCH_BLOCK)
    if b >= batch:
        return
    PAGES: tl.constexpr = 2 if COLUMNS == 4 else 1
    g, q = lane_parts()
    own_first = q < (2 if PAGES == 2 else 4)
    first, stop = split_range(split, count, pages, PAGES)
    table = PageTable + b.to(tl.int64) * max_pages
    pool = (Pool + head * PAGE_BYTES).to(tl.int64, bitcast=True) + tl.zeros([32], tl.int64)

    last = tl.maximum(stop - 1, 0)
    now = (page_address(pool, tl.load(table + tl.minimum(first, last)), num_blocks, HEADS, PAGE_BYTES),)
    ahead = (tl.load(table + tl.minimum(first + PAGES, last)),)
    if PAGES == 2:
        now = now + (page_address(pool, tl.load(table + tl.minimum(first + 1, last)), num_blocks, HEADS, PAGE_BYTES),)
        ahead = ahead + (tl.load(table + tl.minimum(first + 3, last)),)
    # Before the queries are made ready, so that both take their time together.
    for p in tl.static_range(PAGES):
        prefetch_page(now[p], PAGE_BYTES)
    if AHEAD:
        keys = load_all_keys(now, g, q, K)
    n = g % 4 if PAGES == 2 else g
    q_row = Q + b.to(tl.int64) * stride_b + (head * (ROWS // Q_LEN) + n // Q_LEN) * stride_h + n % Q_LEN * stride_t
    order = Order.to(tl.int64, bitcast=True)
    masks = (tl.where(g < 4, -1, 0), tl.where(g < 4, 0, -1))
    one = tl.full([32], 1.0, tl.float32)
    unit = (one, one)
    ratio = ()
    q8 = ()
    for c in tl.static_range(len(K)):
        steps, worth = class_codes(q_row, order, n < ROWS, q, K[c][0], K[c][1], D)
        worth = both_columns(worth * scale_log2, q)
        if c == 0:
            unit = (tl.where(worth[0] > 0, worth[0], 1.0), tl.where(worth[1] > 0, worth[1], 1.0))
        ratio = ratio + ((worth[0] / unit[0], worth[1] / unit[1]),)
        q8 = q8 + (steps,)
    if PAGES == 2:
        q8 = (mask_codes(q8, masks[0]), mask_codes(q8, masks[1]))
    else:
        q8 = (q8,)
    operands, exponent = centre_operands(q_row, order, n < ROWS, q, D, DP, SPLIT)
    exponent = both_columns(exponent * scale_log2, q)
    terms = (exponent[0], exponent[1], operands[0], operands[1])

    zero = tl.zeros([32], tl.float32)
    o = ()
    for _ in tl.static_range(count_blocks(V, len(V))):
        o = o + ((zero, zero, zero, zero, zero, zero, zero, zero),)
    m = (zero + NEVER, zero + NEVER)
    l = (zero, zero)
    for at in tl.range(first, stop, PAGES, num_stages=1):
        following = ()
        for p in tl.static_range(PAGES):
            following = following + (page_address(pool, ahead[p], num_blocks, HEADS, PAGE_BYTES),)
        ahead = (tl.load(table + tl.minimum(at + 2 * PAGES, last)),)
        if PAGES == 2:
            ahead = ahead + (tl.load(table + tl.minimum(at + 5, last)),)
        own = now[0]
        alive = tl.full([32], True, tl.int1)
        if PAGES == 2:
            own = tl.where(own_first, now[0], now[1])
            alive = own_first | (at + 1 < stop)
        if AHEAD:
            current = keys
        else:
            current = load_all_keys(now, g, q, K)
        scales, centres = load_rest(now, own, g, q, K, V, CENTRE, D, DP)
        values = ()
        for p in tl.static_range(PAGES):
            values = values + (load_values(now[p], g, q, V),)
        if L2:
            for p in tl.static_range(PAGES):
                prefetch_page(following[p], PAGE_BYTES)
        o, m, l = page_step(
            current, values, scales, centres, alive, (o, m, l), q8, unit, ratio, terms, own_first, masks,
            K, V, DP, PAGES, SPLIT,
        )  # fmt: skip
        if AHEAD:
            keys = load_all_keys(following, g, q, K)
        now = following

    if PDL:
        tl.extra.cuda.gdc_wait()  # for the exact tokens, which the merge needs
        tl.extra.cuda.gdc_launch_dependents()
    finish(PartO, PartM, PartL, o, m, l, (item * HEADS + head).to(tl.int64) * ROWS, g, q, V, D, ROWS, PAGES)


@triton.jit
def finish(PartO, PartM, PartL, o, m, l, at, g, q, V: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, PAGES: tl.constexpr):
    """Store the partial output: with two pages, columns r and r + 4 belong to one query row."""
    top = m
    share = (tl.full([32], 1.0 / 255, tl.float32), tl.full([32], 1.0 / 255, tl.float32))
    total = (sum_over_rows(l[0]), sum_over_rows(l[1]))
    if PAGES == 2:
        top = (tl.maximum(m[0], across(m[0], 2)), tl.maximum(m[1], across(m[1], 2)))
        share = (tl.exp2(m[0] - top[0]) * (1.0 / 255), tl.exp2(m[1] - top[1]) * (1.0 / 255))
        total = (total[0] * share[0], total[1] * share[1])
        total = (total[0] + across(total[0], 2), total[1] + across(total[1], 2))
    else:
        total = (total[0] * share[0], total[1] * share[1])
    for e in tl.static_range(2):
        row = q * 2 + e
        own = row < ROWS
        tl.store(PartM + at + row, top[e], mask=own & (g == 0))
        tl.store(PartL + at + row, total[e], mask=own & (g == 0))
    for c in tl.static_range(len(V)):
        for i in tl.static_range((V[c][1] + 31) // 32):
            for r in tl.static_range(8):
                row = q * 2 + r % 2
                channel = 32 * i + 4 * g + r // 4 * 2 + r // 2 % 2
                x = o[count_blocks(V, c) + i][r] * share[r % 2]
                if PAGES == 2:
                    x = x + across(x, 2)
                tl.store(PartO + (at + row) * D + (V[c][0] + channel), x, mask=(row < ROWS) & (channel < V[c][1]))


@triton.jit
def prefetch_page(page, SIZE: tl.constexpr):
    """L2 prefetch of a page, a line per lane."""
    if USE_PTX:
        for i in tl.static_range((SIZE + 4095) // 4096):
            line = page + tl.minimum(tl.arange(0, 32) * 128 + i * 4096, SIZE - 1)
            tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [line], dtype=tl.int32, is_pure=False, pack=1)
