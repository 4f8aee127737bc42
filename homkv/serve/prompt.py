"""One prompt in a prefill instance: who wants it, what was restored, how far it is."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from homkv.errors import TransferError
from homkv.formats import PageCodec
from homkv.serve.kept import KeptPage, restore_dense
from homkv.serve.messages import Prefill
from homkv.serve.pipe import LayerPipe


class StreamingCache(DynamicCache):  # type: ignore[misc]  # transformers is untyped
    """transformers' own cache that also hands on all keys and values of each layer that was updated."""

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        self.on_layer: Callable[[int, Tensor, Tensor], None] = lambda layer, k, v: None

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store, hand on, return what attention needs."""
        k, v = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        self.on_layer(layer_idx, k, v)
        return k, v


@dataclass(eq=False)
class PromptJob:
    """A prompt, who wants it, and how far it is."""

    client: bytes
    ask: Prefill
    received_s: float
    start_s: float = 0.0
    kept: list[KeptPage] = field(default_factory=list)
    cache: StreamingCache | None = None
    num_computed: int = 0  # tokens
    num_layers: int = 0  # of all chunks
    pipe: LayerPipe | None = None
    computed_s: float = 0.0
    num_cached: int = 0  # tokens that were restored
    is_unwanted: bool = False  # the client cancelled it or left

    def open(self, config: Any, codec: PageCodec, kept: list[KeptPage], dtype: torch.dtype) -> None:
        """Begin: restore what is kept of the prompt."""
        self.start_s, self.kept, self.cache = time.monotonic(), kept, StreamingCache(config)
        if not kept:
            return
        for layer in range(kept[0].pages.shape[0]):
            k, v = restore_dense(codec, kept, layer, dtype)
            self.cache.update(k, v, layer)
        self.num_cached = self.num_computed = codec.num_sinks + len(kept) * codec.page_tokens

    def check_wanted(self) -> None:
        """Raise TransferError if the client cancelled the prompt or left."""
        if self.is_unwanted:
            raise TransferError(
                f"expected {self.ask.request_id!r} to be wanted, found it cancelled by its client; ask again"
            )
