"""Exact tokens in blocks of 64, as vLLM allocates them: store a token per sequence, seal pages, lay out what is read.

A sequence has ``1 + RING`` exact blocks: its first 64 tokens, and a ring in which tokens of page p lie in block
``(p - 1) mod RING`` (homkv/vllm/store.py). Everything is planned on the GPU from the sequences' lengths, so that a CUDA
graph can hold it: four launches, of which one is the encoder's.

Shapes: B sequences, G kv heads, D channels, P bytes of a page, R blocks of a ring.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from homkv.attention.triton.encode import encode
from homkv.attention.view import LayerView
from homkv.formats.rows import RowsCodec

PAGE = tl.constexpr(64)  # tokens of a page and of an exact block
WORDS = 1024  # of 8 bytes, that a digest takes at a time


@dataclass(frozen=True)
class ExactBlocks:
    """Where exact blocks lie: ``k v [blocks, G, 64, D]`` and ``tags [blocks, 2] int64``, views of the same memory."""

    k: Tensor
    v: Tensor
    tags: Tensor
    multiplier: int  # of a digest's weights


@triton.jit
def place_of(length, Exact, RING: tl.constexpr):
    """The newest of ``length`` tokens: its page, its place there, and the exact block that it belongs to."""
    position = tl.maximum(length - 1, 0)
    page = position // PAGE
    column = tl.where(page > 0, 1 + (page + RING - 1) % RING, 0)
    return page, position % PAGE, tl.load(Exact + column).to(tl.int64)


@triton.jit(do_not_specialize=["k_stride_b", "v_stride_b", "batch", "max_pages"])
def append_kernel(
    K, V, k_stride_b, k_stride_h, v_stride_b, v_stride_h, ExactK, ExactV, stride_block, stride_head, Exact,
    exact_stride, Lengths, PageTable, StagedK, StagedV, Ids, batch, max_pages, D: tl.constexpr, DP: tl.constexpr,
    RING: tl.constexpr,
):  # fmt: skip
    """Store a token, and stage its block if it is full now, zeros if not. Grid (B, G).

    ``K V [B, G, D]``; ``ExactK ExactV [blocks, G, 64, D]``; ``Exact [B, 1 + RING]`` block ids; ``Lengths [B]`` with the
    new token; ``PageTable [B, max_pages]``: page j at j - 1; ``StagedK StagedV [G, B * 64, D]``; ``Ids [B]``: where a
    staged page goes, 0 if it is none.
    """
    b = tl.program_id(0)
    g = tl.program_id(1)
    page, at, block = place_of(tl.load(Lengths + b), Exact + b * exact_stride, RING)
    d = tl.arange(0, DP)
    own = d < D
    here = block * stride_block + g * stride_head
    new_k = tl.load(K + b.to(tl.int64) * k_stride_b + g * k_stride_h + d, mask=own, other=0).to(ExactK.dtype.element_ty)
    new_v = tl.load(V + b.to(tl.int64) * v_stride_b + g * v_stride_h + d, mask=own, other=0).to(ExactV.dtype.element_ty)
    tl.store(ExactK + here + at * D + d, new_k, mask=own)
    tl.store(ExactV + here + at * D + d, new_v, mask=own)
    full = (page > 0) & (at == PAGE - 1)
    t = tl.arange(0, PAGE)
    offsets = t[:, None] * D + d[None, :]
    older = (t[:, None] < PAGE - 1) & own[None, :] & full
    newest = (t[:, None] == PAGE - 1) & full
    k = tl.where(newest, new_k[None, :], tl.load(ExactK + here + offsets, mask=older, other=0))
    v = tl.where(newest, new_v[None, :], tl.load(ExactV + here + offsets, mask=older, other=0))
    staged = (g.to(tl.int64) * batch + b) * PAGE * D
    tl.store(StagedK + staged + offsets, k, mask=own[None, :])
    tl.store(StagedV + staged + offsets, v, mask=own[None, :])
    if g == 0:
        known = tl.load(PageTable + b.to(tl.int64) * max_pages + tl.maximum(page - 1, 0), mask=full, other=0)
        tl.store(Ids + b, known)


@triton.jit
def digest(Pool, page_id, MULTIPLIER: tl.constexpr, COUNT: tl.constexpr, STEP: tl.constexpr):
    """``sum_i word[i] * (2 i + 1) * MULTIPLIER mod 2^64`` over a page's heads."""
    i = tl.arange(0, STEP)
    total = tl.zeros([STEP], tl.int64)
    for start in range(0, COUNT, STEP):
        words = tl.load(Pool + page_id.to(tl.int64) * COUNT + start + i, mask=start + i < COUNT, other=0)
        total += words * ((2 * (start + i) + 1).to(tl.int64) * MULTIPLIER)
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["max_pages"])
def seal_kernel(
    Pool, Tags, stride_tag, Exact, exact_stride, Lengths, PageTable, NumPages, ExactLen, Window, max_pages,
    MULTIPLIER: tl.constexpr, COUNT: tl.constexpr, STEP: tl.constexpr, RING: tl.constexpr,
):  # fmt: skip
    """Tag a page that is full now, and find by their tags which full blocks of the ring count. Grid (B,).

    ``Pool [pages, COUNT] int64``; ``Tags`` of block i at ``i * stride_tag``; ``NumPages ExactLen [B]``: of the view;
    ``Window [B]``: first page that is read exactly.
    """
    b = tl.program_id(0)
    length = tl.load(Lengths + b)
    row = Exact + b * exact_stride
    page, at, block = place_of(length, row, RING)
    pages = PageTable + b.to(tl.int64) * max_pages - 1
    if (page > 0) & (at == PAGE - 1):
        tl.store(Tags + block * stride_tag, page.to(tl.int64))
        tl.store(Tags + block * stride_tag + 1, digest(Pool, tl.load(pages + page), MULTIPLIER, COUNT, STEP))
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
    status: Tensor,
) -> LayerView:
    """Store one token of each sequence, seal the pages that it fills, and say what it attends to.

    ``k v [B, G, D]``; ``pool [pages, G, P] uint8``, of which page 0 is nobody's; ``exact [B, 1 + R] int32``;
    ``lengths [B] int32`` with the new token, 0 for none; ``page_table [B, max_pages] int32``: page j at ``j - 1``;
    ``status [1] int32``: set to non-zero by values that the format cannot hold. All on one GPU; nothing is read back.
    """
    (batch, heads, dim), ring, device = k.shape, exact.shape[1] - 1, k.device
    staged_k, staged_v = (torch.empty(heads, batch * 64, dim, dtype=blocks.k.dtype, device=device) for _ in "kv")
    ids, num_pages, exact_len, window = (torch.empty(batch, dtype=torch.int32, device=device) for _ in range(4))
    shape = {"D": dim, "DP": triton.next_power_of_2(dim), "RING": ring}
    append_kernel[(batch, heads)](
        k, v, *k.stride()[:2], *v.stride()[:2], blocks.k, blocks.v, *blocks.k.stride()[:2], exact, exact.stride(0),
        lengths, page_table, staged_k, staged_v, ids, batch, page_table.shape[1], **shape,
    )  # fmt: skip
    encode(staged_k, staged_v, codec.layout, codec.order, out=pool, block_ids=ids, status=status)
    seal_kernel[(batch,)](
        pool.view(torch.int64), blocks.tags, blocks.tags.stride(0), exact, exact.stride(0), lengths, page_table,
        num_pages, exact_len, window, page_table.shape[1], MULTIPLIER=blocks.multiplier,
        COUNT=heads * codec.page_bytes // 8, STEP=WORDS, RING=ring,
    )  # fmt: skip
    exact_k, exact_v = (
        torch.empty(batch, heads, (1 + ring) * 64, dim, dtype=blocks.k.dtype, device=device) for _ in "kv"
    )
    gather_kernel[(batch, heads, 1 + ring)](
        blocks.k, blocks.v, *blocks.k.stride()[:2], exact, exact.stride(0), window, exact_len, exact_k, exact_v,
        **shape,
    )  # fmt: skip
    slots = torch.arange(batch, dtype=torch.int32, device=device)
    return LayerView(pool, page_table, num_pages, exact_k, exact_v, exact_len, slots)
