"""HACK as published (arXiv 2502.03589 v1): K per token, V per channel, both along their product's inner dimension.

Bytes, algebra and what is our reading of the paper: docs/hack.md.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from homkv.errors import UnsupportedError
from homkv.formats.base import EIGHT_BIT, PageCodec, Rounding
from homkv.formats.meter import OVERHEAD
from homkv.formats.minmax import (
    Operand,
    cut,
    homomorphic_product,
    quantize,
    quantize_eight_bit,
    uniform_noise,
    unrounded,
)
from homkv.formats.options import FLAG, Options, Switch, numbers
from homkv.formats.record import PageRecord, Section, codes, sums

CHANNEL_ALIGN = 16  # channels: the step of the integer matmul instructions that these pages are laid out for
KEY_STREAM, VALUE_STREAM, WINDOW_STREAM = 0, 1, 2  # of the rounding noise; WINDOW_STREAM + the window's length


GROUP_SIZES = numbers(32, 64, 128)
BITS = numbers(2, 4, 8)


@dataclass(frozen=True)
class HackOptions(Options):
    """Switches of ``hack``; names as ``hack:pi=32,bits=4,rounding=nearest,seed=7,se=0,rqe=0,prefill=int8``.

    ``group_size``: the paper's Pi, 32, 64 or 128. ``bits`` of K and V codes: 2, 4 or 8. ``rounding``: "stochastic" with
    ``seed``, or "nearest". ``summation_elimination``: store the sums of codes. ``requantization_elimination``: keep the
    open block of V exact. ``prefill``: "exact", or "int8" for attention on codes (homkv.formats.hack_prefill).
    Raises FormatError for any other value.
    """

    base = "hack"
    switches = (
        Switch("pi", "group_size", GROUP_SIZES),
        Switch("bits", "bits", BITS),
        Switch("rounding", "rounding", {"stochastic": "stochastic", "nearest": "nearest"}),
        Switch("seed", "seed", None),
        Switch("se", "summation_elimination", FLAG),
        Switch("rqe", "requantization_elimination", FLAG),
        Switch("prefill", "prefill", {"exact": "exact", "int8": "int8"}),
    )

    group_size: int = 64
    bits: int = 2
    rounding: str = "stochastic"
    seed: int = 0
    summation_elimination: bool = True
    requantization_elimination: bool = True
    prefill: str = "exact"


class HackCodec(PageCodec):
    """HACK v1 bound to a head.

    ``k[t, c] ~ scale[t, p] code + minimum[t, p]``: p is c's partition of ``group_size`` channels, or of all channels
    if they are fewer. ``v[t, c] ~ scale[c] code + minimum[c]`` over a page of ``group_size`` tokens.
    ``score = sum_p [ sq sk (q'.k') + mk sq sum(q') + mq sk sum(k') + size mq mk ]``; the output likewise with P and V.
    Q and P are rounded to 8 bits per row and partition, to nearest. Source: arXiv 2502.03589 v1, Eq. 3.
    Raises UnsupportedError if ``head_dim`` cannot be cut into partitions.
    """

    num_sinks = 0
    min_window = 0
    impls = ("reference", "triton")

    def __init__(self, head_dim: int, options: HackOptions | None = None) -> None:
        super().__init__(head_dim)
        options = options or HackOptions()
        self.options = options
        self.page_tokens = options.group_size
        self.partition = min(options.group_size, head_dim)
        if head_dim <= 0 or head_dim % self.partition or head_dim % CHANNEL_ALIGN:
            raise UnsupportedError(
                f"expected a multiple of {CHANNEL_ALIGN} that pi={options.group_size} divides or exceeds as head_dim, "
                f"found {head_dim}; choose another pi, or hack-2026, which fits its partitions to the head"
            )
        self.name = options.name
        self.record = PageRecord(self._sections())
        self.page_bytes = self.record.num_bytes
        stored_sums = int(options.summation_elimination)
        self.layout_id = f"hack/1 pi={options.group_size} bits={options.bits} se={stored_sums} D={head_dim}"

    def _sections(self) -> list[Section]:
        tokens, dim, bits = self.page_tokens, self.head_dim, self.options.bits
        parts = dim // self.partition
        out = [codes("k_code", tokens, dim, bits), codes("v_code", dim, tokens, bits)]
        out += [Section(name, (tokens, parts), torch.float16) for name in ("k_scale", "k_minimum")]
        out += [Section(name, (dim,), torch.float16) for name in ("v_scale", "v_minimum")]
        if self.options.summation_elimination:
            out += [sums("k_sum", (tokens, parts), self.partition, bits), sums("v_sum", (dim,), tokens, bits)]
        return out

    def _noise(self, stream: int, first_position: int, num_tokens: int, device: torch.device) -> Tensor | None:
        if self.options.rounding == "nearest":
            return None
        return uniform_noise(self.options.seed, stream, first_position, num_tokens, self.head_dim, device)

    def quantize_keys(self, k: Tensor, first_position: int) -> Operand:
        """Any number of keys ``[..., T, D]``, one row per token: ``[..., T, parts, partition]``. Raises FormatError."""
        noise = self._noise(KEY_STREAM, first_position, k.shape[-2], k.device)
        if noise is not None:
            noise = cut(noise, -1, self.partition)
        return quantize(cut(k, -1, self.partition), self.options.bits, noise)

    def quantize_values(self, v: Tensor, first_position: int) -> Operand:
        """Whole blocks of values ``[..., N * Pi, D]``, one row per channel: ``[..., D, N, Pi]``. Raises FormatError."""
        noise = self._noise(VALUE_STREAM, first_position, v.shape[-2], v.device)
        if noise is not None:
            noise = cut(noise.T, -1, self.page_tokens)
        return quantize(cut(v.transpose(-1, -2), -1, self.page_tokens), self.options.bits, noise)

    def encode(self, k: Tensor, v: Tensor, first_position: int = 0) -> Tensor:
        """Quantize and pack whole pages; see PageCodec.encode. Raises FormatError for unstorable values."""
        self.check_tokens(k, v)
        keys, values = self.quantize_keys(k, first_position), self.quantize_values(v, first_position)
        block = self.page_tokens
        return self.record.write(
            {
                "k_code": cut(keys.code.flatten(-2), -2, block),
                "k_scale": cut(keys.scale, -2, block),
                "k_minimum": cut(keys.minimum, -2, block),
                "k_sum": cut(keys.code_sum, -2, block),
                "v_code": values.code.transpose(-2, -3),
                "v_scale": values.scale.transpose(-1, -2),
                "v_minimum": values.minimum.transpose(-1, -2),
                "v_sum": values.code_sum.transpose(-1, -2),
            }
        )

    def _keys(self, pages: Tensor) -> Operand:
        """``[..., N * Pi, parts, partition]``."""
        code = cut(self.record.read(pages, "k_code"), -1, self.partition).flatten(-4, -3)
        scale, minimum = (self.record.read(pages, name).flatten(-3, -2) for name in ("k_scale", "k_minimum"))
        return Operand(code, scale, minimum, self._code_sum(pages, "k_sum", code, flat=True))

    def _values(self, pages: Tensor) -> Operand:
        """``[..., D, N, Pi]``."""
        code = self.record.read(pages, "v_code").transpose(-2, -3)
        scale, minimum = (self.record.read(pages, name).transpose(-1, -2) for name in ("v_scale", "v_minimum"))
        return Operand(code, scale, minimum, self._code_sum(pages, "v_sum", code, flat=False))

    def _code_sum(self, pages: Tensor, name: str, code: Tensor, *, flat: bool) -> Tensor:
        """Stored sums, or without summation elimination the sums of the codes, taken anew at every use."""
        if not self.options.summation_elimination:
            with OVERHEAD.running():
                return code.sum(-1, dtype=torch.int32)
        stored = self.record.read(pages, name)
        return stored.flatten(-3, -2) if flat else stored.transpose(-1, -2)

    def dense(self, pages: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Keys and values that the pages stand for, ``[..., N * Pi, D]``."""
        self.check_pages(pages)
        k = self._keys(pages).dense(dtype).flatten(-2)
        return k, self._values(pages).dense(dtype).flatten(-2).transpose(-1, -2)

    def query_operand(self, q: Tensor, rounding: Rounding, dtype: torch.dtype) -> Operand:
        """Queries ``[..., R, D]`` as one side of the score's product, 8 bits per row and partition."""
        partitions = cut(q.to(dtype), -1, self.partition)
        return quantize_eight_bit(partitions) if rounding.q else unrounded(partitions)

    def weight_operand(self, p: Tensor, rounding: Rounding, dtype: torch.dtype) -> Operand:
        """Softmax weights ``[..., R, N * Pi]`` as one side of the output's product, 8 bits per row and block."""
        blocks = cut(p.to(dtype), -1, self.page_tokens)
        return quantize_eight_bit(blocks) if rounding.p else unrounded(blocks)

    def scores(
        self, q: Tensor, pages: Tensor, rounding: Rounding = EIGHT_BIT, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """``q . k`` on the codes, ``[..., R, N * Pi]``; see PageCodec.scores."""
        self.check_pages(pages)
        return homomorphic_product(self.query_operand(q, rounding, dtype), self._keys(pages), dtype)

    def weigh(
        self, p: Tensor, pages: Tensor, rounding: Rounding = EIGHT_BIT, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """``sum_t p[t] v[t]`` on the codes, ``[..., R, D]``; see PageCodec.weigh."""
        self.check_pages(pages)
        return homomorphic_product(self.weight_operand(p, rounding, dtype), self._values(pages), dtype)

    def see_window(self, k: Tensor, v: Tensor, first_position: int) -> tuple[Tensor, Tensor]:
        """Keys are quantized the moment they arrive (their partitions lie inside the token): the same codes as in the
        page they will fill, returned dense in float32. Values as stored: exact, or requantized after every append.
        """
        return self.quantize_keys(k, first_position).dense(torch.float32).flatten(-2), v

    def requantize_window(self, v: Tensor, first_position: int) -> Tensor:
        """Open block of values after an append. Unchanged with requantization elimination.

        Without it the stored values ``[..., W, D]`` are quantized again per channel over the W tokens so far and stand
        for themselves from then on, so that errors accumulate (the paper's ablation).
        """
        num_tokens = v.shape[-2]
        if self.options.requantization_elimination or num_tokens == 0:
            return v
        with OVERHEAD.running():
            noise = self._noise(WINDOW_STREAM + num_tokens, first_position, num_tokens, v.device)
            channels = quantize(v.transpose(-1, -2), self.options.bits, None if noise is None else noise.T)
            return channels.dense(torch.float32).transpose(-1, -2).to(v.dtype)
