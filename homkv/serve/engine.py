"""What a decode instance computes with: one engine per format, all with the same few verbs."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from homkv.attention import api
from homkv.cache import PagedCache
from homkv.errors import HomkvError, ShapeError, UnsupportedError
from homkv.formats import PageCodec, make_codec
from homkv.formats.meter import OVERHEAD
from homkv.formats.per_layer import require_model
from homkv.hf import KVCache
from homkv.models import LoadedModel
from homkv.models.describe import refuse_sliding_windows
from homkv.models.forward import last_logits
from homkv.rope import RopeSpec
from homkv.seal import LayerContent
from homkv.serve.convert import EXACT_DTYPE
from homkv.serve.evidence import collect
from homkv.serve.messages import Evidence
from homkv.serve.prefix import PrefixIndex
from homkv.transport.assemble import SequencePlan
from homkv.transport.wire import Expectation, LayerLayout


def expectation(loaded: LoadedModel, codec: PageCodec, source: str = "fp16") -> Expectation:
    """What prefill and decode must agree on for this model, format and source."""
    codecs = (codec.at_layer(i, loaded.num_layers) for i in range(loaded.num_layers))
    layers = tuple(LayerLayout(c.layout_id, c.page_bytes) for c in codecs)
    return Expectation(
        format=codec.name,
        layout_id=codec.layout_id,
        model=loaded.fingerprint,
        num_layers=loaded.num_layers,
        num_kv_heads=loaded.num_kv_heads,
        head_dim=loaded.head_dim,
        page_bytes=codec.page_bytes,
        exact_dtype=str(EXACT_DTYPE).removeprefix("torch."),  # type: ignore[arg-type]  # the wire checks the name
        source=source,
        layers=layers if len(set(layers)) > 1 else (),
    )


def plan_sequence(
    loaded: LoadedModel,
    codec: PageCodec,
    request_id: str,
    epoch: int,
    num_tokens: int,
    *,
    source: str = "fp16",
    first_page: int = 0,
) -> SequencePlan:
    """What crosses the wire for a prompt; both sides compute it alike."""
    return SequencePlan(
        expect=expectation(loaded, codec, source),
        sequence=request_id,
        epoch=epoch,
        num_tokens=num_tokens,
        num_pages=codec.num_pages(num_tokens),
        num_exact=codec.num_exact(num_tokens),
        first_page=first_page,
        coder=codec.coder,
    )


class Engine(ABC):
    """Sequences of one format. ``seq`` is a handle from :meth:`reserve`, good until :meth:`free`.

    Steps run inside ``homkv.generate.loop.attention_of(model)``.
    """

    num_blocks: int  # of the pool

    def __init__(self, loaded: LoadedModel, codec: PageCodec) -> None:
        self.loaded, self.codec = loaded, codec
        self.prefixes: PrefixIndex[int] = PrefixIndex()  # page key -> block that is kept
        self.num_damaged = 0  # kept pages whose digest had changed

    def require(self, num_tokens: int) -> None:
        """Raise ShapeError if a sequence of this length would never fit, however long it waits."""
        needed = self.blocks_for(num_tokens)
        if needed > self.num_blocks:
            raise ShapeError(
                f"expected a request of at most {self.num_blocks} page blocks, found {needed} for {num_tokens} tokens; "
                "shorten it or start the decode instance with more --max-tokens"
            )

    @abstractmethod
    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that a sequence of this length takes."""

    @abstractmethod
    def reserve(self, num_tokens: int, keys: Sequence[bytes] = ()) -> tuple[int, int]:
        """Set aside room for a sequence whose first pages have ``keys``: its handle, and how many of them are here.

        Raises CapacityError with nothing changed.
        """

    @abstractmethod
    def load(self, seq: int, layer: int, content: LayerContent, first_page: int = 0) -> None:
        """Store one verified layer, whose pages before ``first_page`` are shared."""

    @abstractmethod
    def publish(self, seq: int, keys: Sequence[bytes]) -> None:
        """All layers of the prompt are there: let others share its first pages under these keys."""

    @abstractmethod
    def evidence(self, seq: int) -> Evidence:
        """What is held of a sequence, to compare with another run."""

    @abstractmethod
    def step(self, seqs: list[int], tokens: list[int]) -> Tensor:
        """Feed one token to each sequence; returns logits ``[B, V]`` of the next."""

    @abstractmethod
    def free(self, seq: int) -> None:
        """Give the room back."""

    def overhead_s(self, since_s: float = 0.0) -> float | None:
        """Seconds that this process has spent on restoring or correcting, beyond ``since_s``.

        None where a kernel does not tell it apart.
        """
        return OVERHEAD.seconds - since_s if api.resolve_impl(self.codec, None) == "reference" else None

    @abstractmethod
    def kv_bytes(self, seq: int) -> int:
        """Bytes of KV held for a sequence."""

    @property
    @abstractmethod
    def num_free_blocks(self) -> int:
        """Blocks that a new sequence can have: not held and not reserved."""

    @abstractmethod
    def check(self) -> None:
        """Raise HomkvError unless the bookkeeping, and the stored bytes where digests are kept, are intact."""


class PagedEngine(Engine):
    """Decodes on the pages. Prompts share pages by reference; pages that nobody needs are kept until room is short."""

    def __init__(self, loaded: LoadedModel, codec: PageCodec, max_tokens: int, max_sequences: int) -> None:
        super().__init__(loaded, codec)
        self.num_blocks = codec.num_pages(max_tokens) + 1
        self.cache = PagedCache(
            codec,
            num_layers=loaded.num_layers,
            num_kv_heads=loaded.num_kv_heads,
            num_blocks=self.num_blocks,
            max_sequences=max_sequences,
            exact_dtype=EXACT_DTYPE,
        )

    def blocks_for(self, num_tokens: int) -> int:
        """See Engine.blocks_for."""
        return self.codec.num_pages(num_tokens)

    def reserve(self, num_tokens: int, keys: Sequence[bytes] = ()) -> tuple[int, int]:
        """See Engine.reserve. A kept page is shared only if its digest is still what it was; else it is forgotten."""
        blocks = self.prefixes.match(keys)
        self.cache.keep(blocks)  # not to be evicted below
        try:
            self._make_room(self.blocks_for(num_tokens) - len(blocks))
            seq = self.cache.new_sequence(num_tokens, blocks)
        finally:
            self.cache.drop(blocks)
        damaged = self.cache.changed_blocks(blocks)
        if damaged:
            self.num_damaged += len(damaged)
            self.cache.free(seq)
            self.cache.drop(list(self.prefixes.evict(lambda block: block in damaged)))
            return self.reserve(num_tokens, keys)
        self.prefixes.count(len(keys), len(blocks))
        return seq, len(blocks)

    def _make_room(self, num_blocks: int) -> None:
        """Evict kept pages that no sequence uses, oldest first, until so many blocks are free or none is left."""
        if self.cache.num_free_blocks >= num_blocks:
            return
        for block in self.prefixes.evict(self.cache.is_only_kept):
            self.cache.drop([block])
            if self.cache.num_free_blocks >= num_blocks:
                return

    def load(self, seq: int, layer: int, content: LayerContent, first_page: int = 0) -> None:
        """See Engine.load."""
        self.cache.load_layer(layer, seq, content, first_page)

    def publish(self, seq: int, keys: Sequence[bytes]) -> None:
        """See Engine.publish."""
        for key, block in zip(keys, self.cache.blocks(seq), strict=False):  # the answer's blocks have no keys
            if key not in self.prefixes:
                self.cache.keep([block])
                self.prefixes.add(key, block)

    def evidence(self, seq: int) -> Evidence:
        """See Engine.evidence. Attention is the format's own, through the sequence's references to pages."""
        cache, scale = self.cache, self.loaded.head_dim**-0.5

        def stored(layer: int) -> tuple[Tensor, ...]:
            content = cache.export_layer(layer, seq)
            return content.pages, content.exact_k, content.exact_v

        def attend(layer: int, q: Tensor) -> Tensor:
            return api.attend(q, cache.view(layer, [seq]), cache.codecs[layer], scale, impl=cache.impl)[0]

        return collect(self.loaded, stored, attend)

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
        """See Engine.num_free_blocks. Kept pages give way, so those that only the index holds count as free."""
        return self.cache.num_free_blocks + sum(map(self.cache.is_only_kept, self.prefixes.values()))

    def check(self) -> None:
        """See Engine.check."""
        self.cache.check()
        damaged = self.cache.changed_blocks(self.prefixes.values())
        if damaged:
            raise HomkvError(f"expected kept pages as they were stored, found blocks {sorted(damaged)} changed")


def codec_for(loaded: LoadedModel, kv_cache_dtype: str) -> PageCodec:
    """Bind a format to a loaded model.

    Raises as serving_codec does, FormatError for another model's plan, and UnsupportedError for sliding windows.
    """
    refuse_sliding_windows(loaded.sliding_windows, loaded.name, "serving")
    codec = serving_codec(kv_cache_dtype, loaded.head_dim, loaded.rope)
    require_model(codec, lambda: loaded.fingerprint, loaded.num_layers)
    return codec


def serving_codec(kv_cache_dtype: str, head_dim: int, rope: RopeSpec | None = None) -> PageCodec:
    """Bind a format to a head, as ``make_codec`` does, if prefill and decode instances can serve it.

    Raises FormatError for an unknown name, UnsupportedError for a head_dim or an option not covered, and for an entropy
    coder that is not installed.
    """
    codec = make_codec(kv_cache_dtype, head_dim, rope)
    if codec.coder is not None:
        codec.coder.require()
    if api.computes_quantized_prefill(codec):
        raise UnsupportedError(f"expected a format with exact prefill, found {codec.name}; drop its prefill option")
    return codec
