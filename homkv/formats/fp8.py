"""8-bit floating point: what serving systems use today. e4m3 with one scale per page and head."""

import torch
from torch import Tensor

from homkv.formats.minmax import cut
from homkv.formats.record import PageRecord, Section
from homkv.formats.restored import RestoredCodec
from homkv.quant import require_finite
from homkv.spec import PAGE_TOKENS

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max  # 448


class Fp8Codec(RestoredCodec):
    """``x ~ scale * e4m3``, ``scale = max |x| / 448`` of the page's keys, and of its values, in float32.

    The error of an element is at most ``2^-4 |x|``, or ``2^-10 scale`` where e4m3 is subnormal.
    Source: arXiv 2209.05433 (the number format); vLLM's and FlashInfer's ``fp8_e4m3`` caches (one scale per head).
    """

    name = "fp8"
    page_tokens = PAGE_TOKENS
    num_sinks = 0
    min_window = 0

    def __init__(self, head_dim: int) -> None:
        super().__init__(head_dim)
        code_shape = (PAGE_TOKENS, head_dim)
        self.record = PageRecord(
            [Section(f"{x}_code", code_shape, torch.uint8) for x in "kv"]
            + [Section(f"{x}_scale", (1, 1), torch.float32) for x in "kv"]
        )
        self.page_bytes = self.record.num_bytes
        self.layout_id = f"fp8/1 e4m3 D={head_dim}"

    def encode(self, k: Tensor, v: Tensor, first_position: int = 0) -> Tensor:
        """Scale, round and lay down whole pages; see PageCodec.encode. Raises FormatError for values not finite."""
        self.check_tokens(k, v)
        fields: dict[str, Tensor] = {}
        for name, x in (("k", k), ("v", v)):
            x = cut(x.to(torch.float32), -2, PAGE_TOKENS)
            require_finite(x, "keys and values")
            # A constant zero page keeps a divisor; beside it no scale is so small that x / scale overflows.
            scale = (x.abs().amax((-2, -1), keepdim=True) / LARGEST).clamp_min(torch.finfo(torch.float32).tiny)
            code = (x / scale).clamp(-LARGEST, LARGEST).to(E4M3)
            fields |= {f"{name}_code": code.view(torch.uint8), f"{name}_scale": scale}
        return self.record.write(fields)

    def dense(self, pages: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Keys and values, ``[..., N * 64, D]``."""
        self.check_pages(pages)
        k, v = (
            self.record.read(pages, f"{x}_code").view(E4M3).to(dtype) * self.record.read(pages, f"{x}_scale").to(dtype)
            for x in "kv"
        )
        return k.flatten(-3, -2), v.flatten(-3, -2)
