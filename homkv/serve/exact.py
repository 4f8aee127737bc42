"""Decoding with 16-bit KV: the baseline, and what a decode instance with enough memory may hold."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from homkv.blocks import BlockPool
from homkv.errors import CapacityError, HomkvError
from homkv.formats import PageCodec
from homkv.hf import AttendingCache
from homkv.models import LoadedModel
from homkv.models.forward import last_logits
from homkv.seal import LayerContent
from homkv.serve.engine import Engine, PagedEngine, codec_for
from homkv.serve.evidence import collect
from homkv.serve.messages import Evidence


@dataclass
class _Row:
    """One sequence: keys and values of all layers in the model's dtype, ``[L, 2, G, capacity, D]``."""

    blocks: list[int]
    kv: Tensor
    num_tokens: list[int]  # per layer


class ExactBatch(AttendingCache):
    """One step of several sequences: the model's layers see one batch, attention each sequence's own keys."""

    def __init__(self, rows: list[_Row]) -> None:
        super().__init__(len(rows[0].num_tokens), None)
        self._rows = rows
        for layer in self.layers:
            layer.num_seen = max(row.num_tokens[layer.layer] for row in rows)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, real: Tensor | None) -> Tensor:
        """Store one token per sequence and attend: torch's own attention, one call per sequence."""
        assert real is None  # a step has no padding
        out = torch.empty_like(q)
        for i, row in enumerate(self._rows):
            at, stored = row.num_tokens[layer], row.kv[layer]
            stored[0, :, at], stored[1, :, at] = k[i, :, 0], v[i, :, 0]
            row.num_tokens[layer] = at + 1
            keys, values = stored[:, None, :, : at + 1].unbind(0)
            out[i] = scaled_dot_product_attention(q[i : i + 1], keys, values, scale=softmax_scale, enable_gqa=True)[0]
        return out


class ExactEngine(Engine):
    """KV is held in 16 bits, however it arrived, and attended to in the model's dtype. Shares no prefixes."""

    def __init__(self, loaded: LoadedModel, codec: PageCodec, max_tokens: int, max_sequences: int) -> None:
        super().__init__(loaded, codec)
        self._max_sequences = max_sequences
        self.num_blocks = codec.num_pages(max_tokens) + 1
        self._pool = BlockPool(self.num_blocks)
        self._rows: dict[int, _Row] = {}
        self._next = 0

    def blocks_for(self, num_tokens: int) -> int:
        """See Engine.blocks_for."""
        return self.codec.num_pages(num_tokens) + 1

    def reserve(self, num_tokens: int, keys: Sequence[bytes] = ()) -> tuple[int, int]:
        """See Engine.reserve."""
        if len(self._rows) == self._max_sequences:
            raise CapacityError(
                f"expected a free sequence slot, found all {self._max_sequences} taken; try again when one is done"
            )
        blocks = self._pool.allocate(self.blocks_for(num_tokens))
        model, capacity = self.loaded, len(blocks) * self.codec.page_tokens
        shape = (model.num_layers, 2, model.num_kv_heads, capacity, model.head_dim)
        self._next += 1
        self._rows[self._next] = _Row(blocks, torch.empty(shape, dtype=model.model.dtype), [0] * model.num_layers)
        return self._next, 0

    def load(self, seq: int, layer: int, content: LayerContent, first_page: int = 0) -> None:
        """See Engine.load."""
        row, num_tokens = self._rows[seq], content.num_tokens
        pages = self.codec.dense(content.pages.transpose(0, 1), row.kv.dtype)
        for i, (page, exact) in enumerate(zip(pages, (content.exact_k, content.exact_v), strict=True)):
            row.kv[layer, i, :, :num_tokens] = torch.cat((page, exact.to(page.dtype)), 1)
        row.num_tokens[layer] = num_tokens

    def publish(self, seq: int, keys: Sequence[bytes]) -> None:
        """Share nothing: there are no pages to refer to."""

    def evidence(self, seq: int) -> Evidence:
        """See Engine.evidence."""
        row = self._rows[seq]

        def stored(layer: int) -> tuple[Tensor, Tensor]:
            keys, values = row.kv[layer, :, None, :, : row.num_tokens[layer]].unbind(0)
            return keys, values

        def attend(layer: int, q: Tensor) -> Tensor:
            return scaled_dot_product_attention(q.to(row.kv.dtype), *stored(layer), enable_gqa=True)

        return collect(self.loaded, stored, attend)

    def step(self, seqs: list[int], tokens: list[int]) -> Tensor:
        """See Engine.step."""
        rows = [self._rows[s] for s in seqs]
        positions = torch.tensor([[row.num_tokens[0]] for row in rows])
        ids = torch.tensor(tokens).unsqueeze(1)
        return last_logits(self.loaded.model, ids, ExactBatch(rows), position_ids=positions)

    def free(self, seq: int) -> None:
        """See Engine.free."""
        self._pool.release(self._rows.pop(seq).blocks)

    def kv_bytes(self, seq: int) -> int:
        """Bytes in 16 bits, whatever the model computes in."""
        return self.loaded.num_kv_heads * sum(map(self.codec.kv_bytes, self._rows[seq].num_tokens))

    @property
    def num_free_blocks(self) -> int:
        """See Engine.num_free_blocks."""
        return self._pool.num_free

    def check(self) -> None:
        """See Engine.check."""
        self._pool.check([row.blocks for row in self._rows.values()])
        for seq, row in self._rows.items():
            if len(set(row.num_tokens)) > 1 and 0 not in row.num_tokens:
                raise HomkvError(f"expected all layers of sequence {seq} equally long, found {row.num_tokens}")


def make_engine(loaded: LoadedModel, kv_cache_dtype: str, max_tokens: int, max_sequences: int) -> Engine:
    """Build the engine of a format. Raises FormatError, or UnsupportedError for a head_dim not covered."""
    codec = codec_for(loaded, kv_cache_dtype)
    if codec.restored_on_arrival:
        return ExactEngine(loaded, codec, max_tokens, max_sequences)
    return PagedEngine(loaded, codec, max_tokens, max_sequences)
