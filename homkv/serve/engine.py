"""What a decode instance computes with: one engine per format, all with the same few verbs."""

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from transformers import DynamicCache

from homkv.attention.api import computes_quantized_prefill
from homkv.blocks import BlockPool
from homkv.cache import PagedCache
from homkv.errors import UnsupportedError
from homkv.formats import PageCodec, make_codec
from homkv.formats.exact import ExactCodec
from homkv.hf import Attachment, KVCache
from homkv.models import LoadedModel
from homkv.seal import LayerContent
from homkv.serve.messages import Sampling
from homkv.transport.wire import Expectation

EXACT_DTYPE = torch.float16  # of sinks and window on the wire and in the cache


def expectation(loaded: LoadedModel, codec: PageCodec, exact_dtype: torch.dtype = EXACT_DTYPE) -> Expectation:
    """What prefill and decode must agree on for this model and format."""
    return Expectation(
        format=codec.name,
        layout_id=codec.layout_id,
        model=loaded.fingerprint,
        num_layers=loaded.num_layers,
        num_kv_heads=loaded.num_kv_heads,
        head_dim=loaded.head_dim,
        page_bytes=codec.page_bytes,
        exact_dtype=str(exact_dtype).removeprefix("torch."),  # type: ignore[arg-type]  # the wire checks the name
    )


def sample(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Choose a token from ``logits [V]``: greedy at temperature 0, else nucleus sampling."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    p, order = torch.softmax(logits.double() / sampling.temperature, -1).sort(descending=True)
    p[p.cumsum(-1) - p >= sampling.top_p] = 0  # the first token always stays
    return int(order[torch.multinomial(p, 1, generator=generator)])


class Engine(ABC):
    """Sequences of one format. ``seq`` is a handle from :meth:`reserve`, good until :meth:`free`."""

    def __init__(self, loaded: LoadedModel, codec: PageCodec) -> None:
        self.loaded, self.codec = loaded, codec

    def attention(self) -> AbstractContextManager[object]:
        """The context that steps must run in; entering it once for many steps is enough."""
        return nullcontext()

    @abstractmethod
    def reserve(self, num_tokens: int) -> int:
        """Set aside room for a sequence, or raise CapacityError with nothing changed."""

    @abstractmethod
    def load(self, seq: int, layer: int, content: LayerContent) -> None:
        """Store one verified layer."""

    @abstractmethod
    def step(self, seqs: list[int], tokens: list[int]) -> Tensor:
        """Feed one token to each sequence; returns logits ``[B, V]`` of the next."""

    @abstractmethod
    def free(self, seq: int) -> None:
        """Give the room back."""

    @abstractmethod
    def kv_bytes(self, seq: int) -> int:
        """Bytes of KV held for a sequence."""


class PagedEngine(Engine):
    """Decodes on the pages."""

    def __init__(self, loaded: LoadedModel, codec: PageCodec, max_tokens: int, max_sequences: int) -> None:
        super().__init__(loaded, codec)
        self.cache = PagedCache(
            codec,
            num_layers=loaded.num_layers,
            num_kv_heads=loaded.num_kv_heads,
            num_blocks=codec.num_pages(max_tokens) + 1,
            max_sequences=max_sequences,
            exact_dtype=EXACT_DTYPE,
        )

    def attention(self) -> AbstractContextManager[object]:
        """See Engine.attention."""
        return Attachment(self.loaded.model, self.codec, {})

    def reserve(self, num_tokens: int) -> int:
        """See Engine.reserve."""
        return self.cache.new_sequence(num_tokens)

    def load(self, seq: int, layer: int, content: LayerContent) -> None:
        """See Engine.load."""
        self.cache.load_layer(layer, seq, content)

    @torch.no_grad()
    def step(self, seqs: list[int], tokens: list[int]) -> Tensor:
        """See Engine.step. Sequences of unequal length share one pass."""
        positions = torch.tensor([[self.cache.num_tokens(s)] for s in seqs])
        cache = KVCache.adopt(self.cache, seqs)
        ids = torch.tensor(tokens).unsqueeze(1)
        out = self.loaded.model(ids, position_ids=positions, past_key_values=cache, use_cache=True)
        logits: Tensor = out.logits[:, -1].float()
        return logits

    def free(self, seq: int) -> None:
        """See Engine.free."""
        self.cache.free(seq)

    def kv_bytes(self, seq: int) -> int:
        """See Engine.kv_bytes."""
        return self.cache.kv_bytes(seq)


class ExactEngine(Engine):
    """The baseline: KV arrives in 16 bits and is attended to by the model's own attention."""

    def __init__(self, loaded: LoadedModel, codec: ExactCodec, max_tokens: int, max_sequences: int) -> None:
        super().__init__(loaded, codec)
        self._pool = BlockPool(codec.num_pages(max_tokens) + 1)
        self._blocks: dict[int, list[int]] = {}
        self._caches: dict[int, DynamicCache] = {}
        self._next = 0

    def reserve(self, num_tokens: int) -> int:
        """See Engine.reserve."""
        blocks = self._pool.allocate(self.codec.num_pages(num_tokens) + 1)
        self._next += 1
        self._blocks[self._next], self._caches[self._next] = blocks, DynamicCache(config=self.loaded.model.config)
        return self._next

    def load(self, seq: int, layer: int, content: LayerContent) -> None:
        """See Engine.load."""
        dtype = self.loaded.model.dtype
        k, v = self.codec.dense(content.pages.transpose(0, 1), dtype)
        k, v = torch.cat((k, content.exact_k.to(dtype)), 1), torch.cat((v, content.exact_v.to(dtype)), 1)
        self._caches[seq].layers[layer].update(k[None], v[None])

    @torch.no_grad()
    def step(self, seqs: list[int], tokens: list[int]) -> Tensor:
        """See Engine.step. One pass per sequence: transformers' own caches do not share one."""
        rows = [
            self.loaded.model(torch.tensor([[t]]), past_key_values=self._caches[s], use_cache=True).logits[:, -1]
            for s, t in zip(seqs, tokens, strict=True)
        ]
        return torch.cat(rows).float()

    def free(self, seq: int) -> None:
        """See Engine.free."""
        self._pool.release(self._blocks.pop(seq))
        del self._caches[seq]

    def kv_bytes(self, seq: int) -> int:
        """Bytes in 16 bits, whatever the model computes in."""
        return (
            self.codec.kv_bytes(self._caches[seq].get_seq_length())
            * self.loaded.num_kv_heads
            * len(self._caches[seq].layers)
        )


def make_engine(loaded: LoadedModel, kv_cache_dtype: str, max_tokens: int, max_sequences: int) -> Engine:
    """Build the engine of a format. Raises FormatError, or UnsupportedError for a head_dim not covered."""
    codec = make_codec(kv_cache_dtype, loaded.head_dim, loaded.rope.channel_order())
    if computes_quantized_prefill(codec):
        raise UnsupportedError(f"expected a format with exact prefill, found {codec.name}; drop its prefill option")
    if isinstance(codec, ExactCodec):
        return ExactEngine(loaded, codec, max_tokens, max_sequences)
    return PagedEngine(loaded, codec, max_tokens, max_sequences)
