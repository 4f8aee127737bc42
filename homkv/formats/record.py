"""A page as a record of typed sections: codes packed along the inner dimension, fp16 numbers, integer sums."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor


@dataclass(frozen=True)
class Section:
    """One field of a page. ``bits`` of a code (1 to 4, 8), or None for plain little-endian numbers of ``dtype``."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    bits: int | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes in the page."""
        return prod(self.shape) * (self.bits or 8 * self.dtype.itemsize) // 8


def codes(name: str, rows: int, size: int, bits: int) -> Section:
    """A section of ``rows`` packed rows of ``size`` codes."""
    return Section(name, (rows, size), torch.uint8, bits)


def sums(name: str, shape: tuple[int, ...], size: int, bits: int) -> Section:
    """A section of code sums over ``size`` codes: uint8 if the largest sum fits, else int16."""
    largest = size * ((1 << bits) - 1)
    assert largest <= torch.iinfo(torch.int16).max
    return Section(name, shape, torch.uint8 if largest <= 255 else torch.int16)


class PageRecord:
    """Sections one after the other, in the order given; ``num_bytes`` in all."""

    def __init__(self, sections: Sequence[Section]) -> None:
        self.sections = tuple(sections)
        self.offsets: dict[str, int] = {}
        self.num_bytes = 0
        for section in self.sections:
            assert self.num_bytes % 4 == 0  # keeps fp16 and int16 aligned
            self.offsets[section.name] = self.num_bytes
            self.num_bytes += section.num_bytes
        assert self.num_bytes % 4 == 0

    def write(self, fields: Mapping[str, Tensor]) -> Tensor:
        """Pages ``[..., P] uint8`` from one tensor ``[..., *shape]`` per section; other names are ignored."""
        parts = []
        for section in self.sections:
            x = fields[section.name].to(section.dtype).flatten(-len(section.shape))
            parts.append(x.contiguous().view(torch.uint8) if section.bits is None else pack(x, section.bits))
        return torch.cat(parts, -1)

    def read(self, pages: Tensor, name: str) -> Tensor:
        """One section of ``pages [..., P]``, unpacked: ``[..., *shape]``."""
        section = next(s for s in self.sections if s.name == name)
        at = self.offsets[name]
        # A fresh copy: its storage is aligned wherever the page lies.
        raw = pages[..., at : at + section.num_bytes].clone(memory_format=torch.contiguous_format)
        if section.bits is None:
            return torch.unflatten(raw.view(section.dtype), -1, section.shape)
        return torch.unflatten(unpack(raw, section.bits), -1, section.shape)


def pack(code: Tensor, bits: int) -> Tensor:
    """``[..., n] uint8`` codes to ``[..., n * bits / 8]`` bytes; the first of each byte lies in its lowest bits.

    Codes of 3 bits are two runs of bytes: their lower two bits, then their highest bit.
    """
    if bits == 3:
        return torch.cat((pack(code & 3, 2), pack(code >> 2, 1)), -1)
    fields = torch.unflatten(code, -1, (-1, 8 // bits)) << _shifts(bits, code.device)
    return fields.sum(-1, dtype=torch.uint8)


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Inverse of :func:`pack`."""
    if bits == 3:
        lower, highest = packed.tensor_split([packed.shape[-1] // 3 * 2], -1)
        return unpack(lower, 2) | (unpack(highest, 1) << 2)
    return ((packed.unsqueeze(-1) >> _shifts(bits, packed.device)) & ((1 << bits) - 1)).flatten(-2)


def _shifts(bits: int, device: torch.device) -> Tensor:
    return torch.arange(0, 8, bits, dtype=torch.uint8, device=device)
