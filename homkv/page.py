"""Codes <-> page bytes: the byte map of docs/format.md, nothing else."""

from collections.abc import Sequence

import torch
from torch import Tensor

from homkv.quant import QuantizedRows
from homkv.spec import PAGE_TOKENS, ChannelClass, PageLayout

MASK = {2: 0xC0, 4: 0xF0, 8: 0xFF}
HALF = {2: 0x20, 4: 0x08, 8: 0x00}


def pack_codes(lanes: Tensor, cls: ChannelClass, *, reduce_channels: bool) -> Tensor:
    """Lane values ``[..., 64, w] int8`` to bytes ``[..., code_bytes] uint8``.

    ``reduce_channels``: a dword holds four channels of one token (K); else four tokens of one channel (V).
    """
    lead, width = lanes.shape[:-2], cls.width
    planes = (lanes.view(torch.uint8) & MASK[cls.bits]).reshape(*lead, cls.planes, cls.lanes, width)
    packed = planes[..., 0, :, :].clone()
    for i in range(1, cls.planes):
        packed |= planes[..., i, :, :] >> (cls.bits * i)
    if reduce_channels:
        packed = packed.reshape(*lead, cls.lanes, width // 4, 4).transpose(-2, -3)
    else:
        packed = packed.reshape(*lead, cls.lanes // 4, 4, width).transpose(-1, -2)
    return packed.reshape(*lead, cls.code_bytes)


def unpack_codes(codes: Tensor, cls: ChannelClass, *, reduce_channels: bool) -> Tensor:
    """Inverse of :func:`pack_codes`: ``[..., code_bytes] uint8`` to lane values ``[..., 64, w] int8``."""
    lead, width = codes.shape[:-1], cls.width
    if reduce_channels:
        packed = codes.reshape(*lead, width // 4, cls.lanes, 4).transpose(-2, -3)
    else:
        packed = codes.reshape(*lead, cls.lanes // 4, width, 4).transpose(-1, -2)
    packed = packed.reshape(*lead, cls.lanes, width)
    planes = [(packed << (cls.bits * i)) & MASK[cls.bits] | HALF[cls.bits] for i in range(cls.planes)]
    return torch.stack(planes, -3).reshape(*lead, PAGE_TOKENS, width).view(torch.int8)


def write_page(
    k_rows: Sequence[QuantizedRows], v_rows: Sequence[QuantizedRows], centre: Tensor, layout: PageLayout
) -> Tensor:
    """Assemble pages ``[..., P] uint8`` from their quantized parts."""
    pages = torch.zeros(*centre.shape[:-1], layout.page_bytes, dtype=torch.uint8, device=centre.device)
    for classes, rows, is_key in ((layout.k_classes, k_rows, True), (layout.v_classes, v_rows, False)):
        for cls, row in zip(classes, rows, strict=True):
            codes = pack_codes(row.lanes, cls, reduce_channels=is_key)
            pages[..., cls.codes_offset : cls.codes_offset + cls.code_bytes] = codes
            pages[..., cls.scales_offset : cls.scales_offset + PAGE_TOKENS] = row.scales
    pages[..., layout.centre_offset : layout.used_bytes] = centre.contiguous().view(torch.uint8)
    return pages


def read_rows(pages: Tensor, cls: ChannelClass, *, is_key: bool) -> QuantizedRows:
    """One class of pages ``[..., P]``: lane values ``[..., 64, w]`` and scales ``[..., 64]``."""
    codes = pages[..., cls.codes_offset : cls.codes_offset + cls.code_bytes]
    scales = pages[..., cls.scales_offset : cls.scales_offset + PAGE_TOKENS]
    return QuantizedRows(unpack_codes(codes, cls, reduce_channels=is_key), scales)


def read_centre(pages: Tensor, layout: PageLayout) -> Tensor:
    """Centre ``[..., D] float16`` of pages ``[..., P]``, slot order."""
    return pages[..., layout.centre_offset : layout.used_bytes].contiguous().view(torch.float16)
