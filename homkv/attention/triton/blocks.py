"""Exact tokens in blocks of 64, as vLLM allocates them: store a token per sequence, seal pages, lay out what is read.

A sequence has ``1 + RING`` exact blocks: its first 64 tokens, and a ring in which tokens of page p lie in block
``(p - 1) mod RING`` (homkv/vllm/store.py). Everything is planned on the GPU from the sequences' lengths, so that a CUDA
graph can hold it: four launches, of which one encodes the pages that are full.

Shapes: B sequences, G kv heads, D channels, P bytes of a page, R blocks of a ring.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from homkv.attention.triton.encode import constants, options, slots_on_device
from homkv.attention.triton.encode_keys import encode_keys, pages_at_once
from homkv.attention.triton.encode_values import encode_values
from homkv.attention.triton.window import window_config
from homkv.attention.view import LayerView
from homkv.formats.rows import RowsCodec

PAGE = tl.constexpr(64)  # tokens of a page and of an exact block
WORDS = 2048  # of 8 bytes, that a digest takes at a time
MARKS = 1024  # pages whose marks are looked at together


@dataclass(frozen=True)
class ExactBlocks:
    """Of one memory: exact blocks ``k v [blocks, G, 64, D]``, ``tags [blocks, 2] int64``, ``marks [pages] int16``.

    ``mark``: what stands in the place of a page's mark if the page could not be stored.
    """

    k: Tensor
    v: Tensor
    tags: Tensor
    marks: Tensor
    mark: int
    multiplier: int  # of a digest's weights


@triton.jit
def place_of(length, Exact, RING: tl.constexpr):
    """The newest of ``length`` tokens: its page, its place there, and the exact block that it belongs to."""
    position = tl.maximum(length - 1, 0)
    page = position // PAGE
    column = tl.where(page > 0, 1 + (page + RING - 1) % RING, 0)
    return page, position % PAGE, tl.load(Exact + column).to(tl.int64)


@triton.jit(do_not_specialize=["k_stride_b", "v_stride_b"])
def append_kernel(
    K, V, k_stride_b, k_stride_h, v_stride_b, v_stride_h, ExactK, ExactV, stride_block, stride_head, Exact,
    exact_stride, Lengths, Status, D: tl.constexpr, DP: tl.constexpr, RING: tl.constexpr,
):  # fmt: skip
    """Store a token, its value as NaN if its key is not finite. Grid (B, G).

    ``K V [B, G, D]``; ``ExactK ExactV [blocks, G, 64, D]``; ``Exact [B, 1 + RING]`` block ids; ``Lengths [B]`` with the
    new token; ``Status [B]``: of the encoder, becomes 0.
    """
    b = tl.program_id(0)
    g = tl.program_id(1)
    _, at, block = place_of(tl.load(Lengths + b), Exact + b * exact_stride, RING)
    d = tl.arange(0, DP)
    own = d < D
    here = block * stride_block + g * stride_head
    new_k = tl.load(K + b.to(tl.int64) * k_stride_b + g * k_stride_h + d, mask=own, other=0).to(ExactK.dtype.element_ty)
    new_v = tl.load(V + b.to(tl.int64) * v_stride_b + g * v_stride_h + d, mask=own, other=0).to(ExactV.dtype.element_ty)
    size = new_k.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    new_v = tl.where(tl.max(size, 0) < 0x7F800000, new_v.to(tl.float32), float("nan")).to(ExactV.dtype.element_ty)
    tl.store(ExactK + here + at * D + d, new_k, mask=own)
    tl.store(ExactV + here + at * D + d, new_v, mask=own)
    if g == 0:
        tl.store(Status + b, 0)


@triton.jit(do_not_specialize=["max_pages", "num_blocks"])
def encode_kernel(
    ExactK, ExactV, stride_block, stride_head, Exact, exact_stride, Lengths, PageTable, Pool, SlotOf, Status, max_pages,
    num_blocks, K: tl.constexpr, V: tl.constexpr, GAPS: tl.constexpr, ORDER: tl.constexpr, CENTRE: tl.constexpr,
    USED: tl.constexpr, PAGE_BYTES: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, K_LANES: tl.constexpr,
    V_LANES: tl.constexpr, OVERLAP: tl.constexpr, THREADS: tl.constexpr, HEADS: tl.constexpr, RING: tl.constexpr,
):  # fmt: skip
    """Encode the page that a sequence's newest token has filled, if it has. Grid (items of a sequence, B).

    An item is a class of values of some heads, or the keys of some heads. ``Pool [num_blocks, HEADS, PAGE_BYTES]``;
    ``PageTable [B, max_pages]``: page j at j - 1; ``Status [B]``: not 0 if a number does not fit.
    """
    item = tl.program_id(0)
    b = tl.program_id(1)
    page, at, block = place_of(tl.load(Lengths + b), Exact + b * exact_stride, RING)
    if (page == 0) | (at != PAGE - 1):
        return
    k = ExactK + block * stride_block
    v = ExactV + block * stride_block
    blocks = PageTable + b.to(tl.int64) * max_pages + page - 1
    V_PAGES: tl.constexpr = THREADS // V_LANES
    V_ITEMS: tl.constexpr = (HEADS + V_PAGES - 1) // V_PAGES * len(V)
    if item < V_ITEMS:
        first = item // max(len(V), 1) * V_PAGES
        for c in tl.static_range(len(V)):
            if item % len(V) == c:
                encode_values(
                    v, stride_head, D, Pool, blocks, Status + b, first, HEADS, HEADS, num_blocks, V, c, PAGE_BYTES,
                    V_LANES, OVERLAP, THREADS, True,
                )  # fmt: skip
    else:
        encode_keys(
            k, stride_head, D, v, stride_head, D, Pool, blocks, SlotOf, Status + b,
            (item - V_ITEMS) * pages_at_once(THREADS // K_LANES), HEADS, HEADS, num_blocks, K, GAPS, ORDER, CENTRE,
            USED, PAGE_BYTES, D, DP, K_LANES, THREADS, True,
        )  # fmt: skip


@triton.jit
def digest(Pool, page_id, MULTIPLIER: tl.constexpr, COUNT: tl.constexpr, STEP: tl.constexpr):
    """``sum_i word[i] * (2 i + 1) * MULTIPLIER mod 2^64`` over a page's heads."""
    i = tl.arange(0, STEP)
    total = tl.zeros([STEP], tl.int64)
    for start in range(0, COUNT, STEP):
        words = tl.load(Pool + page_id.to(tl.int64) * COUNT + start + i, mask=start + i < COUNT, other=0)
        total += words * ((2 * (start + i) + 1).to(tl.int64) * MULTIPLIER)
    return tl.sum(total, 0)


@triton.jit
def reads_marked(Marks, stride_mark, pages, count, MARK: tl.constexpr, STEP: tl.constexpr):
    """Whether any of the first ``count`` ids in ``pages`` is of a marked page."""
    found = 0
    for start in tl.range(0, count, STEP):
        i = start + tl.arange(0, STEP)
        ids = tl.load(pages + i, mask=i < count, other=0).to(tl.int64)
        marks = tl.load(Marks + ids * stride_mark, mask=i < count, other=0)
        found |= tl.max((marks == MARK).to(tl.int32), 0)
    return found != 0


@triton.jit(do_not_specialize=["max_pages"])
def seal_kernel(
    Pool, Tags, stride_tag, Marks, stride_mark, Exact, exact_stride, Lengths, PageTable, Status, NumPages, ExactLen,
    Window, Taint, max_pages, MULTIPLIER: tl.constexpr, MARK: tl.constexpr, COUNT: tl.constexpr, STEP: tl.constexpr,
    LOOKED: tl.constexpr, RING: tl.constexpr,
):  # fmt: skip
    """Tag a page that is full now, and find by their tags which full blocks of the ring count. Grid (B,).

    ``Pool [pages, COUNT] int64``; ``Tags`` of block i at ``i * stride_tag``; ``Marks`` of page i at
    ``i * stride_mark``; ``Status [B]``: of the encoder; ``NumPages ExactLen [B]``: of the view; ``Window [B]``: first
    page that is read exactly; ``Taint [B]``: NaN if one of the pages that are read is marked, else 0.
    """
    b = tl.program_id(0)
    length = tl.load(Lengths + b)
    row = Exact + b * exact_stride
    page, at, block = place_of(length, row, RING)
    pages = PageTable + b.to(tl.int64) * max_pages - 1
    if (page > 0) & (at == PAGE - 1):
        page_id = tl.load(pages + page).to(tl.int64)
        if tl.load(Status + b) != 0:
            tl.store(Marks + page_id * stride_mark, MARK)
            tl.debug_barrier()  # other threads read the mark, as a part of the digest
        tl.store(Tags + block * stride_tag, page.to(tl.int64))
        tl.store(Tags + block * stride_tag + 1, digest(Pool, page_id, MULTIPLIER, COUNT, STEP))
    held = page * 0
    for back in tl.static_range(1, RING):
        if (page - back > 0) & (held == back - 1):
            column = 1 + (page - back + RING - 1) % RING
            tag = Tags + tl.load(row + column).to(tl.int64) * stride_tag
            if tl.load(tag) == page - back:
                found = digest(Pool, tl.load(pages + page - back), MULTIPLIER, COUNT, STEP)
                held += (tl.load(tag + 1) == found).to(tl.int32)
    window = page - held
    tl.store(Window + b, window)
    tl.store(NumPages + b, tl.maximum(window - 1, 0))
    tl.store(ExactLen + b, tl.where(page > 0, PAGE + length - PAGE * window, length))
    is_tainted = reads_marked(Marks, stride_mark, pages + 1, window - 1, MARK, LOOKED)
    tl.store(Taint + b, tl.where(is_tainted, float("nan"), 0.0))


@triton.jit
def gather_kernel(
    ExactK, ExactV, stride_block, stride_head, Exact, exact_stride, Window, ExactLen, OutK, OutV, D: tl.constexpr,
    DP: tl.constexpr, RING: tl.constexpr,
):  # fmt: skip
    """First tokens and window in one piece, ``OutK OutV [B, G, (1 + RING) * 64, D]``. Grid (B, G, 1 + RING)."""
    b = tl.program_id(0)
    g = tl.program_id(1)
    j = tl.program_id(2)
    if j * PAGE >= tl.load(ExactLen + b):
        return
    column = tl.where(j > 0, 1 + (tl.load(Window + b) + j + RING - 2) % RING, 0)
    block = tl.load(Exact + b * exact_stride + column).to(tl.int64)
    t = tl.arange(0, PAGE)
    d = tl.arange(0, DP)
    offsets = t[:, None] * D + d[None, :]
    own = (d < D)[None, :] & (t >= 0)[:, None]
    here = block * stride_block + g * stride_head + offsets
    there = ((b * tl.num_programs(1) + g).to(tl.int64) * (1 + RING) + j) * PAGE * D + offsets
    tl.store(OutK + there, tl.load(ExactK + here, mask=own), mask=own)
    tl.store(OutV + there, tl.load(ExactV + here, mask=own), mask=own)


def step(
    k: Tensor,
    v: Tensor,
    pool: Tensor,
    blocks: ExactBlocks,
    exact: Tensor,
    lengths: Tensor,
    page_table: Tensor,
    codec: RowsCodec,
) -> tuple[LayerView, Tensor]:
    """Store one token of each sequence, seal the pages that it fills, and say what it attends to.

    ``k v [B, G, D]``; ``pool [pages, G, P] uint8``, of which page 0 is nobody's; ``exact [B, 1 + R] int32``;
    ``lengths [B] int32`` with the new token, 0 for none; ``page_table [B, max_pages] int32``: page j at ``j - 1``;
    Returns also ``[B] float32``, to be added to what is attended to: NaN for sequences that read a marked page, else 0.
    All on one GPU; nothing is read back.
    """
    (batch, heads, dim), ring, device = k.shape, exact.shape[1] - 1, k.device
    status, num_pages, exact_len, window = (torch.empty(batch, dtype=torch.int32, device=device) for _ in range(4))
    taint = torch.empty(batch, device=device)
    shape = {"D": dim, "DP": triton.next_power_of_2(dim), "RING": ring}
    append_kernel[(batch, heads)](
        k, v, *k.stride()[:2], *v.stride()[:2], blocks.k, blocks.v, *blocks.k.stride()[:2], exact, exact.stride(0),
        lengths, status, **shape,
    )  # fmt: skip
    config, order = window_config(codec), tuple(codec.order.tolist())
    encode_kernel[(config.items(heads, len(codec.layout.v_classes)), batch)](
        blocks.k, blocks.v, *blocks.k.stride()[:2], exact, exact.stride(0), lengths, page_table, pool,
        slots_on_device(order, device), status, page_table.shape[1], pool.shape[0],
        **constants(codec.layout, order, config), HEADS=heads, RING=ring, **options(config),
    )  # fmt: skip
    seal_kernel[(batch,)](
        pool.view(torch.int64), blocks.tags, blocks.tags.stride(0), blocks.marks, blocks.marks.stride(0), exact,
        exact.stride(0), lengths, page_table, status, num_pages, exact_len, window, taint, page_table.shape[1],
        MULTIPLIER=blocks.multiplier, MARK=blocks.mark, COUNT=heads * codec.page_bytes // 8, STEP=WORDS, LOOKED=MARKS,
        RING=ring, num_warps=8,
    )  # fmt: skip
    exact_k, exact_v = (
        torch.empty(batch, heads, (1 + ring) * 64, dim, dtype=blocks.k.dtype, device=device) for _ in "kv"
    )
    gather_kernel[(batch, heads, 1 + ring)](
        blocks.k, blocks.v, *blocks.k.stride()[:2], exact, exact.stride(0), window, exact_len, exact_k, exact_v,
        **shape,
    )  # fmt: skip
    slots = torch.arange(batch, dtype=torch.int32, device=device)
    return LayerView(pool, page_table, num_pages, exact_k, exact_v, exact_len, slots), taint
