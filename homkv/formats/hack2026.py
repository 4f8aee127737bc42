"""HACK as its authors' code of 2026 has it: K per channel, V per token, scales folded into Q and P.

Source: github.com/Zeyu-ZEYU/HACK (artifact of the ATC '26 paper). Bytes and differences: docs/hack.md.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from homkv.errors import UnsupportedError
from homkv.formats.base import EIGHT_BIT, PageCodec, Rounding
from homkv.formats.hack import BITS, CHANNEL_ALIGN, GROUP_SIZES
from homkv.formats.meter import OVERHEAD
from homkv.formats.minmax import cut, homomorphic_product, quantize, quantize_eight_bit, unrounded, without_scale
from homkv.formats.options import FLAG, Options, Switch
from homkv.formats.record import PageRecord, Section, codes, sums


@dataclass(frozen=True)
class Hack2026Options(Options):
    """Switches of ``hack-2026``; names as ``hack-2026:pi=128,bits=4,se=0``.

    ``group_size``: the paper's Pi, 32, 64 or 128. ``bits`` of K and V codes: 2, 4 or 8. ``summation_elimination``:
    store the sums of codes. Raises FormatError for any other value.
    """

    base = "hack-2026"
    switches = (
        Switch("pi", "group_size", GROUP_SIZES),
        Switch("bits", "bits", BITS),
        Switch("se", "summation_elimination", FLAG),
    )

    group_size: int = 64
    bits: int = 2
    summation_elimination: bool = True


def channel_partition(head_dim: int, group_size: int) -> int:
    """Channels per partition: the first of min(group_size, head_dim), that minus 16, minus 32, ... to divide head_dim.

    Raises UnsupportedError if none does. Source: the authors' code.
    """
    for size in range(min(group_size, head_dim), 0, -CHANNEL_ALIGN):
        if head_dim % size == 0 and size % CHANNEL_ALIGN == 0:
            return size
    raise UnsupportedError(
        f"expected a head_dim that is a multiple of {CHANNEL_ALIGN}, found {head_dim}; use --kv-cache-dtype fp16"
    )


class Hack2026Codec(PageCodec):
    """The later HACK bound to a head.

    ``k[t, c] ~ scale[c] code + minimum[c]`` per page; ``v[t, c] ~ scale[t, p] code + minimum[t, p]``, p: c's partition.
    ``score = sum_p [ sf (f'.k') + mf sum(k') ] + q . k_minimum``, ``f = q k_scale`` rounded to 8 bits per partition;
    ``o = sum_pages [ sg (g'.v') + mg sum(v') ] + sum_t p[t] v_minimum[t]`` with ``g = p v_scale`` rounded per page.
    Four exact sinks, exact open block, rounding to nearest. Raises UnsupportedError for a head_dim off multiples of 16.
    """

    num_sinks = 4
    min_window = 0
    impls = ("reference", "triton")

    def __init__(self, head_dim: int, options: Hack2026Options | None = None) -> None:
        super().__init__(head_dim)
        options = options or Hack2026Options()
        self.options = options
        self.page_tokens = options.group_size
        self.partition = channel_partition(head_dim, options.group_size)
        self.name = options.name
        self.record = PageRecord(self._sections())
        self.page_bytes = self.record.num_bytes
        stored_sums = int(options.summation_elimination)
        self.layout_id = f"hack-2026/1 pi={options.group_size} bits={options.bits} se={stored_sums} D={head_dim}"

    def _sections(self) -> list[Section]:
        tokens, dim, bits = self.page_tokens, self.head_dim, self.options.bits
        parts = dim // self.partition
        out = [codes("k_code", tokens, dim, bits), codes("v_code", dim, tokens, bits)]
        out += [Section(name, (dim,), torch.float16) for name in ("k_scale", "k_minimum")]
        out += [Section(name, (tokens, parts), torch.float16) for name in ("v_scale", "v_minimum")]
        if self.options.summation_elimination:
            out += [sums("k_sum", (tokens, parts), self.partition, bits), sums("v_sum", (dim,), tokens, bits)]
        return out

    def encode(self, k: Tensor, v: Tensor, first_position: int = 0) -> Tensor:
        """Quantize and pack whole pages; see PageCodec.encode. Raises FormatError for unstorable values."""
        self.check_tokens(k, v)
        k, v = (cut(x, -2, self.page_tokens) for x in (k, v))
        keys = quantize(k.transpose(-1, -2), self.options.bits)
        values = quantize(self._partitioned(v), self.options.bits)
        k_code, v_code = keys.code.transpose(-1, -2), values.code.flatten(-2)
        return self.record.write(
            {
                "k_code": k_code,
                "k_scale": keys.scale,
                "k_minimum": keys.minimum,
                "k_sum": self._partitioned(k_code).sum(-1, dtype=torch.int32),
                "v_code": v_code.transpose(-1, -2),
                "v_scale": values.scale,
                "v_minimum": values.minimum,
                "v_sum": v_code.sum(-2, dtype=torch.int32),
            }
        )

    def _partitioned(self, x: Tensor) -> Tensor:
        """``[..., D]`` to ``[..., parts, partition]``."""
        return cut(x, -1, self.partition)

    def _number(self, pages: Tensor, name: str, dtype: torch.dtype) -> Tensor:
        return self.record.read(pages, name).to(dtype)

    def dense(self, pages: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Keys and values that the pages stand for, ``[..., N * Pi, D]``."""
        self.check_pages(pages)
        k_scale, k_minimum = (self._number(pages, name, dtype).unsqueeze(-2) for name in ("k_scale", "k_minimum"))
        v_scale, v_minimum = (self._number(pages, name, dtype).unsqueeze(-1) for name in ("v_scale", "v_minimum"))
        k = self._number(pages, "k_code", dtype) * k_scale + k_minimum
        v = self._partitioned(self._number(pages, "v_code", dtype).transpose(-1, -2)) * v_scale + v_minimum
        return k.flatten(-3, -2), v.flatten(-2).flatten(-3, -2)

    def scores(
        self, q: Tensor, pages: Tensor, rounding: Rounding = EIGHT_BIT, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """``q . k`` on the codes, ``[..., R, N * Pi]``; the minimum's term is one exact number per row and page."""
        self.check_pages(pages)
        q = q.to(dtype)
        folded = q.unsqueeze(-3) * self._number(pages, "k_scale", dtype).unsqueeze(-2)  # [..., N, R, D]
        folded = self._partitioned(folded)
        code = self._partitioned(self.record.read(pages, "k_code"))  # [..., N, Pi, parts, partition]
        code_sum = self._code_sum(pages, "k_sum", code, -1)
        acc = homomorphic_product(
            quantize_eight_bit(folded) if rounding.q else unrounded(folded), without_scale(code, code_sum), dtype
        )
        with OVERHEAD.running():
            minimum = q @ self._number(pages, "k_minimum", dtype).transpose(-1, -2)  # [..., R, N]
            correction = minimum.repeat_interleave(self.page_tokens, -1)
        return acc.transpose(-2, -3).flatten(-2) + correction

    def weigh(
        self, p: Tensor, pages: Tensor, rounding: Rounding = EIGHT_BIT, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """``sum_t p[t] v[t]`` on the codes, ``[..., R, D]``; the weights are folded once per channel partition."""
        self.check_pages(pages)
        blocks = cut(p.to(dtype), -1, self.page_tokens).transpose(-2, -3)  # [..., N, R, Pi]
        v_scale = self._number(pages, "v_scale", dtype).transpose(-1, -2)  # [..., N, parts, Pi]
        folded = (blocks.unsqueeze(-3) * v_scale.unsqueeze(-2)).unsqueeze(-2)  # [..., N, parts, R, 1, Pi]
        v_code = self.record.read(pages, "v_code")  # [..., N, D, Pi]
        v_sum = self._code_sum(pages, "v_sum", v_code, -1)
        codes_of_part = cut(v_code, -2, self.partition).unsqueeze(-2)  # [..., N, parts, partition, 1, Pi]
        acc = homomorphic_product(
            quantize_eight_bit(folded) if rounding.p else unrounded(folded),
            without_scale(codes_of_part, self._partitioned(v_sum).unsqueeze(-1)),
            dtype,
        )  # [..., N, parts, R, partition]
        with OVERHEAD.running():
            minimum = (blocks @ self._number(pages, "v_minimum", dtype)).sum(-3)  # [..., R, parts]
        out = acc.sum(-4).transpose(-2, -3) + minimum.unsqueeze(-1)
        return out.flatten(-2)

    def _code_sum(self, pages: Tensor, name: str, code: Tensor, dim: int) -> Tensor:
        """Stored sums, or without summation elimination the sums of the codes, taken anew at every use."""
        if not self.options.summation_elimination:
            with OVERHEAD.running():
                return code.sum(dim, dtype=torch.int32)
        return self.record.read(pages, name)
