"""What the decode loop needs of a KV cache, and our pages in that form."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from homkv.attention import api
from homkv.attention.view import LayerView
from homkv.cache import PagedCache
from homkv.errors import UnsupportedError
from homkv.formats import PageCodec
from homkv.formats.hack import HackCodec
from homkv.formats.rows import RowsCodec
from homkv.seal import advance, append_one


class StepKV(ABC):
    """KV of B sequences in buffers of their final size, with counters that are tensors on the device.

    The order of calls: ``prefill`` for every prompt and layer; ``start``; then per step ``advance`` once and ``attend``
    for every layer; ``finish``. ``is_capturable``: ``advance`` and ``attend`` wait for nothing and take no decision on
    the host, so that a CUDA graph of one step can be replayed for the others.
    """

    num_sequences: int
    device: torch.device
    is_capturable: bool

    @abstractmethod
    def prefill(self, layer: int, row: int, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> Tensor:
        """Causal attention of a whole prompt, stored as sequence ``row``: ``q [1, H, T, D]``, ``k v [1, G, T, D]``.

        Returns ``[1, H, T, D]`` in q's dtype. Raises FormatError for values that cannot be stored.
        """

    @abstractmethod
    def start(self) -> None:
        """All prompts are in: get ready for the first step."""

    @abstractmethod
    def advance(self) -> None:
        """Count one more token in every sequence; the layers of this step store it."""

    @abstractmethod
    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> Tensor:
        """Store one token per sequence, ``k v [B, G, 1, D]``, and attend with ``q [B, H, 1, D]`` to it and all before.

        Returns ``[B, H, 1, D]`` in q's dtype.
        """

    @abstractmethod
    def check(self) -> None:
        """Raise FormatError if a step met values that cannot be stored. Waits for the device."""

    @abstractmethod
    def finish(self) -> None:
        """The last step is done: bring host-side books up to date. Raises as :meth:`check`."""

    @abstractmethod
    def num_bytes(self) -> int:
        """Bytes of KV that the device holds for these sequences, reserved room included."""


class PagesKV(StepKV):
    """Sequences of a PagedCache, which has them back after :meth:`finish`.

    Raises UnsupportedError for a format that changes its window after every token (``hack:rqe=0``).
    """

    def __init__(self, cache: PagedCache, seq_ids: list[int]) -> None:
        codec = cache.codec
        if isinstance(codec, HackCodec) and not codec.options.requantization_elimination:
            raise UnsupportedError(f"expected a window that stays as it is, found {codec.name}; use attach() for it")
        self.cache, self.seq_ids = cache, seq_ids
        self.num_sequences, self.device = len(seq_ids), cache.device
        self.is_capturable = cache.device.type == "cuda" and cache.impl == "triton" and isinstance(codec, RowsCodec)
        self._views: list[LayerView] = []
        self._due = torch.empty(0)

    @classmethod
    def reserve(
        cls,
        codec: PageCodec,
        max_tokens: list[int],
        *,
        num_layers: int,
        num_kv_heads: int,
        exact_dtype: torch.dtype,
        device: torch.device | str,
        impl: str | None = None,
    ) -> "PagesKV":
        """Make a cache with one sequence for each of ``max_tokens``, its room taken. Raises CapacityError."""
        cache = PagedCache(
            codec,
            num_layers=num_layers,
            num_kv_heads=num_kv_heads,
            num_blocks=sum(codec.num_pages(n) for n in max_tokens),
            max_sequences=len(max_tokens),
            exact_dtype=exact_dtype,
            impl=impl,
            device=device,
        )
        return cls(cache, [cache.new_sequence(n) for n in max_tokens])

    def prefill(self, layer: int, row: int, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> Tensor:
        """See StepKV.prefill. A prompt may come in chunks, but for formats with a quantized prefill."""
        return self.cache.attend(layer, [self.seq_ids[row]], q, k, v, softmax_scale)

    def start(self) -> None:
        """See StepKV.start."""
        self._views = self.cache.open_views(self.seq_ids)

    def advance(self) -> None:
        """See StepKV.advance."""
        self._due = advance(self.cache.codec, self._views[0])

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> Tensor:
        """See StepKV.attend."""
        view, cache = self._views[layer], self.cache
        codec = cache.codecs[layer]
        append_one(codec, view, self._due, k[:, :, 0], v[:, :, 0], impl=cache.impl, status=cache.status)
        o, _ = api.attend(q, view, codec, softmax_scale, impl=cache.impl)
        return o.to(q.dtype)

    def check(self) -> None:
        """See StepKV.check."""
        self.cache.check_values(self.seq_ids)

    def finish(self) -> None:
        """See StepKV.finish."""
        self.cache.close_views(self.seq_ids, self._views[0])

    def num_bytes(self) -> int:
        """See StepKV.num_bytes."""
        return self.cache.allocated_bytes
