"""TurboQuant-like: rotate, divide by the norm, and round every coordinate to the best levels for a normal variable.

Source: arXiv 2504.19874, section 3.1 (its quantizer for squared error). Differences: docs/rivals.md.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from homkv.errors import FormatError, UnsupportedError
from homkv.formats.minmax import cut, uniform_noise
from homkv.formats.options import Options, Switch, numbers
from homkv.formats.record import PageRecord, Section, codes
from homkv.formats.restored import RestoredCodec
from homkv.quant import hadamard, require_finite
from homkv.spec import PAGE_TOKENS

# Best levels for a standard normal variable, upper half: J. Max, "Quantizing for minimum distortion", 1960, table I.
NORMAL_LEVELS = {
    2: (0.4528, 1.510),
    3: (0.2451, 0.7560, 1.344, 2.152),
    4: (0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733),
}
SIGN_STREAM = 3  # of the hash; HACK's noise uses 0 to 2 and beyond its window


@dataclass(frozen=True)
class TurboOptions(Options):
    """Switches of ``turbo``; names as ``turbo:bits=3,seed=7``.

    ``bits`` per coordinate: 2, 3 or 4. ``seed`` of the rotation. Raises FormatError for any other value.
    """

    base = "turbo"
    switches = (Switch("bits", "bits", numbers(2, 3, 4)), Switch("seed", "seed", None))

    bits: int = 4
    seed: int = 0


class TurboCodec(RestoredCodec):
    """``x ~ rms R^T level[code]``, ``rms = |x| / sqrt(D)``, ``R``: random signs, then Hadamard in the largest blocks.

    Keys and values alike, per token; ``rms`` is fp16. A rotated coordinate is nearly normal with standard deviation
    ``rms``, whatever the vector, so the levels need no data.
    """

    page_tokens = PAGE_TOKENS
    num_sinks = 0
    min_window = 0

    def __init__(self, head_dim: int, options: TurboOptions | None = None) -> None:
        super().__init__(head_dim)
        options = options or TurboOptions()
        if head_dim <= 0 or head_dim % 16:
            raise UnsupportedError(f"expected a head_dim that 16 divides, found {head_dim}; use fp16")
        self.options, self.name = options, options.name
        self._block = head_dim & -head_dim
        noise = uniform_noise(options.seed, SIGN_STREAM, 0, 1, head_dim, torch.device("cpu"))[0]
        self._sign = torch.where(noise < 0.5, -1.0, 1.0)
        upper = torch.tensor(NORMAL_LEVELS[options.bits], dtype=torch.float64, device="cpu")
        self._level = torch.cat((-upper.flip(0), upper))
        self.record = PageRecord(
            [codes(f"{x}_code", PAGE_TOKENS, head_dim, options.bits) for x in "kv"]
            + [Section(f"{x}_rms", (PAGE_TOKENS,), torch.float16) for x in "kv"]
        )
        self.page_bytes = self.record.num_bytes
        self.layout_id = f"turbo/1 bits={options.bits} seed={options.seed} D={head_dim}"

    def encode(self, k: Tensor, v: Tensor, first_position: int = 0) -> Tensor:
        """Quantize and pack whole pages; see PageCodec.encode. Raises FormatError for unstorable values."""
        self.check_tokens(k, v)
        fields: dict[str, Tensor] = {}
        for name, x in (("k", k), ("v", v)):
            x = cut(x.to(torch.float32), -2, PAGE_TOKENS)
            require_finite(x, "keys and values")
            rms = (torch.linalg.vector_norm(x, dim=-1) / self.head_dim**0.5).to(torch.float16)
            if not bool(torch.isfinite(rms).all()):
                raise FormatError(
                    f"expected norms within fp16 (65504), found elements up to {float(x.abs().max()):.4g}; use bf16"
                )
            divisor = torch.where(rms > 0, rms, torch.ones_like(rms)).to(torch.float32).unsqueeze(-1)
            rotated = hadamard(x / divisor * self._sign.to(x.device), self._block)
            level = self._level.to(x.device, torch.float32)
            code = torch.bucketize(rotated, (level[1:] + level[:-1]) / 2)
            fields |= {f"{name}_code": code.to(torch.uint8), f"{name}_rms": rms}
        return self.record.write(fields)

    def _side(self, pages: Tensor, name: str, dtype: torch.dtype) -> Tensor:
        level, sign = self._level.to(pages.device, dtype), self._sign.to(pages.device, dtype)
        unit = hadamard(level[self.record.read(pages, f"{name}_code").to(torch.int64)], self._block) * sign
        return (unit * self.record.read(pages, f"{name}_rms").to(dtype).unsqueeze(-1)).flatten(-3, -2)

    def dense(self, pages: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Keys and values that the pages stand for, ``[..., N * 64, D]``."""
        self.check_pages(pages)
        return self._side(pages, "k", dtype), self._side(pages, "v", dtype)
