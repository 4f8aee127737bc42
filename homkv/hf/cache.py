"""Caches that compute attention themselves, as transformers sees them: pages, and sliding windows kept exact."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicSlidingWindowLayer

from homkv.attention.prefill import causal_window
from homkv.cache import PagedCache
from homkv.errors import CapacityError, HomkvError, ShapeError, UnsupportedError
from homkv.formats import PageCodec

ATTENTION_NAME = "homkv"


class AttendingLayer(CacheLayerMixin, ABC):  # type: ignore[misc]  # transformers is untyped
    """A cache layer that computes its own attention: :func:`~homkv.hf.attention.attention_forward` calls back."""

    @abstractmethod
    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, mask: Tensor | None, positions: Tensor | None
    ) -> Tensor:
        """Attend with ``q [B, H, T, D]`` to what :meth:`update` returned; ``mask [B, S]`` marks real tokens."""


def marked(layer: AttendingLayer, keys: Tensor) -> Tensor:
    """Keys as the attention function receives them: this very tensor, so that it knows whose they are."""
    keys = keys.view_as(keys)
    keys.homkv_layer = layer  # type: ignore[attr-defined]
    return keys


def seen_later(x: Tensor, window: int) -> Tensor:
    """What tokens behind keys or values ``[..., S, D]`` see of them in a sliding window, a copy of its own."""
    return x[..., max(x.shape[-2] - window + 1, 0) :, :].detach().clone()


class PagedLayer(AttendingLayer):
    """A layer whose owner, an :class:`AttendingCache`, stores the tokens; ``layer`` counts layers of this kind."""

    is_sliding = False
    supports_early_init = False

    def __init__(self, owner: "AttendingCache", layer: int) -> None:
        super().__init__()
        self.owner, self.layer = owner, layer
        self.num_seen = 0  # columns of the attention mask so far, padding included
        self.is_pending = False  # update() was called, attention not yet

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the owner opens its sequences with the first tokens."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Hand the new keys and values on to the attention function, which stores them."""
        if self.is_pending:
            raise HomkvError(
                f"expected attention {ATTENTION_NAME!r} to follow the update of layer {self.layer}, found none; use "
                "this cache inside `with homkv.attach(model, ...)`"
            )
        self.is_pending = True
        return marked(self, key_states), value_states

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, mask: Tensor | None, positions: Tensor | None
    ) -> Tensor:
        """Store ``k v [B, G, T, D]`` and attend with ``q [B, H, T, D]``; ``mask [B, seen + T]`` marks real tokens."""
        self.is_pending = False
        real = self.owner.read_mask(self.layer, mask, q.shape[2])
        if self.owner.layers[0] is self and positions is not None:
            refuse_packed(positions, real)
        out = self.owner.attend(self.layer, q, k, v, softmax_scale, real)
        self.num_seen += q.shape[2]
        return out

    def get_seq_length(self) -> int:
        """Mask columns so far."""
        return self.num_seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the mask that the next attention needs."""
        return self.num_seen + query_length, 0

    def get_max_length(self) -> int:
        """Tokens that a sequence can hold; -1 if only the pool bounds it."""
        return -1 if self.owner.max_tokens is None else self.owner.max_tokens

    def reset(self) -> None:
        """Forget the tokens; the owner frees the sequences."""
        self.num_seen, self.is_pending = 0, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Refuse: sequences span layers, so the owner reorders them."""
        raise UnsupportedError("expected KVCache.reorder_cache(), found a single layer's; reorder the whole cache")


class SlidingLayer(DynamicSlidingWindowLayer, AttendingLayer):  # type: ignore[misc]  # transformers is untyped
    """A layer whose tokens attend to the newest ``sliding_window`` only: these few stay as the model computed them."""

    keys: Tensor | None
    values: Tensor | None

    def __init__(self, owner: "AttendingCache", window: int) -> None:
        super().__init__(sliding_window=window)
        self.owner = owner

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return what the new tokens may see; :meth:`attend` keeps of it what later ones may."""
        self.owner.check_new(self.cumulative_length, key_states.shape[0], key_states.shape[2])
        if self.keys is not None and self.values is not None:
            key_states, value_states = torch.cat((self.keys, key_states), 2), torch.cat((self.values, value_states), 2)
        return marked(self, key_states), value_states

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, mask: Tensor | None, positions: Tensor | None
    ) -> Tensor:
        """See AttendingLayer.attend."""
        if self.owner.layers[0] is self and positions is not None and q.shape[2] > 1:
            refuse_packed(positions, self.owner.read_mask(0, mask, q.shape[2]))
        out = causal_window(q, k, v, softmax_scale, self.sliding_window, mask)
        self.keep(k, v, q.shape[2])
        return out

    def keep(self, keys: Tensor, values: Tensor, num_new: int) -> None:
        """Hold the end of ``keys values [B, G, S, D]``, of which ``num_new`` tokens are new."""
        self.keys, self.values = (seen_later(x, self.sliding_window) for x in (keys, values))
        self.is_initialized = True
        self.cumulative_length += num_new

    def reset(self) -> None:
        """Forget the tokens."""
        self.keys = self.values = None
        self.is_initialized, self.cumulative_length = False, 0


class AttendingCache(Cache, ABC):  # type: ignore[misc]  # transformers is untyped
    """A cache that computes attention itself: its layers mark the new keys, :func:`attention_forward` calls back.

    ``num_layers``: that this cache attends in. ``sliding_windows``: of all layers of the model, in tokens, None where
    this cache attends; empty if it does so in all.
    """

    def __init__(self, num_layers: int, max_tokens: int | None, sliding_windows: Sequence[int | None] = ()) -> None:
        windows = tuple(sliding_windows) or (None,) * num_layers
        if windows.count(None) != num_layers:
            raise ShapeError(f"expected {num_layers} layers without a sliding window, found {windows.count(None)}")
        numbers = iter(range(num_layers))
        super().__init__(
            layers=[PagedLayer(self, next(numbers)) if w is None else SlidingLayer(self, w) for w in windows]
        )
        self.max_tokens = max_tokens
        self._mask: Tensor | None = None
        self._real: Tensor | None = None

    @property
    def paged_layers(self) -> list[PagedLayer]:
        """Layers that this cache attends in."""
        return [layer for layer in self.layers if isinstance(layer, PagedLayer)]

    @property
    def sliding_layers(self) -> list[SlidingLayer]:
        """Layers of a sliding window."""
        return [layer for layer in self.layers if isinstance(layer, SlidingLayer)]

    @abstractmethod
    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, real: Tensor | None) -> Tensor:
        """Store ``k v [B, G, T, D]`` and attend with ``q [B, H, T, D]``; ``real [B, T]`` marks tokens, None all."""

    def check_new(self, seen: int, batch: int, num_new: int) -> None:
        """Raise before anything is stored if ``num_new`` tokens behind ``seen`` cannot be; anything can here."""

    def read_mask(self, layer: int, mask: Tensor | None, count: int) -> Tensor | None:
        """Which of the newest tokens are real, on the host; None for all.

        Read back once per forward pass: the first layer reads, the others are given the same tensor.
        """
        if mask is None:
            return None
        if layer == 0 or mask is not self._mask:
            real = mask[:, -count:].bool().cpu()
            self._mask, self._real = mask, None if bool(real.all()) else real
        return self._real


class KVCache(AttendingCache):
    """transformers' view of a PagedCache, one sequence per row of the batch, and of sliding windows beside it.

    ``max_tokens``: per sequence, padding included; memory is reserved for it, which on a CPU is only touched as far as
    tokens are stored. None for adopted sequences: their cache decides. ``device``: the model's.
    """

    def __init__(
        self,
        codec: PageCodec,
        *,
        num_layers: int,
        num_kv_heads: int,
        max_tokens: int | None,
        sliding_windows: Sequence[int | None] = (),
        exact_dtype: torch.dtype = torch.float16,
        impl: str | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(num_layers, max_tokens, sliding_windows)
        self.codec = codec
        self._settings: dict[str, Any] = {
            "num_layers": num_layers,
            "num_kv_heads": num_kv_heads,
            "exact_dtype": exact_dtype,
            "impl": impl,
            "device": device,
        }
        self._paged: PagedCache | None = None
        self.seq_ids: list[int] = []

    @property
    def paged(self) -> PagedCache:
        """The pages. Raises HomkvError before the first forward pass."""
        if self._paged is None:
            raise HomkvError("expected a cache with tokens, found an empty one; run the model first")
        return self._paged

    @classmethod
    def adopt(cls, paged: PagedCache, seq_ids: list[int], sliding_windows: Sequence[int | None] = ()) -> "KVCache":
        """Continue sequences that were loaded or computed elsewhere, for example received over the wire.

        Sequences of unequal length need ``position_ids`` at every forward pass: transformers counts from the longest.
        Sliding windows start empty; what they held is given to their layers' ``keep``.
        """
        cache = cls(
            paged.codec,
            num_layers=paged.num_layers,
            num_kv_heads=paged.num_kv_heads,
            max_tokens=None,
            sliding_windows=sliding_windows,
            device=paged.device,
        )
        cache._paged, cache.seq_ids = paged, list(seq_ids)
        for layer in cache.paged_layers:
            layer.num_seen = max(paged.num_tokens(s, layer.layer) for s in seq_ids)
        return cache

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, real: Tensor | None) -> Tensor:
        """Open one sequence per batch row at the first call, then store and attend."""
        if self._paged is None:
            self._open(q.shape[0])
        seen = 0 if self.max_tokens is None else max(self.paged.num_tokens(s, layer) for s in self.seq_ids)
        self.check_new(seen, q.shape[0], q.shape[2])
        return self.paged.attend(layer, self.seq_ids, q, k, v, softmax_scale, real)

    def check_new(self, seen: int, batch: int, num_new: int) -> None:
        """Raise UnsupportedError for another batch, CapacityError if there is no room: nothing was stored then."""
        if self.seq_ids and batch != len(self.seq_ids):
            raise UnsupportedError(
                f"expected the batch of {len(self.seq_ids)} sequences this cache was started with, found {batch}; use "
                "a new cache"
            )
        if self.max_tokens is not None and seen + num_new > self.max_tokens:
            raise CapacityError(
                f"expected at most {self.max_tokens} tokens in a sequence, found {seen} and {num_new} more; "
                "nothing was stored: attach with a larger max_tokens"
            )

    def _open(self, batch: int) -> None:
        assert self.max_tokens is not None  # only adopted caches have none, and they are open
        blocks = batch * (self.codec.num_pages(self.max_tokens) + 1)
        self._paged = PagedCache(self.codec, num_blocks=blocks, max_sequences=batch, **self._settings)
        self.seq_ids = [self._paged.new_sequence() for _ in range(batch)]

    def kv_bytes(self) -> int:
        """Bytes of all sequences: pages, sinks and windows, sliding ones included."""
        sliding = sum(x.nbytes for layer in self.sliding_layers for x in (layer.keys, layer.values) if x is not None)
        return sum(self.paged.kv_bytes(s) for s in self.seq_ids) + sliding

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the chosen beams; beams with a common past share its pages."""
        chosen = [self.seq_ids[i] for i in beam_idx.tolist()]
        for seq_id in set(self.seq_ids) - set(chosen):
            self.paged.free(seq_id)
        # The first to choose a beam goes on with it, the others with copies: never more sequences than before.
        self.seq_ids = [s if s not in chosen[:i] else self.paged.fork(s) for i, s in enumerate(chosen)]
        for layer in self.sliding_layers:
            layer.reorder_cache(beam_idx)

    def reset(self) -> None:
        """Free all sequences; the cache can be used again."""
        for seq_id in self.seq_ids:
            self.paged.free(seq_id)
        self._paged, self.seq_ids = None, []
        super().reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse: a sealed page cannot be opened again."""
        raise UnsupportedError("expected tokens to stay, found crop(); assisted decoding does not work on pages")

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Refuse: expand the inputs instead."""
        raise UnsupportedError("expected a fixed batch, found batch_repeat_interleave(); repeat the inputs instead")

    def batch_select_indices(self, indices: Tensor) -> None:
        """Refuse: select the inputs instead."""
        raise UnsupportedError("expected a fixed batch, found batch_select_indices(); use a new cache")


def refuse_packed(positions: Tensor, real: Tensor | None) -> None:
    """Raise UnsupportedError unless the real tokens of every row are consecutive: ``positions [B or 1, T]``.

    Several documents in one row, told apart only by positions that start again, would see each other.
    """
    if positions.shape[1] == 1:
        return
    positions = positions.cpu()
    for row in range(positions.shape[0]):
        found = positions[row] if real is None else positions[row][real[row]]
        if bool((found.diff() != 1).any()):
            raise UnsupportedError(
                f"expected consecutive positions, found {found.tolist()[:8]} …; put each document in a row of its own"
            )
