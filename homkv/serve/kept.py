"""Prefixes that a prefill instance keeps as pages of its source format, so that they need not be computed again."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from homkv.formats import PageCodec
from homkv.seal import LayerContent
from homkv.serve.convert import EXACT_DTYPE, dense
from homkv.serve.prefix import PrefixIndex, page_keys


@dataclass(frozen=True)
class KeptPage:
    """One page of all layers ``[L, G, P]``; a prompt's first page has the sinks ``[L, 2, G, sinks, D]`` as well."""

    pages: Tensor
    sinks: Tensor | None

    @property
    def num_bytes(self) -> int:
        """Bytes held."""
        return self.pages.nbytes + (0 if self.sinks is None else self.sinks.nbytes)


class KeptPrefixes:
    """Pages of finished prompts, up to ``max_bytes``; the least recently used go first."""

    def __init__(self, codec: PageCodec, root: str, max_bytes: int) -> None:
        self.codec, self._root, self._max_bytes = codec, root, max_bytes
        self.index: PrefixIndex[KeptPage] = PrefixIndex()
        self.num_bytes = 0

    def match(self, prompt_ids: Sequence[int]) -> list[KeptPage]:
        """Pages of the longest known prefix that leaves at least one token to compute."""
        keys = page_keys(self._root, self.codec, prompt_ids)
        room = (len(prompt_ids) - 1 - self.codec.num_sinks) // self.codec.page_tokens
        found = self.index.match(keys[: max(room, 0)])
        self.index.count(len(keys), len(found))
        return found

    def add(self, prompt_ids: Sequence[int], layers: Sequence[LayerContent]) -> None:
        """Keep the pages of a prompt whose layers are all computed, as far as they are new and fit."""
        for i, key in enumerate(page_keys(self._root, self.codec, prompt_ids)):
            if key in self.index:
                continue
            sinks = None
            if i == 0 and self.codec.num_sinks:
                sinks = torch.stack([_sinks(self.codec, content) for content in layers])
            page = KeptPage(torch.stack([content.pages[i] for content in layers]), sinks)
            if page.num_bytes > self._max_bytes:
                return
            self.index.add(key, page)
            self.num_bytes += page.num_bytes
        self._shrink()

    def _shrink(self) -> None:
        if self.num_bytes <= self._max_bytes:
            return
        for page in self.index.evict():
            self.num_bytes -= page.num_bytes
            if self.num_bytes <= self._max_bytes:
                return


def restore(codec: PageCodec, kept: Sequence[KeptPage], layer: int) -> LayerContent:
    """One layer of a kept prefix: its pages and sinks, and no window."""
    pages = torch.stack([page.pages[layer] for page in kept])
    num_groups = pages.shape[1]
    sinks = kept[0].sinks
    exact = torch.empty(2, num_groups, 0, codec.head_dim, dtype=EXACT_DTYPE) if sinks is None else sinks[layer]
    return LayerContent(len(kept) * codec.page_tokens + exact.shape[2], pages, exact[0], exact[1])


def restore_dense(codec: PageCodec, kept: Sequence[KeptPage], layer: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values ``[1, G, T, D]`` of a kept prefix, for the model's own cache."""
    k, v = dense(restore(codec, kept, layer), codec)
    return k.to(dtype)[None], v.to(dtype)[None]


def _sinks(codec: PageCodec, content: LayerContent) -> Tensor:
    return torch.stack((content.exact_k[:, : codec.num_sinks], content.exact_v[:, : codec.num_sinks]))
