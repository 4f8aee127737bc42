"""Many sequences of unequal length: ``sinks | pages | window`` of every layer, in one pool of pages.

Prefill appends whole prompts, decode appends token by token, the wire loads what another instance
encoded; all three leave the same bytes. A page is written once, when ``page_tokens`` tokens have left the
window, and never again; so sequences can share pages by reference.
"""

import numpy as np
import torch
from torch import Tensor

from homkv.attention import api
from homkv.attention.view import LayerView
from homkv.digests import PageDigests
from homkv.errors import CapacityError, FormatError, HomkvError, ShapeError, UnsupportedError
from homkv.formats.base import PageCodec
from homkv.seal import LayerContent, check_status, seal, to_exact
from homkv.sequences import Sequence, SequenceTable
from homkv.upload import Uploader, to_device


class PagedCache(SequenceTable):
    """Compressed KV of up to ``max_sequences`` sequences.

    ``num_blocks``: pages per layer and kv head, shared by all sequences. ``exact_dtype``: of sinks and window.
    ``impl``: who encodes and attends; None takes the format's first (see homkv.attention.api).
    ``device``: where pages, sinks and windows lie and attention runs; counters stay on the host.

    On a GPU nothing waits for the device at every layer: values that cannot be stored are noticed behind the last
    layer of a forward pass, which then raises FormatError, and their sequences refuse everything but ``free``.
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
        device: torch.device | str = "cpu",
    ) -> None:
        self.device = torch.empty(0, device=device).device  # with its index
        self.num_kv_heads, self.exact_dtype = num_kv_heads, exact_dtype
        self.impl = api.resolve_impl(codec, impl, self.device)
        self.codecs = [codec.at_layer(layer, num_layers) for layer in range(num_layers)]
        super().__init__(codec, num_layers, num_blocks, max_sequences)
        self._pools = [
            self._allocate((max(num_blocks, 1), num_kv_heads, c.page_bytes), torch.uint8) for c in self.codecs
        ]
        exact_shape = (max_sequences, num_kv_heads, codec.num_sinks + codec.max_window, codec.head_dim)
        self._exact_k, self._exact_v = (
            [self._allocate(exact_shape, exact_dtype) for _ in range(num_layers)] for _ in "kv"
        )
        self.status = torch.zeros(1, dtype=torch.int32, device=self.device)  # set where a value could not be stored
        self._status = None if self.device.type == "cpu" else self.status  # for calls that raise unless given one
        largest = max((c.page_bytes for c in self.codecs), default=0)
        self._digests = PageDigests(num_layers, max(num_blocks, 1), num_kv_heads * largest, self.device)
        self._upload = Uploader(self.device)

    def _allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """One layer's buffer."""
        try:
            return torch.empty(shape, dtype=dtype, device=self.device)
        except torch.OutOfMemoryError as error:
            raise CapacityError(
                f"expected memory for {self.num_layers} layers of about {list(shape)}, found too little on "
                f"{self.device}; "
                "build the cache for fewer or shorter sequences (max_tokens)"
            ) from error

    def fork(self, seq_id: int) -> int:
        """Open a copy that shares all pages with ``seq_id`` and continues on its own.

        Raises CapacityError if no slot is free, HomkvError in the middle of a forward pass (unequal layers).
        """
        new_id = super().fork(seq_id)
        source, copy = self._sequence(seq_id).slot, self._sequence(new_id).slot
        for buffers in (self._exact_k, self._exact_v):
            for buffer in buffers:
                buffer[copy] = buffer[source]
        return new_id

    def kv_bytes(self, seq_id: int) -> int:
        """Bytes this sequence occupies in all layers: pages, sinks and window."""
        n = [self.num_tokens(seq_id, layer) for layer in range(self.num_layers)]
        width = self.exact_dtype.itemsize
        return self.num_kv_heads * sum(c.kv_bytes(tokens, width) for c, tokens in zip(self.codecs, n, strict=True))

    @property
    def allocated_bytes(self) -> int:
        """Bytes of all pools, sinks and windows, whether sequences use them or not."""
        return sum(x.nbytes for x in (*self._pools, *self._exact_k, *self._exact_v))

    # -- tokens ------------------------------------------------------------------------------------------------

    @torch.no_grad()  # what is stored must not keep the graphs of all tokens alive
    def append(self, layer: int, seq_id: int, k: Tensor, v: Tensor) -> None:
        """Store tokens ``k v [G, T, D]`` behind what the layer holds, sealing pages that are due.

        Token by token or in one go: the same bytes. Raises ShapeError, FormatError or CapacityError; nothing
        is stored then.
        """
        sequence = self._sequence(seq_id)
        self._check_heads(k, v)
        self._reserve([(sequence, self._pages_after(layer, seq_id, k.shape[1]))])
        content = self._extended(layer, sequence, k, v)
        check_status(self.status)
        self._commit(layer, sequence, content)

    def _store(self, layer: int, sequence: Sequence, k: Tensor, v: Tensor) -> None:
        """Like :meth:`append` for tokens that were checked and have their room; a GPU's status is read later."""
        self._commit(layer, sequence, self._extended(layer, sequence, k, v))

    def _extended(self, layer: int, sequence: Sequence, k: Tensor, v: Tensor) -> LayerContent:
        """New pages and all exact tokens of a layer to which ``k v [G, T, D]`` were added. Changes nothing."""
        slot, status = sequence.slot, self._status
        pages, held = self._counts(layer, sequence)
        k, v = to_exact(k, self.exact_dtype, "keys", status), to_exact(v, self.exact_dtype, "values", status)
        k = torch.cat((self._exact_k[layer][slot, :, :held], k), 1)
        v = torch.cat((self._exact_v[layer][slot, :, :held], v), 1)
        return seal(self.codecs[layer], k, v, pages, self.impl, status)

    def _commit(self, layer: int, sequence: Sequence, content: LayerContent) -> None:
        """Write the content's pages behind those that are there and replace the exact tokens."""
        count, held = content.pages.shape[0], content.exact_k.shape[1]
        if count:
            first_page, _ = self._counts(layer, sequence)
            blocks = self._index(sequence.blocks[first_page : first_page + count])
            self._pools[layer][blocks] = content.pages
            self._digests.record(layer, self._pools[layer], blocks)
            self._num_pages[layer, sequence.slot] = first_page + count
        self._exact_k[layer][sequence.slot, :, :held] = content.exact_k
        self._exact_v[layer][sequence.slot, :, :held] = content.exact_v
        self._exact_len[layer, sequence.slot] = held

    def _index(self, blocks: list[int]) -> Tensor:
        return to_device(torch.tensor(blocks, dtype=torch.int64), self.device)

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
        return self._view(layer, self._slots(seq_ids), extra)

    def _view(self, layer: int, slots: np.ndarray, extra: int) -> LayerView:
        counts = self._num_pages[layer, slots]
        widest = self._upload.width(max(counts.max(initial=0), 1))
        table, num_pages, exact_len, slots_there = self._upload(
            np.ascontiguousarray(self._page_table[slots, :widest]),
            counts,
            self._exact_len[layer, slots] + np.int32(extra),
            slots,
        )
        return LayerView(
            pool=self._pools[layer],
            page_table=table,
            num_pages=num_pages,
            exact_k=self._exact_k[layer],
            exact_v=self._exact_v[layer],
            exact_len=exact_len,
            slots=slots_there,
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

        ``real [B, T] bool``, best on the host: False marks padding, which is neither stored nor attended to (its output
        is zero). Returns ``[B, H, T, D]`` in q's dtype. New tokens attend to each other exactly and to older ones on
        their pages; pages that become due are sealed after the attention. Raises CapacityError before anything is
        stored; FormatError for values that cannot be stored (free the sequences of the batch then).
        """
        self._check_batch(seq_ids, q, k, v)
        real = None if real is None else real.cpu()
        if real is not None and bool(real.all()):
            real = None
        lengths = [q.shape[2]] * len(seq_ids) if real is None else real.sum(1).tolist()
        new_tokens = zip(seq_ids, lengths, strict=True)
        self._reserve([(self._sequence(s), self._pages_after(layer, s, n)) for s, n in new_tokens])
        if q.shape[2] == 1 and real is None:
            out = self._attend_one(layer, seq_ids, q, k, v, softmax_scale)
        elif real is None and len({self.num_tokens(s, layer) > 0 for s in seq_ids}) == 1:
            out = self._attend_chunk(layer, seq_ids, q, k, v, softmax_scale)
        else:
            out = torch.zeros_like(q)
            for i, seq_id in enumerate(seq_ids):
                at = slice(None) if real is None else self._real_columns(real[i])
                one = q[i : i + 1, :, at], k[i : i + 1, :, at], v[i : i + 1, :, at]
                if lengths[i]:
                    out[i, :, at] = self._attend_chunk(layer, [seq_id], *one, softmax_scale)[0]
        if layer == self.num_layers - 1:
            self.check_values(seq_ids)
        return out

    def _real_columns(self, real: Tensor) -> slice | Tensor:
        """Where ``real [T]`` is set: as a slice if in one piece, for which nothing has to be uploaded."""
        at = real.nonzero().flatten()
        first, count = (int(at[0]), len(at)) if len(at) else (0, 0)
        if count == 0 or int(at[-1]) - first + 1 == count:
            return slice(first, first + count)
        return to_device(at, self.device)

    def check_values(self, seq_ids: list[int]) -> None:
        """Raise FormatError if values were met that cannot be stored but have been; gives these sequences up."""
        try:
            check_status(self.status)
        except FormatError:
            self._broken.update(seq_ids)
            raise

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
        self._refuse_broken(seq_ids)

    def _attend_one(
        self, layer: int, seq_ids: list[int], q: Tensor, k: Tensor, v: Tensor, softmax_scale: float
    ) -> Tensor:
        """One token per sequence: written behind the window, attended in place, then committed."""
        new_k = to_exact(k[:, :, 0], self.exact_dtype, "keys", self._status)
        new_v = to_exact(v[:, :, 0], self.exact_dtype, "values", self._status)
        full = self.codec.num_sinks + self.codec.max_window
        slots = self._slots(seq_ids)
        for seq_id, slot in zip(seq_ids, slots, strict=True):
            if self._exact_len[layer, slot] == full:
                self._settle(layer, seq_id)  # sealing failed before, and fails with the same error now
        view = self._view(layer, slots, extra=1)
        rows, at = view.slots.long(), view.exact_len.long() - 1
        self._exact_k[layer][rows, :, at] = new_k
        self._exact_v[layer][rows, :, at] = new_v
        o, _ = api.attend(q, view, self.codecs[layer], softmax_scale, impl=self.impl)
        self._exact_len[layer, slots] += 1
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
        sequence, codec = self._sequence(seq_id), self.codecs[layer]
        slot, sinks = sequence.slot, codec.num_sinks
        pages, held = self._counts(layer, sequence)
        position = sinks + pages * codec.page_tokens
        window = self._exact_v[layer][slot, :, sinks:held]
        requantized = codec.requantize_window(window, position)
        if requantized is not window:
            window.copy_(requantized)
        if held == sinks + codec.max_window:
            empty = self._exact_k[layer][slot, :, :0]
            self._store(layer, sequence, empty, empty)

    def _attend_chunk(
        self, layer: int, seq_ids: list[int], q: Tensor, k: Tensor, v: Tensor, softmax_scale: float
    ) -> Tensor:
        """T tokens of each sequence, all of them empty or none: exact triangle, merged with what is stored."""
        codec = self.codecs[layer]
        if self.num_tokens(seq_ids[0], layer) == 0:
            o = api.prefill(codec, q, k, v, softmax_scale, impl=self.impl)
        elif api.computes_quantized_prefill(codec):
            raise UnsupportedError(f"expected the whole prompt at once for {codec.name}, found a later chunk of it")
        else:
            o = api.extend(q, k, v, self.view(layer, seq_ids), codec, softmax_scale, impl=self.impl)
        for i, seq_id in enumerate(seq_ids):
            self._store(layer, self._sequence(seq_id), k[i], v[i])
        return o

    # -- decoding outside ---------------------------------------------------------------------------------------

    def open_views(self, seq_ids: list[int]) -> list[LayerView]:
        """One view per layer for a decode loop that keeps its own counters, as homkv.seal.append_one advances them.

        The page table holds the reserved blocks as well, so the loop can go as far as ``new_sequence(num_tokens)``
        made room. Page table and counters are copies that all layers share; until :meth:`close_views` takes them back,
        the cache must not be used with these sequences.
        """
        sequences = [self._sequence(s) for s in seq_ids]
        slots = [s.slot for s in sequences]
        widest = self._upload.width(max([1, *(len(s.blocks) for s in sequences)]))
        first = self.view(0, seq_ids)
        table = torch.zeros(len(slots), widest, dtype=torch.int32)
        table[:, : self._page_table.shape[1]] = torch.from_numpy(self._page_table[slots, :widest])
        shared = {
            "page_table": table.to(self.device),
            "num_pages": first.num_pages.clone(),
            "exact_len": first.exact_len.clone(),
            "slots": first.slots.clone(),
        }
        parts = zip(self._pools, self._exact_k, self._exact_v, strict=True)
        return [LayerView(pool=pool, exact_k=k, exact_v=v, **shared) for pool, k, v in parts]

    def close_views(self, seq_ids: list[int], view: LayerView) -> None:
        """Take over what a decode loop stored; ``view``: any of its views. Raises FormatError for unstorable values."""
        counts = zip(seq_ids, view.num_pages.tolist(), view.exact_len.tolist(), strict=True)
        for seq_id, num_pages, exact_len in counts:
            sequence = self._sequence(seq_id)
            for layer in range(self.num_layers):
                sealed = self._index(sequence.blocks[self._counts(layer, sequence)[0] : num_pages])
                self._digests.record(layer, self._pools[layer], sealed)
            self._num_pages[:, sequence.slot], self._exact_len[:, sequence.slot] = num_pages, exact_len
            for layer in range(self.num_layers):
                self._settle(layer, seq_id)
        self.check_values(seq_ids)

    # -- transfer and integrity --------------------------------------------------------------------------------

    def export_layer(self, layer: int, seq_id: int) -> LayerContent:
        """Copy of one layer's stored bytes on the host, for the wire."""
        self._refuse_broken([seq_id])
        sequence = self._sequence(seq_id)
        pages, held = self._counts(layer, sequence)
        return LayerContent(
            num_tokens=pages * self.codec.page_tokens + held,
            pages=self._pools[layer][self._index(sequence.blocks[:pages])].cpu(),
            exact_k=self._exact_k[layer][sequence.slot, :, :held].to("cpu", copy=True),
            exact_v=self._exact_v[layer][sequence.slot, :, :held].to("cpu", copy=True),
        )

    def load_layer(self, layer: int, seq_id: int, content: LayerContent, first_page: int = 0) -> None:
        """Store verified content, on any device, in an empty layer. Raises ShapeError, HomkvError, CapacityError.

        ``content.pages`` begin with ``first_page``; those before it are blocks that the sequence shares.
        """
        sequence = self._sequence(seq_id)
        if self.num_tokens(seq_id, layer):
            raise HomkvError(f"expected layer {layer} of sequence {seq_id} to be empty, found tokens in it")
        codec = self.codecs[layer]
        n = codec.num_pages(content.num_tokens) - first_page
        pages = (n, self.num_kv_heads, codec.page_bytes)
        exact = (self.num_kv_heads, codec.num_exact(content.num_tokens), codec.head_dim)
        found = (tuple(content.pages.shape), tuple(content.exact_k.shape), tuple(content.exact_v.shape))
        dtypes = (content.pages.dtype, content.exact_k.dtype, content.exact_v.dtype)
        if found != (pages, exact, exact) or dtypes != (torch.uint8, self.exact_dtype, self.exact_dtype):
            raise ShapeError(
                f"expected uint8 pages {pages} and exact tokens {exact} in {self.exact_dtype}, found {found} in "
                f"{dtypes}; both sides must use the same format and model"
            )
        self._reserve([(sequence, first_page + n)])
        self._num_pages[layer, sequence.slot] = first_page
        parts = (x.to(self.device) for x in (content.pages, content.exact_k, content.exact_v))
        self._commit(layer, sequence, LayerContent(content.num_tokens, *parts))

    def changed_blocks(self, blocks: list[int]) -> set[int]:
        """Which of these sealed blocks differ, in any layer, from what was stored."""
        index = self._index(blocks)
        return {b for layer, pool in enumerate(self._pools) for b in self._digests.changed(layer, pool, index)}

    def check(self) -> None:
        """Raise HomkvError unless reference counts, lengths and every page's digest are what they must be."""
        self._check_books()
        check_status(self.status)
        for seq_id, sequence in self._sequences.items():
            for layer in range(self.num_layers):
                pages, _ = self._counts(layer, sequence)
                changed = self._digests.changed(layer, self._pools[layer], self._index(sequence.blocks[:pages]))
                if changed:
                    raise HomkvError(
                        f"page block {changed[0]} of layer {layer} changed after it was sealed; free sequence {seq_id} "
                        "and recompute it"
                    )
