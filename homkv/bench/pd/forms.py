"""How a format's KV leaves a prompt: one run of bytes per layer, the same on every link.

Dense: keys, then values, ``[G, T, D]`` each. Pages: exact keys, exact values ``[G, E, D]``, pages ``[N, G, P]``.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from homkv.bench.generate import ModelShape, codec_of
from homkv.formats import PageCodec
from homkv.seal import LayerContent, seal, to_exact

EXACT_DTYPE = torch.bfloat16  # of sinks, windows and the 16-bit baseline
DENSE_DTYPES = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
FP8_MAX = 448.0


def to_dense(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` in 16 bits, or in e4m3, saturated."""
    return x.clamp(-FP8_MAX, FP8_MAX).to(dtype) if dtype.itemsize == 1 else x.to(dtype)


@dataclass(frozen=True)
class Form(ABC):
    """One format of one model's KV."""

    shape: ModelShape

    @abstractmethod
    def payload_bytes(self, num_tokens: int) -> int:
        """Bytes of one layer of a prompt."""

    @abstractmethod
    def pack(self, k: Tensor, v: Tensor, payload: Tensor, status: Tensor) -> None:
        """Write ``k v [G, T, D]`` to ``payload [payload_bytes] uint8``. Sets ``status`` for values it cannot hold."""

    @abstractmethod
    def kv_bytes(self, num_tokens: int) -> int:
        """Bytes that a sequence of this many tokens holds in all layers."""


@dataclass(frozen=True)
class DenseForm(Form):
    """16 bits, or e4m3 with scale 1: what serving engines do without calibration."""

    dtype: torch.dtype

    def payload_bytes(self, num_tokens: int) -> int:
        """See Form."""
        return 2 * self.shape.num_kv_heads * num_tokens * self.shape.head_dim * self.dtype.itemsize

    def pack(self, k: Tensor, v: Tensor, payload: Tensor, status: Tensor) -> None:
        """See Form."""
        for source, place in zip((k, v), payload.view(self.dtype).view(2, *k.shape), strict=True):
            place.copy_(to_dense(source, self.dtype))

    def split(self, payload: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values ``[G, T, D]``, views of the payload."""
        k, v = payload.view(self.dtype).view(2, self.shape.num_kv_heads, -1, self.shape.head_dim)
        return k, v

    def kv_bytes(self, num_tokens: int) -> int:
        """See Form."""
        return self.shape.num_layers * self.payload_bytes(num_tokens)


@dataclass(frozen=True)
class PagesForm(Form):
    """Sinks, pages, window."""

    codec: PageCodec

    def _exact_bytes(self, num_tokens: int) -> int:
        exact = self.codec.num_exact(num_tokens)
        return self.shape.num_kv_heads * exact * self.shape.head_dim * EXACT_DTYPE.itemsize

    def payload_bytes(self, num_tokens: int) -> int:
        """See Form."""
        pages = self.codec.num_pages(num_tokens) * self.shape.num_kv_heads * self.codec.page_bytes
        return 2 * self._exact_bytes(num_tokens) + pages

    def pack(self, k: Tensor, v: Tensor, payload: Tensor, status: Tensor) -> None:
        """See Form."""
        held = None if k.device.type == "cpu" else status  # on a CPU what cannot be stored raises at once
        exact_k, exact_v = to_exact(k, EXACT_DTYPE, "keys", held), to_exact(v, EXACT_DTYPE, "values", held)
        content = seal(self.codec, exact_k, exact_v, 0, status=held)
        place = self.split(payload, k.shape[1])
        place.exact_k.copy_(content.exact_k)
        place.exact_v.copy_(content.exact_v)
        place.pages.copy_(content.pages)

    def split(self, payload: Tensor, num_tokens: int) -> LayerContent:
        """The layer that a payload is, as views of it."""
        n, heads = self._exact_bytes(num_tokens), self.shape.num_kv_heads
        k, v = (x.view(EXACT_DTYPE).view(heads, -1, self.shape.head_dim) for x in (payload[:n], payload[n : 2 * n]))
        pages = payload[2 * n :].view(self.codec.num_pages(num_tokens), heads, self.codec.page_bytes)
        return LayerContent(num_tokens, pages, k, v)

    def kv_bytes(self, num_tokens: int) -> int:
        """See Form."""
        return self.shape.num_layers * self.shape.num_kv_heads * self.codec.kv_bytes(num_tokens)


def make_form(shape: ModelShape, name: str) -> Form:
    """``bf16``, ``fp8`` or a format with pages. Raises FormatError, UnsupportedError."""
    if name in DENSE_DTYPES:
        return DenseForm(shape, DENSE_DTYPES[name])
    return PagesForm(shape, codec_of(shape, name))
