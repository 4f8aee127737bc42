"""CacheGen: a codec of the wire. Pages are quantized and entropy coded to be sent, and restored when they arrive.

Source: arXiv 2310.07240 (SIGCOMM 2024), section 5, and LMCache's ``cachegen`` serializer. Differences: docs/rivals.md.
"""

import copy
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from homkv.errors import FormatError, UnsupportedError
from homkv.formats.entropy import ChannelCoder
from homkv.formats.minmax import SMALLEST_SCALE, cut
from homkv.formats.options import Options, Switch
from homkv.formats.record import PageRecord, Section
from homkv.formats.restored import RestoredCodec
from homkv.quant import require_finite

ANCHOR_LEVEL = 127  # codes of anchors: -127 .. 127
GROUP = 10  # tokens that share an anchor


@dataclass(frozen=True)
class CachegenOptions(Options):
    """Switches of ``cachegen``; names as ``cachegen:as=published``.

    ``variant``: "shipped", the authors' code and LMCache's, or "published", the paper's deltas to anchor tokens.
    Raises FormatError for any other value.
    """

    base = "cachegen"
    switches = (Switch("as", "variant", {"shipped": "shipped", "published": "published"}),)

    variant: str = "shipped"


def shipped_levels(layer: int, num_layers: int) -> tuple[int, int]:
    """Largest code of K and of V: 32 bins for K in the first 10 layers and V in the first 2, else 16."""
    return 15 if layer < 10 else 7, 15 if layer < 2 else 7


def published_levels(layer: int, num_layers: int) -> tuple[int, int]:
    """Largest code of K and of V deltas: 15, 15 and 7 levels by thirds of the depth, more in the first layer.

    The paper gives coarser bins to deeper layers; these counts are those of the HACK authors' CacheGen.
    """
    if layer == 0:
        return 127, 7
    return (7, 7, 3)[3 * layer // num_layers], 2


def round_rows(x: Tensor, largest: int) -> tuple[Tensor, Tensor]:
    """``x [..., D] ~ step * code``, ``step = max |x| / largest`` in fp16: codes ``[..., D] int8`` and steps ``[...]``.

    The error is at most half a step, or what rounding the step to fp16 took: ``largest * |step - fp16(step)|``.
    """
    step = (x.abs().amax(-1) / largest).clamp_min(SMALLEST_SCALE).to(torch.float16)
    if not bool(torch.isfinite(step).all()):
        raise FormatError(f"expected steps within fp16, found {float(x.abs().max()):.4g} / {largest}; use fp16")
    code = (x / step.to(torch.float32).unsqueeze(-1)).round().clamp(-largest, largest)
    return code.to(torch.int8), step


def restore_rows(code: Tensor, step: Tensor, dtype: torch.dtype) -> Tensor:
    """Inverse of :func:`round_rows` but for the rounding."""
    return code.to(dtype) * step.to(dtype).unsqueeze(-1)


class CachegenCodec(RestoredCodec):
    """CacheGen bound to a head, and by :meth:`at_layer` to a layer, which decides how fine the steps are.

    A page is ``k_code v_code [T, D] int8`` and one step per token: the form between quantizer and entropy coder.
    ``published``: every tenth token of a page is an anchor of 8 bits, the keys of the nine behind it are differences to
    it; values are not differenced. What is sent is :attr:`coder`'s; what is held is 16 bits per element.
    """

    num_sinks = 0
    min_window = 0
    restored_on_arrival = True

    def __init__(self, head_dim: int, options: CachegenOptions | None = None) -> None:
        super().__init__(head_dim)
        options = options or CachegenOptions()
        if head_dim <= 0 or head_dim % 4:
            raise UnsupportedError(f"expected a head_dim that 4 divides, found {head_dim}; use fp16")
        self.options, self.name = options, options.name
        self.published = options.variant == "published"
        self.page_tokens = 8 * GROUP if self.published else 256  # LMCache's chunk
        self.levels = self._levels(0, 1)
        code, step = (self.page_tokens, head_dim), (self.page_tokens,)
        self.record = PageRecord(
            [Section(f"{x}_code", code, torch.int8) for x in "kv"]
            + [Section(f"{x}_step", step, torch.float16) for x in "kv"]
        )
        self.page_bytes = self.record.num_bytes
        self.layout_id = f"cachegen/1 {options.variant} D={head_dim}"
        shape = (head_dim, self.page_tokens, self.page_bytes)
        self.coder = ChannelCoder(*shape, None, "u1") if self.published else ChannelCoder(*shape, 1, "u2")

    def _levels(self, layer: int, num_layers: int) -> tuple[int, int]:
        return (published_levels if self.published else shipped_levels)(layer, num_layers)

    def at_layer(self, layer: int, num_layers: int) -> Self:
        """See PageCodec.at_layer."""
        bound = copy.copy(self)
        bound.levels = self._levels(layer, num_layers)
        return bound

    def kv_bytes(self, num_tokens: int, exact_bytes: int = 2) -> int:
        """Bytes of one kv head of one layer as decode holds them: 16 bits per element."""
        return 2 * self.head_dim * exact_bytes * num_tokens

    def encode(self, k: Tensor, v: Tensor, first_position: int = 0) -> Tensor:
        """Quantize whole pages; see PageCodec.encode. Raises FormatError for unstorable values."""
        self.check_tokens(k, v)
        k, v = (cut(x.to(torch.float32), -2, self.page_tokens) for x in (k, v))
        require_finite(k, "keys")
        require_finite(v, "values")
        k_level, v_level = self.levels
        k_code, k_step = self._round_deltas(k, k_level) if self.published else round_rows(k, k_level)
        v_code, v_step = round_rows(v, v_level)
        return self.record.write({"k_code": k_code, "k_step": k_step, "v_code": v_code, "v_step": v_step})

    def _round_deltas(self, k: Tensor, largest: int) -> tuple[Tensor, Tensor]:
        """Keys ``[..., T, D]`` of whole groups: anchors in 8 bits, then differences to the restored anchor."""
        groups = cut(k, -2, GROUP)
        anchor_code, anchor_step = round_rows(groups[..., :1, :], ANCHOR_LEVEL)
        delta = groups[..., 1:, :] - restore_rows(anchor_code, anchor_step, torch.float32)
        code, step = round_rows(delta, largest)
        return torch.cat((anchor_code, code), -2).flatten(-3, -2), torch.cat((anchor_step, step), -1).flatten(-2)

    def dense(self, pages: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Keys and values that the pages stand for, ``[..., N * T, D]``."""
        self.check_pages(pages)
        k, v = (
            restore_rows(self.record.read(pages, f"{x}_code"), self.record.read(pages, f"{x}_step"), dtype)
            for x in "kv"
        )
        if self.published:
            groups = cut(k, -2, GROUP)
            anchor = groups[..., :1, :]
            k = torch.cat((anchor, groups[..., 1:, :] + anchor), -2).flatten(-3, -2)
        return k.flatten(-3, -2), v.flatten(-3, -2)
