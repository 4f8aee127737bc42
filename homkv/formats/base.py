"""The contract of a stored form: encode tokens into pages, read them back, and compute on them.

A **codec** is a format bound to one model's head: it knows ``head_dim`` and the channel order. It is the
only place that knows what the bytes of its pages mean; cache, wire and attention move them unopened.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from homkv.errors import ShapeError


@dataclass(frozen=True)
class Rounding:
    """What attention rounds on the way. Without rounding it equals attention on ``dense`` keys and values."""

    q: bool = True  # queries to int8
    p: bool = True  # softmax weights to uint8, one scale per page


EIGHT_BIT = Rounding()
UNROUNDED = Rounding(q=False, p=False)


class PageCoder(Protocol):
    """A lossless packing of pages for the wire, ``[N, G, P]`` at a time."""

    def require(self) -> None:
        """Raise UnsupportedError if a library that it needs is not installed."""
        ...

    def encode(self, pages: memoryview, num_pages: int) -> bytes:
        """Pack ``num_pages`` pages of all kv heads, at least one."""
        ...

    def decode(self, data: memoryview, num_pages: int, num_heads: int) -> bytes:
        """Unpack them. Raises FormatError for bytes that ``encode`` cannot have made."""
        ...


class PageCodec(ABC):
    """One stored form of ``page_tokens`` tokens of one kv head.

    Shapes: ``k v [..., N * page_tokens, D]``, ``pages [..., N, P] uint8``, ``q [..., R, D]``,
    ``scores p [..., R, N * page_tokens]``; R counts the query rows that share the kv head.
    """

    name: str  # as given to --kv-cache-dtype
    layout_id: str  # names the page bytes and their version; the wire refuses a different one
    page_tokens: int
    num_sinks: int
    min_window: int
    page_bytes: int
    impls: tuple[str, ...] = ("reference",)  # who can compute on these pages; the first is the default
    restored_on_arrival: bool = False  # a format of the wire alone: a decode instance holds 16 bits
    coder: PageCoder | None = None  # packs pages on the wire

    def __init__(self, head_dim: int) -> None:
        self.head_dim = head_dim

    @property
    def max_window(self) -> int:
        """Window length at which the oldest ``page_tokens`` tokens become a page."""
        return self.min_window + self.page_tokens

    def at_layer(self, layer: int, num_layers: int) -> "PageCodec":
        """What knows the pages of one layer of a model: this codec, unless a format treats layers differently."""
        return self

    @abstractmethod
    def encode(self, k: Tensor, v: Tensor, first_position: int = 0) -> Tensor:
        """Quantize and pack whole pages. ``first_position`` keys stochastic rounding; others ignore it."""

    @abstractmethod
    def dense(self, pages: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Keys and values the pages stand for, ``[..., N * page_tokens, D]``: the oracle's input."""

    @abstractmethod
    def scores(
        self, q: Tensor, pages: Tensor, rounding: Rounding = EIGHT_BIT, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """``q . k`` on the codes, ``[..., R, N * page_tokens]``, without softmax scale."""

    @abstractmethod
    def weigh(
        self, p: Tensor, pages: Tensor, rounding: Rounding = EIGHT_BIT, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """``sum_t p[t] v[t]`` on the codes, ``[..., R, D]``. ``p`` is not normalised."""

    def see_window(self, k: Tensor, v: Tensor, first_position: int) -> tuple[Tensor, Tensor]:
        """Window tokens ``[..., W, D]`` as attention sees them. Exact unless a format quantizes its open block."""
        return k, v

    def requantize_window(self, v: Tensor, first_position: int) -> Tensor:
        """Window values as stored after an append. Unchanged: requantization elimination is the rule."""
        return v

    def num_pages(self, num_tokens: int) -> int:
        """Pages that a sequence of ``num_tokens`` tokens holds (the rest are sinks and window)."""
        body = num_tokens - self.num_sinks - self.min_window
        return max(body, 0) // self.page_tokens

    def num_exact(self, num_tokens: int) -> int:
        """Tokens of a sequence that are stored exactly: sinks and window."""
        return num_tokens - self.num_pages(num_tokens) * self.page_tokens

    def wire_bytes(self, num_tokens: int, exact_bytes: int = 2) -> int:
        """Bytes of one kv head of one layer on the wire before ``coder`` packs them: pages, sinks, window."""
        exact = self.num_exact(num_tokens) * 2 * self.head_dim * exact_bytes
        return self.num_pages(num_tokens) * self.page_bytes + exact

    def kv_bytes(self, num_tokens: int, exact_bytes: int = 2) -> int:
        """Bytes of one kv head of one layer as decode holds them, everything counted."""
        return self.wire_bytes(num_tokens, exact_bytes)

    def sent_bytes(self, pages: Tensor) -> int:
        """Bytes of ``pages [N, G, P]`` on the wire, frames not counted: what ``coder`` makes of them, if any."""
        if self.coder is None or not len(pages):
            return pages.numel()
        return len(self.coder.encode(pages.cpu().contiguous().numpy().data, pages.shape[0]))

    def bits_per_element(self, num_tokens: int, exact_bytes: int = 2) -> float:
        """``8 * kv_bytes / (2 * D * num_tokens)``."""
        return 4 * self.kv_bytes(num_tokens, exact_bytes) / (self.head_dim * num_tokens)

    def check_tokens(self, k: Tensor, v: Tensor) -> None:
        """Raise ShapeError unless k and v hold whole pages of this head_dim."""
        expected = f"[..., N * {self.page_tokens}, {self.head_dim}] for both k and v"
        if k.shape != v.shape or k.ndim < 2 or k.shape[-1] != self.head_dim or k.shape[-2] % self.page_tokens:
            raise ShapeError(
                f"expected {expected}, found {tuple(k.shape)} and {tuple(v.shape)}; pass whole pages and keep the rest "
                "in the window"
            )

    def check_pages(self, pages: Tensor) -> None:
        """Raise ShapeError unless ``pages`` are uint8 records of this codec's size."""
        if pages.dtype != torch.uint8 or pages.ndim < 2 or pages.shape[-1] != self.page_bytes:
            raise ShapeError(
                f"expected uint8 pages [..., N, {self.page_bytes}] of {self.name}, found {pages.dtype} "
                f"{tuple(pages.shape)}; were they encoded with another format or head_dim?"
            )
