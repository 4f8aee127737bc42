"""A step's metadata at addresses that stay: what a captured CUDA graph reads at every replay. Knows nothing of vLLM."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Kept:
    """``lengths [B] tables [B, num_pages]`` of a step's sequences; ``pages``: single tokens' tables without page 0."""

    lengths: Tensor
    tables: Tensor
    pages: Tensor


class Lasting:
    """Buffers for up to ``max_rows`` sequences on one device."""

    def __init__(self, max_rows: int, device: torch.device | str) -> None:
        self._max_rows = max_rows
        self._lengths = torch.zeros(max_rows, dtype=torch.int32, device=device)
        self._tables: Tensor | None = None
        self._pages: Tensor | None = None

    def keep(self, num_single: int, lengths: Tensor, tables: Tensor) -> Kept:
        """Of B sequences, ``lengths [B]`` and ``tables [B, num_pages]``, the first ``num_single`` have one token."""
        if self._tables is None or self._pages is None:  # all tables of an engine are equally wide
            self._tables = tables.new_zeros(self._max_rows, tables.shape[1])
            self._pages = tables.new_zeros(self._max_rows, tables.shape[1] - 1)
        pages = _kept(self._pages, tables[:num_single, 1:])
        return Kept(_kept(self._lengths, lengths), _kept(self._tables, tables), pages)


def _kept(place: Tensor, new: Tensor) -> Tensor:
    kept = place[: len(new)]
    kept.copy_(new)
    return kept
