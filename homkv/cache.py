"""Many sequences of unequal length: ``sinks | pages | window`` of every layer, in one pool of pages.

Prefill appends whole prompts, decode appends token by token, the wire loads what another instance
encoded; all three leave the same bytes. A page is written once, when ``page_tokens`` tokens have left the
window, and never again; so sequences can share pages by reference.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
import xxhash
from torch import Tensor

from homkv.attention import api
from homkv.attention.prefill import causal_partial
from homkv.attention.reference import merge_partials
from homkv.attention.view import LayerView
from homkv.blocks import BlockPool
from homkv.errors import CapacityError, FormatError, HomkvError, ShapeError, UnsupportedError
from homkv.formats.base import PageCodec
from homkv.seal import LayerContent, seal, to_exact


@dataclass
class _Sequence:
    slot: int
    blocks: list[int] = field(default_factory=list)  # at least as many as the longest layer has pages


class PagedCache:
    """Compressed KV of up to ``max_sequences`` sequences.

    ``num_blocks``: pages per layer and kv head, shared by all sequences. ``exact_dtype``: of sinks and window.
    ``impl``: who encodes and attends; None takes the format's first (see homkv.attention.api).
    """

    def __init__(
        self,
        codec: PageCodec,
        *,
        num_layers: int,
        num_kv_heads: int,
        num_blocks: int,
        max_sequences: int = 1,
        exact_dtype: torch.dtype = torch.float16,
        impl: str | None = None,
    ) -> None:
        self.codec, self.exact_dtype, self.impl = codec, exact_dtype, api.resolve_impl(codec, impl)
        self.num_layers, self.num_kv_heads, self.max_sequences = num_layers, num_kv_heads, max_sequences
        page_shape = (max(num_blocks, 1), num_kv_heads, codec.page_bytes)
        self._pools = [torch.empty(page_shape, dtype=torch.uint8) for _ in range(num_layers)]
        exact_shape = (max_sequences, num_kv_heads, codec.num_sinks + codec.max_window, codec.head_dim)
        self._exact_k = [torch.empty(exact_shape, dtype=exact_dtype) for _ in range(num_layers)]
        self._exact_v = [torch.empty(exact_shape, dtype=exact_dtype) for _ in range(num_layers)]
        # Counters in numpy: reading and writing single numbers of a tensor costs more than a small attention.
        self._page_table = np.zeros((max_sequences, max(num_blocks, 1)), np.int32)
        self._num_pages = np.zeros((num_layers, max_sequences), np.int32)
        self._exact_len = np.zeros((num_layers, max_sequences), np.int32)
        self._digests: dict[tuple[int, int], int] = {}
        self._blocks = BlockPool(num_blocks)
        self._sequences: dict[int, _Sequence] = {}
        self._free_slots = list(range(max_sequences - 1, -1, -1))
        self._next_id = 0

    # -- sequences ---------------------------------------------------------------------------------------------

    def new_sequence(self, num_tokens: int = 0) -> int:
        """Open an empty sequence with room reserved for ``num_tokens``; returns its id, which is never reused.

        Raises CapacityError if no slot or not enough blocks are free; nothing changes then.
        """
        if not self._free_slots:
            raise CapacityError(
                f"expected a free sequence slot, found all {self.max_sequences} taken; free a sequence first"
            )
        blocks = self._blocks.allocate(self.codec.num_pages(num_tokens))
        sequence = _Sequence(self._free_slots.pop())
        self._hold(sequence, blocks)
        self._num_pages[:, sequence.slot] = 0
        self._exact_len[:, sequence.slot] = 0
        self._next_id += 1
        self._sequences[self._next_id] = sequence
        return self._next_id

    def fork(self, seq_id: int) -> int:
        """Open a copy that shares all pages with ``seq_id`` and continues on its own.

        Raises CapacityError if no slot is free, HomkvError in the middle of a forward pass (unequal layers).
        """
        source = self._sequence(seq_id)
        pages = self._num_pages[:, source.slot]
        if len(set(pages.tolist())) > 1 or len(set(self._exact_len[:, source.slot].tolist())) > 1:
            raise HomkvError("expected all layers at the same length, found a forward pass in progress; fork after it")
        new_id = self.new_sequence()
        copy = self._sequence(new_id)
        shared = source.blocks[: int(pages[0]) if self.num_layers else 0]
        self._blocks.share(shared)
        self._hold(copy, shared)
        self._num_pages[:, copy.slot] = pages
        self._exact_len[:, copy.slot] = self._exact_len[:, source.slot]
        for buffers in (self._exact_k, self._exact_v):
            for buffer in buffers:
                buffer[copy.slot] = buffer[source.slot]
        return new_id

    def free(self, seq_id: int) -> None:
        """Give back the sequence's slot and its references to pages. Raises HomkvError if it was freed before."""
        sequence = self._sequence(seq_id)
        del self._sequences[seq_id]
        self._blocks.release(sequence.blocks)
        self._free_slots.append(sequence.slot)

    def num_tokens(self, seq_id: int, layer: int = 0) -> int:
        """Tokens stored in one layer of a sequence."""
        slot = self._sequence(seq_id).slot
        return int(self._num_pages[layer, slot]) * self.codec.page_tokens + int(self._exact_len[layer, slot])

    @property
    def num_free_blocks(self) -> int:
        """Blocks that no sequence holds or has reserved."""
        return self._blocks.num_free

    def kv_bytes(self, seq_id: int) -> int:
        """Bytes this sequence occupies in all layers: pages, sinks and window."""
        n = [self.num_tokens(seq_id, layer) for layer in range(self.num_layers)]
        width = self.exact_dtype.itemsize
        return self.num_kv_heads * sum(self.codec.kv_bytes(tokens, width) for tokens in n)

    def _sequence(self, seq_id: int) -> _Sequence:
        if seq_id not in self._sequences:
            raise HomkvError(f"expected a live sequence id, found {seq_id}; it was freed or never opened")
        return self._sequences[seq_id]

    def _hold(self, sequence: _Sequence, blocks: list[int]) -> None:
        at = len(sequence.blocks)
        self._page_table[sequence.slot, at : at + len(blocks)] = blocks
        sequence.blocks = sequence.blocks + blocks

    def _reserve(self, growth: list[tuple[_Sequence, int]]) -> None:
        """Give each sequence as many blocks as stated, or raise CapacityError before any changes."""
        missing = [(s, pages - len(s.blocks)) for s, pages in growth if pages > len(s.blocks)]
        self._blocks.require(sum(count for _, count in missing))
        for sequence, count in missing:
            self._hold(sequence, self._blocks.allocate(count))

    # -- tokens ------------------------------------------------------------------------------------------------

    @torch.no_grad()  # what is stored must not keep the graphs of all tokens alive
    def append(self, layer: int, seq_id: int, k: Tensor, v: Tensor) -> None:
        """Store tokens ``k v [G, T, D]`` behind what the layer holds, sealing pages that are due.

        Token by token or in one go: the same bytes. Raises ShapeError, FormatError or CapacityError; nothing
        is stored then.
        """
        sequence = self._sequence(seq_id)
        self._check_heads(k, v)
        slot, codec = sequence.slot, self.codec
        held, pages = int(self._exact_len[layer, slot]), int(self._num_pages[layer, slot])
        self._reserve([(sequence, codec.num_pages(pages * codec.page_tokens + held + k.shape[1]))])
        k = torch.cat((self._exact_k[layer][slot, :, :held], to_exact(k, self.exact_dtype, "keys")), 1)
        v = torch.cat((self._exact_v[layer][slot, :, :held], to_exact(v, self.exact_dtype, "values")), 1)
        self._commit(layer, sequence, pages, seal(codec, k, v, pages, self.impl))

    def _commit(self, layer: int, sequence: _Sequence, first_page: int, content: LayerContent) -> None:
        """Write new pages behind ``first_page`` and replace the exact tokens."""
        count, held = content.pages.shape[0], content.exact_k.shape[1]
        if count:
            blocks = sequence.blocks[first_page : first_page + count]
            self._pools[layer][torch.tensor(blocks)] = content.pages
            for block in blocks:
                self._digests[layer, block] = self._digest(layer, block)
            self._num_pages[layer, sequence.slot] = first_page + count
        self._exact_k[layer][sequence.slot, :, :held] = content.exact_k
        self._exact_v[layer][sequence.slot, :, :held] = content.exact_v
        self._exact_len[layer, sequence.slot] = held

    def _check_heads(self, k: Tensor, v: Tensor) -> None:
        shape = (self.num_kv_heads, k.shape[1] if k.ndim == 3 else -1, self.codec.head_dim)
        if tuple(k.shape) != shape or tuple(v.shape) != shape:
            raise ShapeError(
                f"expected keys and values [G={self.num_kv_heads}, T, D={self.codec.head_dim}], found {tuple(k.shape)} "
                f"and {tuple(v.shape)}; nothing was stored"
            )

    # -- attention ---------------------------------------------------------------------------------------------

    def view(self, layer: int, seq_ids: list[int], extra: int = 0) -> LayerView:
        """What attention reads: pages by reference, exact tokens in place, ``extra`` uncommitted ones included."""
        slots = np.array([self._sequence(s).slot for s in seq_ids], np.int32)
        num_pages = self._num_pages[layer, slots]
        widest = max(num_pages.max(initial=0), 1)
        return LayerView(
            pool=self._pools[layer],
            page_table=torch.from_numpy(np.ascontiguousarray(self._page_table[slots, :widest])),
            num_pages=torch.from_numpy(num_pages),
            exact_k=self._exact_k[layer],
            exact_v=self._exact_v[layer],
            exact_len=torch.from_numpy(self._exact_len[layer, slots] + np.int32(extra)),
            slots=torch.from_numpy(slots),
        )

    @torch.no_grad()
    def attend(
        self,
        layer: int,
        seq_ids: list[int],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        softmax_scale: float,
        real: Tensor | None = None,
    ) -> Tensor:
        """Append T new tokens to each sequence and attend causally: ``q [B, H, T, D]``, ``k v [B, G, T, D]``.

        ``real [B, T] bool``: False marks padding, which is neither stored nor attended to (its output is zero).
        Returns ``[B, H, T, D]`` in q's dtype. New tokens attend to each other exactly and to older ones on their
        pages; pages that become due are sealed after the attention. Raises CapacityError before anything is
        stored; FormatError for values that cannot be stored (free the sequences of the batch then).
        """
        self._check_batch(seq_ids, q, k, v)
        if real is not None and bool(real.all()):
            real = None
        lengths = [q.shape[2]] * len(seq_ids) if real is None else real.sum(1).tolist()
        new_tokens = zip(seq_ids, lengths, strict=True)
        self._reserve([(self._sequence(s), self._pages_after(layer, s, n)) for s, n in new_tokens])
        if q.shape[2] == 1 and real is None:
            return self._attend_one(layer, seq_ids, q, k, v, softmax_scale)
        out = torch.zeros_like(q)
        for i, seq_id in enumerate(seq_ids):
            at = slice(None) if real is None else real[i]
            if lengths[i]:
                out[i, :, at] = self._attend_chunk(layer, seq_id, q[i, :, at], k[i, :, at], v[i, :, at], softmax_scale)
        return out

    def _check_batch(self, seq_ids: list[int], q: Tensor, k: Tensor, v: Tensor) -> None:
        batch, groups, dim = len(seq_ids), self.num_kv_heads, self.codec.head_dim
        kv = (batch, groups, q.shape[2] if q.ndim == 4 else -1, dim)
        q_fits = q.ndim == 4 and q.shape[0] == batch and q.shape[1] % groups == 0 and q.shape[3] == dim
        if not q_fits or tuple(k.shape) != kv or tuple(v.shape) != kv:
            raise ShapeError(
                f"expected q [B={batch}, H multiple of {groups}, T, D={dim}] and k v [B, G={groups}, T, D], found "
                f"{tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}; nothing was stored"
            )
        if len(set(seq_ids)) != batch:
            raise HomkvError(f"expected every sequence once in a batch, found {seq_ids}; fork what continues twice")

    def _pages_after(self, layer: int, seq_id: int, new_tokens: int) -> int:
        return self.codec.num_pages(self.num_tokens(seq_id, layer) + new_tokens)

    def _attend_one(
        self, layer: int, seq_ids: list[int], q: Tensor, k: Tensor, v: Tensor, softmax_scale: float
    ) -> Tensor:
        """One token per sequence: written behind the window, attended in place, then committed."""
        new_k, new_v = to_exact(k[:, :, 0], self.exact_dtype, "keys"), to_exact(v[:, :, 0], self.exact_dtype, "values")
        full = self.codec.num_sinks + self.codec.max_window
        for seq_id in seq_ids:
            if self._exact_len[layer, self._sequence(seq_id).slot] == full:
                self._settle(layer, seq_id)  # sealing failed before, and fails with the same error now
        view = self.view(layer, seq_ids, extra=1)
        slots, at = view.slots.long(), view.exact_len.long() - 1
        self._exact_k[layer][slots, :, at] = new_k
        self._exact_v[layer][slots, :, at] = new_v
        o, _ = api.attend(q, view, self.codec, softmax_scale, impl=self.impl)
        self._exact_len[layer, slots.numpy()] += 1
        failures = []
        for seq_id in seq_ids:
            try:
                self._settle(layer, seq_id)
            except FormatError as error:  # one sequence's values must not keep the others from being sealed
                failures.append(error)
        if failures:
            raise failures[0]
        return o.to(q.dtype)

    def _settle(self, layer: int, seq_id: int) -> None:
        """Bring a layer to its resting state after one token: requantize an open block, seal a full one."""
        sequence, codec = self._sequence(seq_id), self.codec
        slot, sinks = sequence.slot, codec.num_sinks
        held, pages = int(self._exact_len[layer, slot]), int(self._num_pages[layer, slot])
        position = sinks + pages * codec.page_tokens
        window = self._exact_v[layer][slot, :, sinks:held]
        requantized = codec.requantize_window(window, position)
        if requantized is not window:
            window.copy_(requantized)
        if held == sinks + codec.max_window:
            empty = self._exact_k[layer][slot, :, :0]
            self.append(layer, seq_id, empty, empty)

    def _attend_chunk(self, layer: int, seq_id: int, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> Tensor:
        """T tokens of one sequence, ``q [H, T, D]``: exact triangle, merged with attention over what is stored."""
        if self.num_tokens(seq_id, layer) == 0:
            o = api.prefill(self.codec, q[None], k[None], v[None], softmax_scale)[0]
        elif api.computes_quantized_prefill(self.codec):
            raise UnsupportedError(
                f"expected the whole prompt at once for {self.codec.name}, found a later chunk of it"
            )
        else:
            old, old_lse = api.attend(q[None], self.view(layer, [seq_id]), self.codec, softmax_scale, impl=self.impl)
            new, new_lse = causal_partial(q[None], k[None], v[None], softmax_scale)
            o = merge_partials(old, old_lse, new, new_lse)[0][0].to(q.dtype)
        self.append(layer, seq_id, k, v)
        return o

    # -- transfer and integrity --------------------------------------------------------------------------------

    def export_layer(self, layer: int, seq_id: int) -> LayerContent:
        """Copy of one layer's stored bytes, for the wire."""
        sequence = self._sequence(seq_id)
        pages = int(self._num_pages[layer, sequence.slot])
        held = int(self._exact_len[layer, sequence.slot])
        blocks = torch.tensor(sequence.blocks[:pages], dtype=torch.long)
        return LayerContent(
            num_tokens=pages * self.codec.page_tokens + held,
            pages=self._pools[layer][blocks],
            exact_k=self._exact_k[layer][sequence.slot, :, :held].clone(),
            exact_v=self._exact_v[layer][sequence.slot, :, :held].clone(),
        )

    def load_layer(self, layer: int, seq_id: int, content: LayerContent) -> None:
        """Store verified content in an empty layer of a sequence. Raises ShapeError, HomkvError, CapacityError."""
        sequence = self._sequence(seq_id)
        if self.num_tokens(seq_id, layer):
            raise HomkvError(f"expected layer {layer} of sequence {seq_id} to be empty, found tokens in it")
        n = self.codec.num_pages(content.num_tokens)
        pages = (n, self.num_kv_heads, self.codec.page_bytes)
        exact = (self.num_kv_heads, self.codec.num_exact(content.num_tokens), self.codec.head_dim)
        found = (tuple(content.pages.shape), tuple(content.exact_k.shape), tuple(content.exact_v.shape))
        dtypes = (content.pages.dtype, content.exact_k.dtype, content.exact_v.dtype)
        if found != (pages, exact, exact) or dtypes != (torch.uint8, self.exact_dtype, self.exact_dtype):
            raise ShapeError(
                f"expected uint8 pages {pages} and exact tokens {exact} in {self.exact_dtype}, found {found} in "
                f"{dtypes}; both sides must use the same format and model"
            )
        self._reserve([(sequence, n)])
        self._commit(layer, sequence, 0, content)

    def check(self) -> None:
        """Raise HomkvError unless reference counts, lengths and every page's digest are what they must be."""
        self._blocks.check([s.blocks for s in self._sequences.values()])
        used = [s.slot for s in self._sequences.values()]
        if sorted(used + self._free_slots) != list(range(self.max_sequences)):
            raise HomkvError(f"expected every slot used once or free once, found used {used}, free {self._free_slots}")
        for seq_id, sequence in self._sequences.items():
            for layer in range(self.num_layers):
                pages, held = int(self._num_pages[layer, sequence.slot]), int(self._exact_len[layer, sequence.slot])
                if held != self.codec.num_exact(pages * self.codec.page_tokens + held):
                    raise HomkvError(f"layer {layer} of sequence {seq_id}: {held} exact tokens beside {pages} pages")
                for block in sequence.blocks[:pages]:
                    if self._digests[layer, block] != self._digest(layer, block):
                        raise HomkvError(
                            f"page block {block} of layer {layer} changed after it was sealed; free sequence {seq_id} "
                            "and recompute it"
                        )

    def _digest(self, layer: int, block: int) -> int:
        return xxhash.xxh3_64_intdigest(self._pools[layer][block].numpy().data)
