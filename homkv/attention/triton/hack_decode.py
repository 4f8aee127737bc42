"""Decode attention on the pages of `hack`, and the one entry for both HACK formats."""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from homkv.attention.triton.checks import check_attend, reachable
from homkv.attention.triton.hack2026_decode import decode_2026_kernel
from homkv.attention.triton.hack_common import (
    Codec,
    as_tensor,
    find_pages,
    hack_combine,
    is_stochastic,
    noise_keys,
    page_constants,
    store_partial,
)
from homkv.attention.triton.hack_fragments import (
    OFFSET,
    chunk_width,
    code_operand,
    column_start,
    column_sums,
    load_channels,
    load_keys,
    load_query,
    load_tokens,
    load_values,
    ones_operand,
    padded,
    sum_type,
    weight_operand,
    weight_words,
)
from homkv.attention.triton.hack_prepare import TERMS, exact_kernel, prepare_kernel
from homkv.attention.triton.lanes import LOG2E, MAGIC, MAGIC_BITS, NEVER, prefetch
from homkv.attention.triton.runtime import has_dependent_launch, num_processors
from homkv.attention.triton.schedule import count_pages, find_split, of_sequence, split_range
from homkv.attention.view import LayerView
from homkv.formats.hack import HackCodec
from homkv.formats.hack2026 import Hack2026Codec

EXACT_TILE = 32  # exact tokens that one program attends to
Args = tuple[Any, ...]
Options = dict[str, Any]


@triton.jit
def token_scores(keys, numbers, queries, terms, PAGE: tl.constexpr, N: tl.constexpr, PAIR: tl.constexpr):
    """Scores of a page ``[T / 8, 8, ., COPIES, 2]``, in units of the first partition's step.

    ``sum_p [ q_step k_scale (q'.k') + q_low k_scale sum(k') + sum(q) k_minimum ]``; ``terms``: the queries' numbers.
    """
    T: tl.constexpr = PAGE[0]
    SIZE: tl.constexpr = PAGE[1]
    BITS: tl.constexpr = PAGE[2]
    COPIES: tl.constexpr = 4 // PAIR
    scales, minima, sums = numbers
    s = tl.zeros([T // 8, 8, N // (2 * COPIES), COPIES, 2], tl.float32)
    for p in tl.static_range(len(keys)):
        codes = code_operand(keys[p], SIZE, BITS, PAIR)
        scale = scales[p].to(tl.float32)
        acc = tl.dot(codes, queries[p], tl.broadcast_to(terms[p][3], [T, N]), out_dtype=tl.int32)
        # acc scale - MAGIC scale is exact up to one rounding: a float16 scale has 11 significant bits.
        y = acc.to(tl.float32, bitcast=True).reshape(s.shape) * scale - scale * MAGIC
        if len(sums) > 0:
            total = scale * sums[p].to(tl.float32)
        else:
            start = tl.full([T, N], SIZE * OFFSET + MAGIC_BITS, tl.int32)
            ones = ones_operand(SIZE, BITS, PAIR, N)
            acc = tl.dot(codes, ones, start, out_dtype=tl.int32).to(tl.float32, bitcast=True)
            total = scale * ((acc.reshape(s.shape) - MAGIC) * (1.0 / (1 << (8 - BITS))))
        s = y if p == 0 else s + y * terms[p][0]
        s += total * terms[p][1] + minima[p].to(tl.float32) * terms[p][2]
    return s


@triton.jit
def add_values(
    o, values, b, sums, decay, share, low, step, page, PAGE: tl.constexpr, N: tl.constexpr, PAIR: tl.constexpr
):  # fmt: skip
    """Add a page to the output: ``o decay + share sum_t p[t] v[t]``, weights ``p ~ step (code + 128) + low``.

    ``b``: the weights' codes as right operand, ``sums``: theirs, ``[8, ., COPIES, 2]``.
    ``sum_t p v = step v_scale (p'.v') + low v_scale sum(v') + sum(p) v_minimum``.
    """
    T: tl.constexpr = PAGE[0]
    BITS: tl.constexpr = PAGE[2]
    CHUNK: tl.constexpr = o[0].shape[0] * 8
    low += step * OFFSET
    by_product = (share * step * (1.0 / (1 << (8 - BITS))))[None, None]
    by_sum = (share * low)[None, None]
    by_minimum = (share[None] * (sums.to(tl.float32) * step[None] + (low * T)[None]))[None]
    start = column_start(sums * OFFSET, CHUNK, N)
    out = ()
    for c in tl.static_range(len(o)):
        codes = code_operand(values[c], T, BITS, PAIR)
        scale = load_channels(page, PAGE[4][4], tl.float16, c * CHUNK, CHUNK).to(tl.float32)
        minimum = load_channels(page, PAGE[4][5], tl.float16, c * CHUNK, CHUNK).to(tl.float32)
        acc = tl.dot(codes, b, start, out_dtype=tl.int32).to(tl.float32, bitcast=True)
        y = acc.reshape(o[c].shape) * scale - scale * MAGIC
        if PAGE[4][7] >= 0:
            total = scale * load_channels(page, PAGE[4][7], sum_type(T, BITS), c * CHUNK, CHUNK).to(tl.float32)
        else:
            ones = ones_operand(T, BITS, PAIR, N)
            acc = tl.dot(codes, ones, tl.full([CHUNK, N], T * OFFSET + MAGIC_BITS, tl.int32), out_dtype=tl.int32)
            acc = acc.to(tl.float32, bitcast=True).reshape(o[c].shape)
            total = scale * ((acc - MAGIC) * (1.0 / (1 << (8 - BITS))))
        out = out + (o[c] * decay[None, None] + y * by_product + total * by_sum + minimum * by_minimum,)
    return out


@triton.jit
def page_step(
    page, present, state, queries, terms, unit, PAGE: tl.constexpr, N: tl.constexpr, PAIR: tl.constexpr
):  # fmt: skip
    """Add PAIR pages to ``state = (o, m, l)``: output chunks, maximum ``[., COPIES, 2]``, denominator ``[8, ...]``.

    ``page [PAIR]`` byte pointers; ``present [., 1, 1]``: which columns' page exists. Every column has a maximum of its
    own.
    """
    T: tl.constexpr = PAGE[0]
    SIZE: tl.constexpr = PAGE[1]
    BITS: tl.constexpr = PAGE[2]
    PARTS: tl.constexpr = PAGE[3] // SIZE
    o, m, l = state
    # All large loads first: nothing else hides their latency but other warps.
    keys = load_keys(page, PAGE)
    scales = load_tokens(page, PAGE[4][2], tl.float16, PARTS, T, BITS)
    minima = load_tokens(page, PAGE[4][3], tl.float16, PARTS, T, BITS)
    sums = ()
    if PAGE[4][6] >= 0:
        sums = load_tokens(page, PAGE[4][6], sum_type(SIZE, BITS), PARTS, T, BITS)
    values = load_values(page, PAGE, o[0].shape[0] * 8)

    s = token_scores(keys, (scales, minima, sums), queries, terms, PAGE, N, PAIR)
    peak = tl.max(tl.max(s, 0), 0) * unit
    low = tl.exp2(tl.min(tl.min(s, 0), 0) * unit - peak)
    step = (1.0 - low) * (1.0 / 255.0)
    inverse = tl.where(step > 0, 1.0 / step, 0.0)
    p = tl.exp2(s * unit[None, None] - peak[None, None])
    b = weight_operand(weight_words((p - low[None, None]) * inverse[None, None] + (MAGIC - OFFSET), N), PAIR, N)
    top = tl.maximum(m, tl.where(present, peak, NEVER))
    share = tl.where(present, tl.exp2(peak - top), 0.0)
    decay = tl.exp2(m - top)
    l = l * decay[None] + tl.sum(p, 0) * share[None]
    o = add_values(o, values, b, column_sums(b, N, 4 // PAIR), decay, share, low, step, page, PAGE, N, PAIR)
    return o, top, l


@triton.jit
def load_terms(terms, PART: tl.constexpr, N: tl.constexpr, COPIES: tl.constexpr):
    """One partition's numbers per query row: three ``[1, 1, ., COPIES, 2]`` and the start ``[1, N]`` int32."""
    at = terms + PART * (TERMS * N) + tl.arange(0, N)
    out = ()
    for i in tl.static_range(3):
        out = out + (tl.load(at + i * N).reshape([1, 1, N // (2 * COPIES), COPIES, 2]),)
    start = (tl.load(at + 3 * N) + MAGIC).to(tl.int32, bitcast=True)
    return out + (start[None, :],)


# Sizes that differ from call to call must not compile a kernel each.
SIZES = ["batch", "max_items", "max_pages", "num_blocks"]


@triton.jit(do_not_specialize=SIZES)
def decode_kernel(
    Codes, Terms, Pool, PageTable, NumPages, PartO, PartM, PartL, Items, batch, max_items, max_pages, num_blocks,
    PAGE: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr, N: tl.constexpr, PAIR: tl.constexpr,
    BATCH_BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One split of one sequence and kv head: a partial output over its pages. Grid (max_items, HEADS)."""
    SIZE: tl.constexpr = PAGE[1]
    D: tl.constexpr = PAGE[3]
    PARTS: tl.constexpr = D // SIZE
    COPIES: tl.constexpr = 4 // PAIR
    CHUNK: tl.constexpr = chunk_width(D)
    item = tl.program_id(0)
    head = tl.program_id(1)
    counts = count_pages(NumPages, batch, BATCH_BLOCK)
    b, split, count = find_split(item, counts, batch, max_items, PAIR, BATCH_BLOCK)
    if b >= batch:
        return
    pages = of_sequence(counts, b, BATCH_BLOCK)
    if split == 0:
        tl.store(Items + b * 2, item)
        tl.store(Items + b * 2 + 1, count)
    first, stop = split_range(split, count, (pages + PAIR - 1) // PAIR)
    first, stop = first * PAIR, tl.minimum(stop * PAIR, pages)
    last = tl.minimum(tl.maximum(stop - 1, 0), max_pages - 1)
    table = PageTable + b.to(tl.int64) * max_pages
    pool = Pool + head * PAGE[5]
    pages = find_pages(pool, table, first, last, num_blocks, HEADS * PAGE[5], PAIR)
    if PDL:
        tl.extra.cuda.gdc_wait()

    at = (b * HEADS + head) * PARTS
    SLOTS: tl.constexpr = PAIR * padded(SIZE)
    queries = ()
    terms = ()
    for p in tl.static_range(PARTS):
        codes = Codes + (at + p).to(tl.int64) * (N * SLOTS // 4)
        queries = queries + (load_query(codes, SIZE, PAIR, N),)
        terms = terms + (load_terms(Terms + at * (TERMS * N), p, N, COPIES),)
    unit = terms[0][0]
    scaled = ()
    for p in tl.static_range(PARTS):
        x = terms[p]
        scaled = scaled + ((x[0] / unit, x[1] / unit, x[2] / unit, x[3]),)
    unit = unit.reshape([N // (2 * COPIES), COPIES, 2])

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
        o, m, l = page_step(
            as_tensor(pages), i + place < stop, (o, m, l), queries, scaled, unit, PAGE, N, PAIR
        )  # fmt: skip
        pages = following

    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    at = (item * HEADS + head).to(tl.int64) * ROWS
    store_partial(PartO, PartM, PartL, o, m, tl.sum(l, 0), at, CHUNK, D, ROWS, PAIR)


@dataclass(frozen=True)
class HackConfig:
    """What does not change the result beyond rounding: programs per processor, register cap."""

    programs: int = 12  # per multiprocessor: the grid is one wave of these
    max_registers: int | None = 168


def attend_hack(
    q: Tensor, view: LayerView, codec: Codec, softmax_scale: float, config: HackConfig | None = None
) -> tuple[Tensor, Tensor]:
    """Decode attention on HACK's pages by its own algebra; see homkv.attention.triton.attend.

    Q and P are rounded to 8 bits as homkv.formats has it; `hack` sees its open block's keys quantized.
    Raises ShapeError, DTypeError, UnsupportedError.
    """
    check_attend(q, view, codec, softmax_scale)
    q, config = reachable(q), config or HackConfig()
    device, heads, (batch, _, length, dim) = q.device, view.pool.shape[1], q.shape
    rows, exact_tokens = q.shape[1] // heads * length, view.exact_k.shape[2]
    tiles = triton.next_power_of_2(triton.cdiv(exact_tokens, EXACT_TILE))
    max_items = max(batch, config.programs * num_processors(device) // heads)
    fixed = {"ROWS": rows, "HEADS": heads, "PDL": has_dependent_launch(device)}
    shape = {"PAGE": page_constants(codec), "N": 16 if rows > 8 else 8, "PAIR": 2 if rows <= 4 else 1, **fixed}

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, device=device)

    partial = (empty(max_items, heads, rows, dim), empty(max_items, heads, rows), empty(max_items, heads, rows))
    exact = (empty(batch, heads, tiles, rows, dim), empty(batch, heads, tiles, rows), empty(batch, heads, tiles, rows))
    items, o, lse = torch.empty(batch, 2, dtype=torch.int32, device=device), empty(*q.shape), empty(*q.shape[:3])
    run = run_v1 if isinstance(codec, HackCodec) else run_2026
    run(
        q, codec, (batch, heads, tiles, max_items), (*q.stride()[:3], softmax_scale * LOG2E.value),
        (view.exact_k, view.exact_v, view.exact_len, view.slots, view.num_pages, *exact, exact_tokens,
         view.exact_k.shape[0]),
        (view.pool.view(torch.int8), view.page_table, view.num_pages, *partial, items, batch, max_items,
         view.page_table.shape[1], view.pool.shape[0]),
        shape | {"Q_LEN": length, "TILE": EXACT_TILE, "TILES": tiles, "num_warps": 2},
        shape | launch_options(batch, config, fixed["PDL"]),
    )  # fmt: skip
    width = chunk_width(dim)
    hack_combine[(batch * heads * rows, dim // width)](
        o, lse, *partial, items, *exact, view.exact_len, exact_tokens, D=dim, **fixed, TILE=EXACT_TILE, TILES=tiles,
        SPLITS=32, WIDTH=width, num_warps=4, launch_pdl=fixed["PDL"],
    )  # fmt: skip
    return o, lse


def launch_options(batch: int, config: HackConfig, pdl: bool) -> dict[str, Any]:
    """How a decode kernel is launched: one warp per program."""
    room = max(triton.next_power_of_2(batch), 32)
    return {"BATCH_BLOCK": room, "num_warps": 1, "num_stages": 1, "maxnreg": config.max_registers, "launch_pdl": pdl}


def run_v1(
    q: Tensor, codec: HackCodec, sizes: tuple[int, ...], query: Args, exact: Args, pages: Args, prepare: Options,
    decode: Options,
) -> None:  # fmt: skip
    """Launch the kernels of `hack`."""
    batch, heads, tiles, max_items = sizes
    parts, columns = codec.head_dim // codec.partition, decode["N"]
    slots = decode["PAIR"] * padded(codec.partition)
    codes = torch.empty(batch, heads, parts, columns, slots, dtype=torch.int8, device=q.device)
    terms = torch.empty(batch, heads, parts, TERMS.value, columns, device=q.device)
    key, _ = noise_keys(codec)
    prepare_kernel[(batch, heads, parts + tiles)](
        q, codes, terms, *exact, *query, key, STOCHASTIC=is_stochastic(codec), **prepare
    )
    decode_kernel[(max_items, heads)](codes.view(torch.int32), terms, *pages, **decode)


def run_2026(
    q: Tensor, codec: Hack2026Codec, sizes: tuple[int, ...], query: Args, exact: Args, pages: Args, prepare: Options,
    decode: Options,
) -> None:  # fmt: skip
    """Launch the kernels of `hack-2026`."""
    batch, heads, tiles, max_items = sizes
    exact_kernel[(batch, heads, tiles)](q, *exact, *query, **prepare)
    decode_2026_kernel[(max_items, heads)](q, *pages, *query, Q_LEN=prepare["Q_LEN"], **decode)
