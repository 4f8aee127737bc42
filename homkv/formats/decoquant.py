"""DecoQuant: a matrix split into a large and a small factor; only the large one is quantized.

Source: arXiv 2405.12591 (ACL 2024), section 3. Differences: docs/rivals.md.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from homkv.errors import FormatError, UnsupportedError
from homkv.formats.minmax import SMALLEST_SCALE, cut
from homkv.formats.options import Options, Switch, numbers
from homkv.formats.record import PageRecord, Section, codes
from homkv.formats.restored import RestoredCodec
from homkv.quant import require_finite

CORE = 16  # width of the small factor, as the authors ship it
SMALLEST_SHARE = 1e-6  # of the largest singular value: keeps the factors of a page of low rank finite


@dataclass(frozen=True)
class DecoquantOptions(Options):
    """Switches of ``decoquant``; names as ``decoquant:bits=8,page=128``.

    ``bits`` of the large factor: 2, 3, 4 or 8. ``page``: tokens that share a small factor. Raises FormatError for any
    other value.
    """

    base = "decoquant"
    switches = (Switch("bits", "bits", numbers(2, 3, 4, 8)), Switch("page", "page", numbers(64, 128, 256)))

    bits: int = 4
    page: int = 256


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of ``x [..., T, D]``: large ``[..., T, D]`` and small ``[..., 16, 16]``; 16 channels at a time,
    ``x[t, c] = sum_j large[t, 16 (c // 16) + j] small[j, c % 16]``.

    The two-core matrix product operator of the rows of 16 channels: by singular values ``X = U S V^T``, whose square
    roots both factors share (S relative to the root mean square, so that their size does not grow with T).
    """
    rows = cut(x.to(torch.float64), -1, CORE).flatten(-3, -2)
    square, basis = torch.linalg.eigh(rows.transpose(-1, -2) @ rows / rows.shape[-2])
    singular = square.clamp_min(0).sqrt()
    singular = torch.maximum(singular, singular.amax(-1, keepdim=True) * SMALLEST_SHARE)
    root = torch.where(singular > 0, singular, 1.0).sqrt()
    large = rows @ basis / root.unsqueeze(-2)
    small = root.unsqueeze(-1) * basis.transpose(-1, -2)
    return large.reshape(x.shape).to(torch.float32), small.to(torch.float32)


class DecoquantCodec(RestoredCodec):
    """DecoQuant bound to a head: ``x ~ (scale[t] code) small``, one small factor per page for K and one for V.

    Codes are symmetric, ``scale = max |large| / (2^(bits - 1) - 1)`` per token, fp16; the small factor is fp16.
    """

    num_sinks = 0
    min_window = 0

    def __init__(self, head_dim: int, options: DecoquantOptions | None = None) -> None:
        super().__init__(head_dim)
        options = options or DecoquantOptions()
        if head_dim <= 0 or head_dim % CORE:
            raise UnsupportedError(f"expected a head_dim that {CORE} divides, found {head_dim}; use fp16")
        self.options, self.name, self.page_tokens = options, options.name, options.page
        self.largest = (1 << (options.bits - 1)) - 1
        self.record = PageRecord(
            [codes(f"{x}_code", options.page, head_dim, options.bits) for x in "kv"]
            + [Section(f"{x}_scale", (options.page,), torch.float16) for x in "kv"]
            + [Section(f"{x}_small", (CORE, CORE), torch.float16) for x in "kv"]
        )
        self.page_bytes = self.record.num_bytes
        self.layout_id = f"decoquant/1 bits={options.bits} page={options.page} D={head_dim}"

    def encode(self, k: Tensor, v: Tensor, first_position: int = 0) -> Tensor:
        """Split, quantize and pack whole pages; see PageCodec.encode. Raises FormatError for unstorable values."""
        self.check_tokens(k, v)
        fields: dict[str, Tensor] = {}
        for name, x in (("k", k), ("v", v)):
            x = cut(x.to(torch.float32), -2, self.page_tokens)
            require_finite(x, "keys and values")
            large, small = split(x)
            scale = (large.abs().amax(-1) / self.largest).clamp_min(SMALLEST_SCALE).to(torch.float16)
            small = small.to(torch.float16)
            if not bool(torch.isfinite(scale).all() and torch.isfinite(small).all()):
                raise FormatError(
                    f"expected factors within fp16, found values up to {float(x.abs().max()):.4g}; use bf16"
                )
            code = (large / scale.to(torch.float32).unsqueeze(-1)).round().clamp(-self.largest, self.largest)
            fields |= {f"{name}_code": code + self.largest, f"{name}_scale": scale, f"{name}_small": small}
        return self.record.write(fields)

    def _side(self, pages: Tensor, name: str, dtype: torch.dtype) -> Tensor:
        code, scale, small = (
            self.record.read(pages, f"{name}_{field}").to(dtype) for field in ("code", "scale", "small")
        )
        large = (code - self.largest) * scale.unsqueeze(-1)  # [..., N, T, D]
        return (cut(large, -1, CORE) @ small.unsqueeze(-3)).flatten(-2).flatten(-3, -2)

    def dense(self, pages: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Keys and values that the pages stand for, ``[..., N * T, D]``."""
        self.check_pages(pages)
        return self._side(pages, "k", dtype), self._side(pages, "v", dtype)
