"""One layer's blocks: exact tokens in, pages out, and what attention sees of them. Knows nothing of vLLM.

Page j holds tokens ``[64 j, 64 j + 64)``. Unlike elsewhere in homkv the first 64 tokens, not 4, are sinks: so pages
never straddle vLLM's blocks and can be shared by their prefix. A page is encoded as soon as its last token is there.
Attention nevertheless reads the newest 64 to 127 stored tokens exactly, and beside them the token that it is computed
for (with a window of N: N to N + 63). They lie in a ring of R = N / 64 + 1 blocks: page j's tokens in block
``(j - 1) mod R``, token t at ``t mod 64``. The place is a function of the position, so storing a token twice, as the
decode side of a transfer does with the last prompt token, leaves the same bytes.

A full block carries a **tag**: the page j that its tokens became, and a digest of that page's bytes. Its tokens stand
for page j only while the tag names the page that the sequence's own page table points to. So a ring block that was
just allocated, for a sequence that starts behind cached pages, is never mistaken for its window: the newest cached
pages are read as pages until the ring has filled.

A page that the format cannot hold (docs/format.md) is **marked**: its centre begins with a NaN, which no encoder
writes. It may be shared, sent and kept as any other. Whoever reads it gets NaN, whatever else attention finds. Where a
key is not finite, its value is stored as NaN, with the same effect: kernels may take the key's score for -inf.
"""

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from homkv.attention import api
from homkv.attention.view import LayerView
from homkv.errors import FormatError, UnsupportedError
from homkv.formats.rows import RowsCodec
from homkv.spec import PAGE_TOKENS
from homkv.vllm.blocks import TAG_BYTES, BlockPlan

MULTIPLIER = 0x9E3779B97F4A7C15 - (1 << 64)  # odd: the golden ratio's, as a signed 64-bit number
MARK = 0x7E00  # NaN in fp16


Index = TypeVar("Index", int, Tensor)


def place_of(page: Index, ring_blocks: int) -> Index:
    """Which block of the ring holds a page's tokens. Page 1, the first that is not exact for good, uses the first."""
    return (page - 1) % ring_blocks


@dataclass(frozen=True)
class Ring:
    """The rings of B sequences, copied: ``k v [B, R, G, 64, D]``, ``tags [B, R, 2] int64``; ``tokens [B]``: stored."""

    k: Tensor
    v: Tensor
    tags: Tensor
    tokens: Tensor


@dataclass(frozen=True)
class Places:
    """Where one new token of each of B sequences goes; the same in every layer.

    ``column [B, 1]`` of the exact blocks, ``at [B]`` inside the block; ``due [m]``: sequences whose page is full with
    it, ``pages [m]``: that page. All int64 and on one device.
    """

    column: Tensor
    at: Tensor
    due: Tensor
    pages: Tensor

    @classmethod
    def of(cls, lengths: Tensor, ring_blocks: int) -> "Places":
        """For tokens at position ``lengths - 1``."""
        position = lengths.long() - 1
        page, at = position // PAGE_TOKENS, position % PAGE_TOKENS
        column = torch.where(page > 0, 1 + place_of(page, ring_blocks), 0).unsqueeze(1)
        due = ((at == PAGE_TOKENS - 1) & (page > 0)).nonzero().squeeze(1)
        return cls(column, at, due, page[due])


def page_ids(table: Tensor, pages_per_block: int) -> Tensor:
    """Rows of the pool of pages 0, 1 ...: block ids ``[B, n]`` to ``[B, n * pages_per_block]``."""
    steps = torch.arange(pages_per_block, dtype=table.dtype, device=table.device)
    return (table.unsqueeze(-1) * pages_per_block + steps).flatten(-2)


def values_to_store(k: Tensor, v: Tensor) -> Tensor:
    """``v [..., D]``, NaN where ``k [..., D]`` is not finite."""
    return torch.where(k.isfinite().all(-1, keepdim=True), v, torch.nan)


class LayerStore:
    """Views of one layer's cache.

    ``pages exact [num_blocks, G, block_size, C] uint8``: vLLM's tensors of the attention layer and of its exact layer;
    they may be the same memory, since a block belongs to one of the two. ``raw_dtype``: of exact tokens.
    """

    def __init__(self, codec: RowsCodec, plan: BlockPlan, pages: Tensor, exact: Tensor, raw_dtype: torch.dtype) -> None:
        for name, cache in (("pages", pages), ("exact blocks", exact)):
            if cache.dtype not in (torch.uint8, torch.int8) or not cache.is_contiguous():
                raise UnsupportedError(
                    f"expected {name} as contiguous bytes, found {cache.dtype} {tuple(cache.shape)} with strides "
                    f"{cache.stride()}; unset VLLM_KV_CACHE_LAYOUT, or set it to LBHNC"
                )
        self.codec, self.plan = codec, plan
        num_blocks, heads = pages.shape[:2]
        self.pool = pages.view(torch.uint8).view(num_blocks * plan.pages_per_block, heads, codec.page_bytes)
        blocks = exact.view(torch.uint8).view(num_blocks, heads, plan.pages_per_block * codec.page_bytes)
        one = PAGE_TOKENS * codec.head_dim * raw_dtype.itemsize
        shape = (PAGE_TOKENS, codec.head_dim)
        self.exact_k = blocks[..., :one].view(raw_dtype).unflatten(-1, shape)
        self.exact_v = blocks[..., one : 2 * one].view(raw_dtype).unflatten(-1, shape)
        self.tags = blocks[:, 0, 2 * one : 2 * one + TAG_BYTES].view(torch.int64)
        self.marks = self.pool.view(torch.int16)[:, 0, codec.layout.centre_offset // 2]
        self._memory = [(x.data_ptr(), x.shape) for x in (pages, exact)]
        words = heads * codec.page_bytes // 8
        self._weights = (2 * torch.arange(words, dtype=torch.int64, device=pages.device) + 1) * MULTIPLIER

    def is_of(self, pages: Tensor, exact: Tensor) -> bool:
        """Whether these are views of that memory."""
        return self._memory == [(x.data_ptr(), x.shape) for x in (pages, exact)]

    def digest(self, page_ids: Tensor) -> Tensor:
        """``sum_i word[i] * weight[i] mod 2^64`` over all heads of each page; ``[...] int64``."""
        words = self.pool[page_ids.long()].flatten(-2).view(torch.int64)
        return (words * self._weights).sum(-1)

    # -- storing -------------------------------------------------------------------------------------------------------

    def store_one(self, tables: Tensor, exact: Tensor, places: Places, k: Tensor, v: Tensor) -> None:
        """Store one token of each sequence, ``k v [B, G, D]``, and the pages that it fills.

        ``tables [B, num_pages]`` from :func:`page_ids`, ``exact [B, 1 + R]`` block ids.
        """
        blocks = exact.long().gather(1, places.column).squeeze(1)
        self.exact_k[blocks, :, places.at] = k.to(self.exact_k.dtype)
        self.exact_v[blocks, :, places.at] = values_to_store(k, v).to(self.exact_v.dtype)
        if len(places.due):
            ids, source = tables[places.due, places.pages], blocks[places.due]
            self._encode(self.exact_k[source], self.exact_v[source], ids)
            self._tag(source, places.pages, ids)

    def store_many(self, table: Tensor, exact: Tensor, start: int, k: Tensor, v: Tensor, before: Ring | None) -> None:
        """Store tokens ``[start, start + T)`` of one sequence, ``k v [T, G, D]``; pages as they fill.

        ``table [num_pages]``, ``exact [1 + R]`` of this sequence. ``before``: its ring as it was, if start is not 0.
        """
        k, v = (x.transpose(0, 1).to(self.exact_k.dtype) for x in (k, values_to_store(k, v)))
        first, stop = start // PAGE_TOKENS, start + k.shape[1]
        held = start % PAGE_TOKENS
        if held:  # a page was left open: its first tokens come from where they were kept
            source = self._open_tokens(exact, first, before)
            k, v = (torch.cat((old[:, :held], new), 1) for old, new in zip(source, (k, v), strict=True))
        last = stop // PAGE_TOKENS
        offset = max(1, first) - first
        if last > first + offset:
            whole = slice(offset * PAGE_TOKENS, (last - first) * PAGE_TOKENS)
            whole_k, whole_v = (x[:, whole].unflatten(1, (-1, PAGE_TOKENS)).transpose(0, 1) for x in (k, v))
            self._encode(whole_k, whole_v, table[first + offset : last])
        for index in sorted({0, *range(last + 1 - self.plan.ring_blocks, last + 1)}):
            tokens = slice((index - first) * PAGE_TOKENS, (index - first + 1) * PAGE_TOKENS)
            if index < first or tokens.start >= k.shape[1]:
                continue
            block = exact[0 if index == 0 else 1 + self._place_of(index)].long()
            count = k[:, tokens].shape[1]
            self.exact_k[block, :, :count] = k[:, tokens]
            self.exact_v[block, :, :count] = v[:, tokens]
            if index and count == PAGE_TOKENS:
                self._tag(block[None], torch.tensor([index], device=exact.device), table[index : index + 1])

    def _place_of(self, page: Index) -> Index:
        return place_of(page, self.plan.ring_blocks)

    def _open_tokens(self, exact: Tensor, index: int, before: Ring | None) -> tuple[Tensor, Tensor]:
        if index == 0:
            return self.exact_k[exact[0].long()], self.exact_v[exact[0].long()]
        assert before is not None  # there is a ring where there was a token
        return before.k[0, self._place_of(index)], before.v[0, self._place_of(index)]

    def _encode(self, k: Tensor, v: Tensor, page_ids: Tensor) -> None:
        """``k v [n, G, 64, D]`` become pages ``page_ids [n]``; each that the format cannot hold is marked."""
        ids = page_ids.long()
        in_a_row = [x.transpose(0, 1).flatten(1, 2).contiguous() for x in (k, v)]
        try:
            self.pool[ids] = api.encode(self.codec, in_a_row[0], in_a_row[1])
        except FormatError:
            if len(ids) == 1:
                self.pool[ids] = 0
                self.marks[ids] = MARK
            else:
                for one in zip(k.split(1), v.split(1), ids.split(1), strict=True):
                    self._encode(*one)

    def _tag(self, blocks: Tensor, index: Tensor, page_ids: Tensor) -> None:
        self.tags[blocks] = torch.stack((index, self.digest(page_ids)), -1)

    def step(self, pages: Tensor, exact: Tensor, lengths: Tensor, k: Tensor, v: Tensor) -> tuple[LayerView, Tensor]:
        """:meth:`store_one`, :meth:`view` and :meth:`taint` in a few kernels that a CUDA graph can hold.

        They are the same whatever is due. ``pages [B, num_pages - 1] int32``: the tables without page 0;
        ``lengths [B] int32`` with the new token, 0 for no sequence.
        """
        from homkv.attention.triton import blocks  # Triton is optional

        memory = blocks.ExactBlocks(self.exact_k, self.exact_v, self.tags, self.marks, MARK, MULTIPLIER)
        return blocks.step(k, v, self.pool, memory, exact, lengths, pages, self.codec)

    # -- attending -----------------------------------------------------------------------------------------------------

    def ring(self, exact: Tensor, tokens: Tensor) -> Ring:
        """Copy the rings of B sequences that hold ``tokens [B]`` tokens; ``exact [B, 1 + R]`` block ids."""
        blocks = exact[:, 1:].long()
        return Ring(self.exact_k[blocks], self.exact_v[blocks], self.tags[blocks], tokens)

    def view(self, tables: Tensor, exact: Tensor, ring: Ring, new: int = 0) -> LayerView:
        """What attention reads: pages by reference, first tokens and window copied into one piece.

        ``tables [B, num_pages]``, ``exact [B, 1 + R]``. ``new``: 1 if the newest of the tokens is the one that attends.
        It joins the window that was there before it, 64 exact tokens or more, and a page is read as a page from the
        next token on, as in homkv's own cache.
        """
        tokens, rows = ring.tokens.long(), torch.arange(exact.shape[0], device=exact.device)
        open_page = (tokens - new).clamp(min=0) // PAGE_TOKENS
        window_page = open_page - self._held(tables, ring, open_page)
        steps = torch.arange(self.plan.ring_blocks, device=exact.device)
        order = self._place_of(window_page.unsqueeze(1) + steps)
        parts = []
        for first, blocks in ((self.exact_k, ring.k), (self.exact_v, ring.v)):
            window = blocks[rows.unsqueeze(1), order]
            in_order = torch.cat((first[exact[:, 0].long()].unsqueeze(1), window), 1)
            parts.append(in_order.transpose(1, 2).flatten(2, 3).contiguous())
        num_exact = tokens.clamp(max=PAGE_TOKENS) + torch.where(open_page > 0, tokens - PAGE_TOKENS * window_page, 0)
        return LayerView(
            pool=self.pool,
            page_table=tables[:, 1:].to(torch.int32).contiguous(),
            num_pages=(window_page - 1).clamp(min=0).to(torch.int32),
            exact_k=parts[0],
            exact_v=parts[1],
            exact_len=num_exact.to(torch.int32),
            slots=rows.to(torch.int32),
        )

    def taint(self, view: LayerView) -> Tensor:
        """NaN for each sequence of a view that reads a marked page, else 0: ``[B] float32``, to add to its output."""
        at = torch.arange(view.page_table.shape[1], device=view.page_table.device)
        marked = (self.marks[view.page_table.long()] == MARK) & (at < view.num_pages.unsqueeze(1))
        return torch.where(marked.any(1), torch.nan, 0.0)

    def _held(self, tables: Tensor, ring: Ring, open_page: Tensor) -> Tensor:
        """How many full pages before ``open_page [B]`` the ring holds, without a gap, by their tags: ``[B]``."""
        back = torch.arange(1, self.plan.ring_blocks, device=tables.device)
        pages = open_page.unsqueeze(1) - back
        ids = tables.gather(1, pages.clamp(min=0, max=tables.shape[1] - 1))
        tags = ring.tags.gather(1, self._place_of(pages).unsqueeze(-1).expand(-1, -1, 2))
        holds = (pages > 0) & (tags[..., 0] == pages) & (tags[..., 1] == self.digest(ids))
        return holds.long().cumprod(1).sum(1)
