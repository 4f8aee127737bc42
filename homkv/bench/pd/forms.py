"""How a format's KV leaves a prompt: one run of bytes per layer, the same on every link.

Dense: keys, then values, ``[G, T, D]`` each. Pages: exact keys, exact values ``[G, E, D]``, pages ``[N, G, P]``.
KIVI's: codes, scales and offsets of keys, then of values, then exact keys and exact values ``[G, E, D]``.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from homkv.bench.generate import ModelShape, codec_of
from homkv.bench.peers.kivi_codes import LARGEST, KiviCache, quantize
from homkv.errors import FormatError, UnsupportedError
from homkv.formats import PageCodec
from homkv.formats.hack import HackCodec
from homkv.formats.kivi import KiviOptions
from homkv.seal import LayerContent, seal, to_exact

EXACT_DTYPE = torch.bfloat16  # of sinks, windows and the 16-bit baseline
DENSE_DTYPES = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
FP8_MAX = 448.0
KIVI = KiviOptions()  # the form without options; others are pages


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


@dataclass(frozen=True)
class KiviForm(Form):
    """KIVI with its defaults: 2-bit codes, and the newest 128 to 159 tokens in 16 bits, attended to as they are.

    Where heads have 128 channels as many bytes as the pages of ``kivi``: values share a scale per quarter of a head.
    """

    def num_coded(self, num_tokens: int) -> int:
        """How many of a sequence's oldest tokens are codes."""
        return max(num_tokens - KIVI.residual, 0) // KIVI.group_size * KIVI.group_size

    def parts(self, num_tokens: int) -> list[tuple[torch.dtype, int, int]]:
        """What a kv head holds: dtype, rows, elements of a row."""
        dim, coded = self.shape.head_dim, self.num_coded(num_tokens)
        groups = [(torch.float16, coded // KIVI.group_size, dim)] * 2
        quarters = [(torch.float16, coded, 4)] * 2
        codes, exact = (torch.uint8, coded, dim // 4), (EXACT_DTYPE, num_tokens - coded, dim)
        return [codes, *groups, codes, *quarters, exact, exact]

    def payload_bytes(self, num_tokens: int) -> int:
        """See Form."""
        return self.shape.num_kv_heads * sum(
            dtype.itemsize * rows * width for dtype, rows, width in self.parts(num_tokens)
        )

    def pack(self, k: Tensor, v: Tensor, payload: Tensor, status: Tensor) -> None:
        """See Form."""
        coded, held = self.num_coded(k.shape[1]), None if k.device.type == "cpu" else status
        exact_k, exact_v = to_exact(k, EXACT_DTYPE, "keys", held), to_exact(v, EXACT_DTYPE, "values", held)
        cache, *places = self.split(payload, k.shape[1])
        for place, exact in zip(places, (exact_k, exact_v), strict=True):
            place.copy_(exact[:, coded:])
        if not coded:
            return
        if held is None:
            code_on_cpu(exact_k[None, :, :coded], exact_v[None, :, :coded], cache, 0)
        else:
            from homkv.bench.peers.kivi_store import code_prompt  # Triton is optional

            code_prompt(exact_k[:, :coded], exact_v[:, :coded], cache, held)

    def split(self, payload: Tensor, num_tokens: int) -> tuple[KiviCache, Tensor, Tensor]:
        """Codes of one sequence, exact keys and values ``[G, E, D]``: views of the payload."""
        found, at, heads = [], 0, self.shape.num_kv_heads
        for dtype, rows, width in self.parts(num_tokens):
            stop = at + heads * rows * width * dtype.itemsize
            found.append(payload[at:stop].view(dtype).view(heads, rows, width))
            at = stop
        return KiviCache(*(x[None] for x in found[:6])), found[6], found[7]

    def kv_bytes(self, num_tokens: int) -> int:
        """See Form."""
        return self.shape.num_layers * self.payload_bytes(num_tokens)


def code_on_cpu(k: Tensor, v: Tensor, cache: KiviCache, first: int) -> None:
    """Code whole groups ``k v [1, G, T, D]`` at token ``first``. Raises FormatError for values beyond float16's."""
    if not bool((torch.maximum(k.abs(), v.abs()) <= LARGEST).all()):
        raise FormatError(f"expected keys and values up to {LARGEST:g} for kivi, found others; use bf16")
    for place, made in zip(cache.tensors, quantize(k, v, KIVI.group_size).tensors, strict=True):
        start = first * made.shape[2] // k.shape[2]
        place[:, :, start : start + made.shape[2]] = made


def make_form(shape: ModelShape, name: str) -> Form:
    """``bf16``, ``fp8``, ``kivi`` or a format with pages. Raises FormatError, UnsupportedError."""
    if name in DENSE_DTYPES:
        return DenseForm(shape, DENSE_DTYPES[name])
    if name == KIVI.name:
        return KiviForm(shape)
    codec = codec_of(shape, name)
    if codec.coder is not None:
        raise UnsupportedError(
            f"expected a format whose pages cross the link as they are, found {name}, which packs them; use "
            "`homkv bench jct --real`"
        )
    if isinstance(codec, HackCodec) and not codec.options.requantization_elimination:
        raise UnsupportedError(
            f"expected hack with requantization elimination, found {name}; use `homkv bench jct --real` for rqe=0"
        )
    return PagesForm(shape, codec)


def check_kernels(form: Form, name: str) -> None:
    """Raise UnsupportedError for a form that GPUs have no kernel for: restored in torch it would be no rival."""
    if isinstance(form, PagesForm) and "triton" not in form.codec.impls:
        raise UnsupportedError(
            f"expected a format with kernels for GPUs, found {name}; kivi without options has some, others need CPUs"
        )
