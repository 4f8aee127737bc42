"""KIVI: keys per channel, values per token, restored before attention; the newest tokens in 16 bits.

Source: arXiv 2402.02750, sections 3.2 and 3.3, and github.com/jy-yuan/KIVI. Differences: docs/rivals.md.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from homkv.errors import FormatError, UnsupportedError
from homkv.formats.minmax import Operand, affine, cut, quantize
from homkv.formats.options import Options, Switch, numbers
from homkv.formats.record import PageRecord, Section, codes
from homkv.formats.restored import RestoredCodec


@dataclass(frozen=True)
class KiviOptions(Options):
    """Switches of ``kivi``; names as ``kivi:bits=4,g=64,r=64``.

    ``bits`` of K and V codes: 2 or 4. ``group_size``: tokens per group of a key channel, and channels per group of a
    value. ``residual``: R, values that stay exact; keys are quantized R at a time. Raises FormatError for any other
    value, and unless the group divides the residual.
    """

    base = "kivi"
    switches = (
        Switch("bits", "bits", numbers(2, 4)),
        Switch("g", "group_size", numbers(32, 64, 128)),
        Switch("r", "residual", numbers(32, 64, 128, 256)),
    )

    bits: int = 2
    group_size: int = 32
    residual: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.residual % self.group_size:
            raise FormatError(
                f"expected a residual that is a multiple of the group, found r={self.residual} and g={self.group_size}"
            )


class KiviCodec(RestoredCodec):
    """KIVI bound to a head; a page is one group of tokens.

    ``x ~ scale code + minimum`` with ``scale = (max - min) / (2^bits - 1)``, both fp16: K per channel over the page's
    ``g`` tokens, V per token over ``g`` channels. Attention sees the newest ``R`` values and the keys behind the last
    multiple of ``R`` exactly, the rest quantized; the window holds what either needs, so ``R`` to ``R + g - 1`` tokens.
    Raises UnsupportedError if groups do not divide ``head_dim``.
    """

    num_sinks = 0

    def __init__(self, head_dim: int, options: KiviOptions | None = None) -> None:
        super().__init__(head_dim)
        options = options or KiviOptions()
        self.options = options
        self.page_tokens, self.min_window = options.group_size, options.residual
        self.group = min(options.group_size, head_dim)
        if head_dim <= 0 or head_dim % self.group or head_dim % 8:
            raise UnsupportedError(
                f"expected a head_dim that groups of {options.group_size} channels divide, found {head_dim}; choose "
                "another g"
            )
        self.name = options.name
        self.record = PageRecord(self._sections())
        self.page_bytes = self.record.num_bytes
        self.layout_id = f"kivi/1 bits={options.bits} g={options.group_size} r={options.residual} D={head_dim}"

    def _sections(self) -> list[Section]:
        tokens, dim, bits = self.page_tokens, self.head_dim, self.options.bits
        groups = (tokens, dim // self.group)
        return [
            codes("k_code", dim, tokens, bits),
            codes("v_code", tokens, dim, bits),
            *(Section(name, (dim,), torch.float16) for name in ("k_scale", "k_minimum")),
            *(Section(name, groups, torch.float16) for name in ("v_scale", "v_minimum")),
        ]

    def quantize_keys(self, k: Tensor) -> Operand:
        """Whole groups of keys ``[..., N * g, D]``, one partition per channel and group: ``[..., N, D, g]``."""
        return quantize(cut(k, -2, self.page_tokens).transpose(-1, -2), self.options.bits)

    def quantize_values(self, v: Tensor) -> Operand:
        """Any number of values ``[..., T, D]``: ``[..., T, groups, g]``."""
        return quantize(cut(v, -1, self.group), self.options.bits)

    def encode(self, k: Tensor, v: Tensor, first_position: int = 0) -> Tensor:
        """Quantize and pack whole pages; see PageCodec.encode. Raises FormatError for unstorable values."""
        self.check_tokens(k, v)
        keys, values = self.quantize_keys(k), self.quantize_values(v)
        return self.record.write(
            {
                "k_code": keys.code,
                "k_scale": keys.scale,
                "k_minimum": keys.minimum,
                "v_code": cut(values.code.flatten(-2), -2, self.page_tokens),
                "v_scale": cut(values.scale, -2, self.page_tokens),
                "v_minimum": cut(values.minimum, -2, self.page_tokens),
            }
        )

    def dense(self, pages: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Keys and values that the pages stand for, ``[..., N * g, D]``."""
        self.check_pages(pages)
        k_code, k_scale, k_minimum, v_code, v_scale, v_minimum = (
            self.record.read(pages, f"{x}_{field}") for x in "kv" for field in ("code", "scale", "minimum")
        )
        k = affine(k_code, k_scale, k_minimum, dtype)  # [..., N, D, g]
        v = affine(cut(v_code, -1, self.group), v_scale, v_minimum, dtype)  # [..., N, g, groups, group]
        return k.transpose(-1, -2).flatten(-3, -2), v.flatten(-2).flatten(-3, -2)

    def see_window(self, k: Tensor, v: Tensor, first_position: int) -> tuple[Tensor, Tensor]:
        """Window tokens as KIVI has them when the newest one attends: restored from codes where R has passed.

        Before the newest token came, keys had been quantized up to the last multiple of R, values but for the R newest.
        """
        older, residual = first_position + k.shape[-2] - 1, self.options.residual
        num_k = max(older // residual * residual - first_position, 0)
        num_v = max(older - residual - first_position, 0)
        if num_k:
            restored = self.quantize_keys(k[..., :num_k, :]).dense(torch.float32)
            k = torch.cat((restored.transpose(-1, -2).flatten(-3, -2), k[..., num_k:, :]), -2)
        if num_v:
            restored = self.quantize_values(v[..., :num_v, :]).dense(torch.float32)
            v = torch.cat((restored.flatten(-2), v[..., num_v:, :]), -2)
        return k, v
