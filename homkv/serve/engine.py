"""What a decode instance computes with: one engine per format, all with the same few verbs."""

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from transformers import DynamicCache

from homkv.attention.api import computes_quantized_prefill
from homkv.blocks import BlockPool
from homkv.cache import PagedCache
from homkv.errors import CapacityError, FormatError, HomkvError, UnsupportedError
from homkv.formats import PageCodec, make_codec
from homkv.hf import Attachment, KVCache
from homkv.models import LoadedModel
from homkv.models.forward import last_logits
from homkv.rope import RopeSpec
from homkv.seal import LayerContent
from homkv.serve.messages import Sampling
from homkv.transport.assemble import SequencePlan
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


def plan_sequence(loaded: LoadedModel, codec: PageCodec, request_id: str, epoch: int, num_tokens: int) -> SequencePlan:
    """What crosses the wire for a prompt; both sides compute it alike."""
    return SequencePlan(
        expect=expectation(loaded, codec),
        sequence=request_id,
        epoch=epoch,
        num_tokens=num_tokens,
        num_pages=codec.num_pages(num_tokens),
        num_exact=codec.num_exact(num_tokens),
        coder=codec.coder,
    )


def sample(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Choose a token from ``logits [V]``: greedy at temperature 0, else nucleus sampling.

    Raises FormatError if the logits hold NaN or infinity: every token chosen from them would be noise.
    """
    highest = logits.double().max()
    if not bool(torch.isfinite(highest)):  # max() passes NaN on; -inf elsewhere masks a token
        raise FormatError(
            f"expected finite logits, found {float(highest)} among them; the model overflowed: load it in another dtype"
        )
    if sampling.temperature == 0:
        return int(logits.argmax())
    # The highest becomes 0 before the division, so that no temperature overflows.
    p, order = torch.softmax((logits.double() - highest) / sampling.temperature, -1).sort(descending=True)
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

    @property
    @abstractmethod
    def num_free_blocks(self) -> int:
        """Blocks of pages that no sequence holds or has reserved."""

    @abstractmethod
    def check(self) -> None:
        """Raise HomkvError unless the bookkeeping, and the stored bytes where digests are kept, are intact."""


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

    def step(self, seqs: list[int], tokens: list[int]) -> Tensor:
        """See Engine.step. Sequences of unequal length share one pass."""
        positions = torch.tensor([[self.cache.num_tokens(s)] for s in seqs])
        cache = KVCache.adopt(self.cache, seqs)
        ids = torch.tensor(tokens).unsqueeze(1)
        return last_logits(self.loaded.model, ids, cache, position_ids=positions)

    def free(self, seq: int) -> None:
        """See Engine.free."""
        self.cache.free(seq)

    def kv_bytes(self, seq: int) -> int:
        """See Engine.kv_bytes."""
        return self.cache.kv_bytes(seq)

    @property
    def num_free_blocks(self) -> int:
        """See Engine.num_free_blocks."""
        return self.cache.num_free_blocks

    def check(self) -> None:
        """See Engine.check."""
        self.cache.check()


class ExactEngine(Engine):
    """KV is held in 16 bits, however it arrived, and attended to by the model's own attention."""

    def __init__(self, loaded: LoadedModel, codec: PageCodec, max_tokens: int, max_sequences: int) -> None:
        super().__init__(loaded, codec)
        self._max_sequences = max_sequences
        self._pool = BlockPool(codec.num_pages(max_tokens) + 1)
        self._blocks: dict[int, list[int]] = {}
        self._caches: dict[int, DynamicCache] = {}
        self._next = 0

    def reserve(self, num_tokens: int) -> int:
        """See Engine.reserve."""
        if len(self._caches) == self._max_sequences:
            raise CapacityError(
                f"expected a free sequence slot, found all {self._max_sequences} taken; try again when one is done"
            )
        blocks = self._pool.allocate(self.codec.num_pages(num_tokens) + 1)
        self._next += 1
        self._blocks[self._next], self._caches[self._next] = blocks, DynamicCache(config=self.loaded.model.config)
        return self._next

    def load(self, seq: int, layer: int, content: LayerContent) -> None:
        """See Engine.load."""
        dtype = self.loaded.model.dtype
        k, v = self.codec.dense(content.pages.transpose(0, 1), dtype)
        k, v = torch.cat((k, content.exact_k.to(dtype)), 1), torch.cat((v, content.exact_v.to(dtype)), 1)
        self._caches[seq].update(k[None], v[None], layer)

    def step(self, seqs: list[int], tokens: list[int]) -> Tensor:
        """See Engine.step. One pass per sequence: transformers' own caches do not share one."""
        rows = [
            last_logits(self.loaded.model, torch.tensor([[t]]), self._caches[s])
            for s, t in zip(seqs, tokens, strict=True)
        ]
        return torch.cat(rows)

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

    @property
    def num_free_blocks(self) -> int:
        """See Engine.num_free_blocks."""
        return self._pool.num_free

    def check(self) -> None:
        """See Engine.check."""
        if self._blocks.keys() != self._caches.keys():
            raise HomkvError(f"expected blocks for {sorted(self._caches)}, found them for {sorted(self._blocks)}")
        self._pool.check(list(self._blocks.values()))


def serving_codec(kv_cache_dtype: str, head_dim: int, rope: RopeSpec | None = None) -> PageCodec:
    """Bind a format to a head, as ``make_codec`` does, if prefill and decode instances can serve it.

    Raises FormatError for an unknown name, UnsupportedError for a head_dim or an option not covered, and for an entropy
    coder that is not installed.
    """
    codec = make_codec(kv_cache_dtype, head_dim, rope)
    if codec.coder is not None:
        codec.coder.require()
    if computes_quantized_prefill(codec):
        raise UnsupportedError(f"expected a format with exact prefill, found {codec.name}; drop its prefill option")
    return codec


def make_engine(loaded: LoadedModel, kv_cache_dtype: str, max_tokens: int, max_sequences: int) -> Engine:
    """Build the engine of a format. Raises FormatError, or UnsupportedError for a head_dim not covered."""
    codec = serving_codec(kv_cache_dtype, loaded.head_dim, loaded.rope)
    if codec.restored_on_arrival:
        return ExactEngine(loaded, codec, max_tokens, max_sequences)
    return PagedEngine(loaded, codec, max_tokens, max_sequences)
