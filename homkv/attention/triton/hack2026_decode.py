"""Decode attention on the pages of `hack-2026`: scales are folded into Q and P, which are rounded once per page."""

import triton
import triton.language as tl

from homkv.attention.triton.hack_common import as_tensor, find_pages, query_rows, store_partial
from homkv.attention.triton.hack_fragments import (
    OFFSET,
    chunk_width,
    code_operand,
    column_start,
    column_sums,
    is_shared,
    load_channels,
    load_keys,
    load_tokens,
    load_values,
    ones_operand,
    pack4,
    padded,
    pair_words,
    query_operand,
    slot_element,
    sum_type,
    weight_operand,
    weight_words,
)
from homkv.attention.triton.lanes import MAGIC, MAGIC_BITS, NEVER, prefetch
from homkv.attention.triton.schedule import count_pages, find_split, of_sequence, split_range


@triton.jit
def thread_channels(SIZE: tl.constexpr, BITS: tl.constexpr):
    """Channels of a partition whose codes thread q unpacks, ``[4, 1, 1, ., .]``, neighbours in memory last."""
    q = tl.arange(0, 4)[:, None, None, None, None]
    if is_shared(SIZE, BITS):
        byte = tl.arange(0, 4)[None, None, None, :, None]
        return slot_element(q, tl.arange(0, 2)[None, None, None, None, :], byte, SIZE, BITS)
    else:
        i = tl.arange(0, padded(SIZE) // 32)[None, None, None, :, None]
        return q * (padded(SIZE) // 4) + i * 8 + tl.arange(0, 8)[None, None, None, None, :]


@triton.jit
def load_folds(pages, q, START: tl.constexpr, SIZE: tl.constexpr, BITS: tl.constexpr):
    """K's numbers at byte START for the channels of ``q [4, 8, N / 8, ., .]``: every column's are its own page's."""
    own = tl.where(tl.arange(0, 8) < 4, pages[0], pages[len(pages) - 1])
    section = (own + START).to(tl.pointer_type(tl.float16), bitcast=True)[None, :, None, None, None]
    x = tl.load(section + thread_channels(SIZE, BITS))
    if padded(SIZE) > SIZE:
        x = tl.where(thread_channels(SIZE, BITS) < SIZE, x, 0.0)
    return x.to(tl.float32)


@triton.jit
def over_threads(x, KIND: tl.constexpr):
    """Minimum, maximum or sum per column of ``x [4, 8, N / 8, ., .]``: ``[8, N / 8]``."""
    if KIND == "min":
        return tl.min(tl.min(tl.min(x, 4), 3), 0)
    elif KIND == "max":
        return tl.max(tl.max(tl.max(x, 4), 3), 0)
    else:
        return tl.sum(tl.sum(tl.sum(x, 4), 3), 0)


@triton.jit
def columns_of(x, COPIES: tl.constexpr):
    """``[8, N / 8]`` to ``[N / (2 COPIES), COPIES, 2]``: column ``8 n + g`` of x [g, n]."""
    N: tl.constexpr = 8 * x.shape[1]
    return x.permute(1, 0).reshape([N // (2 * COPIES), COPIES, 2])


@triton.jit
def fold_query(q, scale, SIZE: tl.constexpr, BITS: tl.constexpr, PAIR: tl.constexpr):
    """Round ``f = q scale`` to 8 bits per column: ``f ~ step (code + 128) + low``. Returns right operand, step, low."""
    PLANES: tl.constexpr = 8 // BITS if not is_shared(SIZE, BITS) else 2
    f = q * scale
    if padded(SIZE) > SIZE:
        inside = thread_channels(SIZE, BITS) < SIZE
        low = over_threads(tl.where(inside, f, float("inf")), "min")
        high = over_threads(tl.where(inside, f, float("-inf")), "max")
    else:
        low = over_threads(f, "min")
        high = over_threads(f, "max")
    step = (high - low) * (1.0 / 255.0)
    inverse = tl.where(step > 0, 1.0 / step, 0.0)
    code = (f - low[None, :, :, None, None]) * inverse[None, :, :, None, None] + (MAGIC - OFFSET)
    if padded(SIZE) > SIZE:
        code = tl.where(inside, code, MAGIC)
    TILES: tl.constexpr = padded(SIZE) // 16
    NT: tl.constexpr = q.shape[2]
    code = code.reshape([4, 8, NT, TILES // PLANES, 2, 2, PLANES]).permute(0, 1, 2, 3, 6, 4, 5)
    even, odd = tl.split(code)
    a, c = tl.split(even)
    b, d = tl.split(odd)
    words = pack4(a, b, c, d).reshape([4, 8, NT, TILES])
    return query_operand(pair_words(words, PAIR), PAIR), step, low


@triton.jit
def token_scores(pages, keys, sums, q, PAGE: tl.constexpr, N: tl.constexpr, PAIR: tl.constexpr):
    """Scores of a page ``[T / 8, 8, ., COPIES, 2]``, base 2: ``sum_p [ step (f'.k') + low sum(k') ] + q . minimum``."""
    T: tl.constexpr = PAGE[0]
    SIZE: tl.constexpr = PAGE[1]
    BITS: tl.constexpr = PAGE[2]
    COPIES: tl.constexpr = 4 // PAIR
    rest = tl.zeros([8, N // 8], tl.float32)
    s = tl.zeros([T // 8, 8, N // (2 * COPIES), COPIES, 2], tl.float32)
    for p in tl.static_range(len(keys)):
        scale = load_folds(pages, q[p], PAGE[4][2] + 2 * p * SIZE, SIZE, BITS)
        rest += over_threads(q[p] * load_folds(pages, q[p], PAGE[4][3] + 2 * p * SIZE, SIZE, BITS), "sum")
        b, step, low = fold_query(q[p], scale, SIZE, BITS, PAIR)
        low += step * OFFSET
        step *= 1.0 / (1 << (8 - BITS))
        codes = code_operand(keys[p], SIZE, BITS, PAIR)
        start = column_start(column_sums(b, N, COPIES) * OFFSET, T, N)
        acc = tl.dot(codes, b, start, out_dtype=tl.int32).to(tl.float32, bitcast=True).reshape(s.shape)
        # MAGIC step is taken off with the rest: rounding costs half a step of a product, far below that of f.
        rest -= MAGIC * step
        s += acc * columns_of(step, COPIES)[None, None]
        if len(sums) > 0:
            total = sums[p].to(tl.float32)
        else:
            start = tl.full([T, N], SIZE * OFFSET + MAGIC_BITS, tl.int32)
            acc = tl.dot(codes, ones_operand(SIZE, BITS, PAIR, N), start, out_dtype=tl.int32)
            total = (acc.to(tl.float32, bitcast=True).reshape(s.shape) - MAGIC) * (1.0 / (1 << (8 - BITS)))
        s += total * columns_of(low, COPIES)[None, None]
    return s + columns_of(rest, COPIES)[None, None]


@triton.jit
def fold_weights(p, scale, T: tl.constexpr, N: tl.constexpr, PAIR: tl.constexpr):
    """Round ``g = p scale`` to 8 bits per column: ``g ~ step (code + 128) + low``. Returns right operand, step, low."""
    g = p * scale
    low = tl.min(tl.min(g, 0), 0)
    step = (tl.max(tl.max(g, 0), 0) - low) * (1.0 / 255.0)
    inverse = tl.where(step > 0, 1.0 / step, 0.0)
    code = (g - low[None, None]) * inverse[None, None] + (MAGIC - OFFSET)
    return weight_operand(weight_words(code, N), PAIR, N), step, low


@triton.jit
def add_values(
    o, values, p, v_scales, page, decay, share, PAGE: tl.constexpr, N: tl.constexpr, PAIR: tl.constexpr
):  # fmt: skip
    """Add a page's codes to the output: ``o decay + share [ step (g'.v') + low sum(v') ]``, g: of the partition."""
    T: tl.constexpr = PAGE[0]
    BITS: tl.constexpr = PAGE[2]
    CHUNK: tl.constexpr = o[0].shape[0] * 8
    PER_PART: tl.constexpr = PAGE[1] // CHUNK
    out = ()
    for part in tl.static_range(len(o) // PER_PART):
        b, step, low = fold_weights(p, v_scales[part].to(tl.float32), T, N, PAIR)
        sums = column_sums(b, N, 4 // PAIR)
        by_sum = (share * (low + step * OFFSET))[None, None]
        by_product = (share * step * (1.0 / (1 << (8 - BITS))))[None, None]
        start = column_start(sums * OFFSET, CHUNK, N)
        for c in tl.static_range(part * PER_PART, (part + 1) * PER_PART):
            codes = code_operand(values[c], T, BITS, PAIR)
            acc = tl.dot(codes, b, start, out_dtype=tl.int32).to(tl.float32, bitcast=True).reshape(o[c].shape)
            if PAGE[4][7] >= 0:
                total = load_channels(page, PAGE[4][7], sum_type(T, BITS), c * CHUNK, CHUNK).to(tl.float32)
            else:
                ones = ones_operand(T, BITS, PAIR, N)
                total = tl.dot(codes, ones, tl.full([CHUNK, N], T * OFFSET + MAGIC_BITS, tl.int32), out_dtype=tl.int32)
                total = (total.to(tl.float32, bitcast=True).reshape(o[c].shape) - MAGIC) * (1.0 / (1 << (8 - BITS)))
            # Taking MAGIC off apart costs half a step of a product, far below that of the weights.
            added = acc * by_product + (total * by_sum - by_product * MAGIC)
            out = out + (o[c] * decay[None, None] + added,)
    return out


@triton.jit
def page_step(pages, present, state, q, PAGE: tl.constexpr, N: tl.constexpr, PAIR: tl.constexpr):
    """Add PAIR pages to ``state = (o, w, m, l)``: chunks of the output, ``sum_t p[t] v_minimum[t]`` per partition and
    denominator ``[8, ., COPIES, 2]``, maximum ``[., COPIES, 2]``. Every column keeps its own maximum.
    """
    T: tl.constexpr = PAGE[0]
    SIZE: tl.constexpr = PAGE[1]
    BITS: tl.constexpr = PAGE[2]
    PARTS: tl.constexpr = PAGE[3] // SIZE
    o, w, m, l = state
    page = as_tensor(pages)
    keys = load_keys(page, PAGE)
    sums = ()
    if PAGE[4][6] >= 0:
        sums = load_tokens(page, PAGE[4][6], sum_type(SIZE, BITS), PARTS, T, BITS)
    v_scales = load_tokens(page, PAGE[4][4], tl.float16, PARTS, T, BITS)
    v_minima = load_tokens(page, PAGE[4][5], tl.float16, PARTS, T, BITS)
    values = load_values(page, PAGE, o[0].shape[0] * 8)

    s = token_scores(pages, keys, sums, q, PAGE, N, PAIR)
    peak = tl.max(tl.max(s, 0), 0)
    p = tl.exp2(s - peak[None, None])
    top = tl.maximum(m, tl.where(present, peak, NEVER))
    share = tl.where(present, tl.exp2(peak - top), 0.0)
    decay = tl.exp2(m - top)
    l = l * decay[None] + tl.sum(p, 0) * share[None]
    new = ()
    for i in tl.static_range(PARTS):
        new = new + (w[i] * decay[None] + tl.sum(p * v_minima[i].to(tl.float32), 0) * share[None],)
    o = add_values(o, values, p, v_scales, page, decay, share, PAGE, N, PAIR)
    return o, new, top, l


@triton.jit(do_not_specialize=["stride_b", "stride_h", "stride_t", "batch", "max_items", "max_pages", "num_blocks"])
def decode_2026_kernel(
    Q, Pool, PageTable, NumPages, PartO, PartM, PartL, Items, batch, max_items, max_pages, num_blocks, stride_b,
    stride_h, stride_t, scale_log2,
    PAGE: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr, Q_LEN: tl.constexpr, N: tl.constexpr,
    PAIR: tl.constexpr, BATCH_BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One split of one sequence and kv head: a partial output over its pages. Grid (max_items, HEADS)."""
    SIZE: tl.constexpr = PAGE[1]
    D: tl.constexpr = PAGE[3]
    COPIES: tl.constexpr = 4 // PAIR
    CHUNK: tl.constexpr = chunk_width(SIZE)
    item = tl.program_id(0)
    head = tl.program_id(1)
    counts = count_pages(NumPages, batch, BATCH_BLOCK)
    b, split, count = find_split(item, counts, batch, max_items, PAIR, BATCH_BLOCK)
    if b >= batch:
        return
    num_pages = of_sequence(counts, b, BATCH_BLOCK)
    if split == 0:
        tl.store(Items + b * 2, item)
        tl.store(Items + b * 2 + 1, count)
    first, stop = split_range(split, count, (num_pages + PAIR - 1) // PAIR)
    first, stop = first * PAIR, tl.minimum(stop * PAIR, num_pages)
    last = tl.minimum(tl.maximum(stop - 1, 0), max_pages - 1)
    table = PageTable + b.to(tl.int64) * max_pages
    pool = Pool + head * PAGE[5]
    pages = find_pages(pool, table, first, last, num_blocks, HEADS * PAGE[5], PAIR)

    n = tl.arange(0, 8)[None, :, None, None, None] + 8 * tl.arange(0, N // 8)[None, None, :, None, None]
    row, live = query_rows(Q, n, b, head, stride_b, stride_h, stride_t, ROWS, Q_LEN, N // PAIR)
    q = ()
    w = ()
    for p in tl.static_range(D // SIZE):
        channel = thread_channels(SIZE, BITS=PAGE[2])
        x = tl.load(row + p * SIZE + channel, mask=live & (channel < SIZE), other=0.0)
        q = q + (x.to(tl.float32) * scale_log2,)
        w = w + (tl.zeros([8, N // (2 * COPIES), COPIES, 2], tl.float32),)
    o = ()
    for _ in tl.static_range(D // CHUNK):
        o = o + (tl.zeros([CHUNK // 8, 8, N // (2 * COPIES), COPIES, 2], tl.float32),)
    m = tl.full([N // (2 * COPIES), COPIES, 2], NEVER, tl.float32)
    l = tl.zeros([8, N // (2 * COPIES), COPIES, 2], tl.float32)
    place = tl.arange(0, N // (2 * COPIES))[:, None, None] if PAIR == 2 else 0
    for i in tl.range(first, stop, PAIR, num_stages=1):
        following = find_pages(pool, table, i + PAIR, last, num_blocks, HEADS * PAGE[5], PAIR)
        for j in tl.static_range(PAIR):
            prefetch(following[j], PAGE[5])
        o, w, m, l = page_step(pages, i + place < stop, (o, w, m, l), q, PAGE, N, PAIR)
        pages = following

    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    out = ()
    for c in tl.static_range(D // CHUNK):
        out = out + (o[c] + tl.sum(w[c * CHUNK // SIZE], 0)[None, None],)
    at = (item * HEADS + head).to(tl.int64) * ROWS
    store_partial(PartO, PartM, PartL, out, m, tl.sum(l, 0), at, CHUNK, D, ROWS, PAIR)
