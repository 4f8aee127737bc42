"""A step's metadata at addresses that stay: what a captured CUDA graph reads at every replay. Knows nothing of vLLM."""

from dataclasses import dataclass

import torch
from torch import Tensor

from homkv.errors import FormatError


@dataclass(frozen=True)
class Kept:
    """``lengths [B] tables [B, num_pages]`` of a step's sequences; ``pages``: tables of single tokens without page 0.

    ``status [1] int32``: what kernels report of single tokens.
    """

    lengths: Tensor
    tables: Tensor
    pages: Tensor
    status: Tensor


class Lasting:
    """Buffers for up to ``max_rows`` sequences on one device, and the word by which kernels report what went wrong."""

    def __init__(self, max_rows: int, device: torch.device | str) -> None:
        self._max_rows, self._device = max_rows, torch.device(device)
        self._lengths = torch.zeros(max_rows, dtype=torch.int32, device=device)
        self._tables: Tensor | None = None
        self._pages: Tensor | None = None
        self.status = torch.zeros(1, dtype=torch.int32, device=device)
        self._report = torch.zeros(1, dtype=torch.int32, device="cpu", pin_memory=self._device.type == "cuda")
        self._reported: torch.cuda.Event | None = None

    def keep(self, num_single: int, lengths: Tensor, tables: Tensor) -> Kept:
        """Of B sequences, ``lengths [B]`` and ``tables [B, num_pages]``, the first ``num_single`` have one token."""
        if self._tables is None or self._pages is None:  # all tables of an engine are equally wide
            self._tables = tables.new_zeros(self._max_rows, tables.shape[1])
            self._pages = tables.new_zeros(self._max_rows, tables.shape[1] - 1)
        pages = _kept(self._pages, tables[:num_single, 1:])
        return Kept(_kept(self._lengths, lengths), _kept(self._tables, tables), pages, self.status)

    def check(self, wait: bool) -> None:
        """Raise FormatError if a page could not be encoded, in the step before the last one, or in the last one.

        ``wait`` for the device and so include the last one. A page is read 64 steps after it was encoded, so nothing
        has attended to it yet, unless another sequence was started on it: then the last step counts.
        """
        if wait or self._reported is None:
            self._report.copy_(self.status)
        else:
            self._reported.synchronize()
        if self._report.item():
            raise FormatError(
                "expected keys and values that the format can hold, found some that are not finite or whose scale is "
                "beyond 240; serve this model with another format"
            )
        if self._device.type == "cuda":
            self._report.copy_(self.status, non_blocking=True)
            self._reported = torch.cuda.Event()
            self._reported.record()


def _kept(place: Tensor, new: Tensor) -> Tensor:
    kept = place[: len(new)]
    kept.copy_(new)
    return kept
