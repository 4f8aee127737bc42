"""Pages in shared memory: read back as they were copied (on a GPU), and where their bytes lie."""

import functools

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from homkv.attention.triton.decode import classes
from homkv.attention.triton.runtime import device_type
from homkv.attention.triton.staging import (
    await_copies,
    copy_page,
    page_buffer,
    place,
    read2,
    read4,
    read_short,
    room,
    whole_periods,
)
from homkv.formats.rows import RowsCodec
from homkv.spec import RowsSpec

SIZE, BANKS = 4544, 32
PRESETS = ("small", "balanced", "quality", "near-lossless", "int8")


@triton.jit
def place_kernel(Out, SIZE: tl.constexpr):
    lane = tl.arange(0, 32) * 16
    for i in tl.static_range((SIZE + 511) // 512):
        tl.store(Out + i * 32 + tl.arange(0, 32), place(lane, 512 * i) + whole_periods(512 * i))


@functools.cache
def places(size: int) -> np.ndarray:
    """Where each piece of 16 bytes lies."""
    out = torch.empty((size + 511) // 512 * 32, dtype=torch.int32, device=device_type())
    place_kernel[(1,)](out, SIZE=size)
    return out.cpu().numpy()[: size // 16]


def test_every_piece_has_a_place_of_its_own_in_the_buffer() -> None:
    for size in (64, 2368, SIZE, 9728, 16640):
        found = places(size)
        assert len({*found.tolist()}) == size // 16
        assert (found % 16 == 0).all()
        assert 0 <= found.min() <= found.max() <= room.fn(size) - 16
        assert (found // 128 == np.arange(size // 16) // 8).all()  # in its own row of 128 bytes


def conflicts(addresses: np.ndarray, width: int) -> int:
    """The most words that one bank gives to lanes that are served together: 128 bytes of them at a time."""
    at = np.concatenate([places(1 << 15)[addresses // 16] + addresses % 16 + 4 * i for i in range(width // 4)])
    lanes = np.tile(np.arange(32) // (128 // width), width // 4)
    return max(np.bincount(np.unique(at[lanes == group]) // 4 % BANKS).max() for group in range(width // 4))


@pytest.mark.parametrize("name", PRESETS)
def test_lanes_read_from_banks_of_their_own(name: str) -> None:
    """Two at a time meet where values do not begin at a row."""
    layout = RowsCodec(128, RowsSpec.parse(name)).layout
    g, q = np.arange(32) // 4, np.arange(32) % 4
    for _, width, bits, offset, _ in classes(layout.k_classes):
        for block in range(0, width // 32 * 256 * bits, 64):
            if block % (128 * bits) < 64 * (bits // 2):
                assert conflicts(offset + block + q * (32 * bits) + g * 8, 8) == 1
    for _, width, bits, offset, _ in classes(layout.v_classes):
        for block in range(bits // 2):
            for piece in range(width // 32):
                assert conflicts(offset + block * 16 * width + piece * 128 + q * (4 * width) + g * 16, 16) <= 1 + (
                    offset % 128 > 0
                )


@triton.jit
def read_back_kernel(Page, Words, Shorts, SIZE: tl.constexpr):
    lane = tl.arange(0, 32)
    buffer = page_buffer(2 * room(SIZE))
    pool = Page.to(tl.int64, bitcast=True) + tl.zeros([32], tl.int64)
    slot = buffer
    for at in tl.range(0, 2, num_stages=1):
        page = (pool + at * SIZE, slot)
        copy_page(page, at >= 0, SIZE)
        copy_page((pool, slot), at < 0, SIZE)
        await_copies(2)
        for i in tl.static_range(SIZE // 512):
            four = read4(page, lane * 16, 512 * i)
            for r in tl.static_range(4):
                tl.store(Words + at * (SIZE // 4) + 128 * i + lane * 4 + r, four[r])
        two = read2(page, (lane % 8) * 8, SIZE // 512 * 512)
        for r in tl.static_range(2):
            tl.store(Words + at * (SIZE // 4) + SIZE // 512 * 128 + (lane % 8) * 2 + r, two[r])
        for i in tl.static_range(SIZE // 16):
            tl.store(Shorts + at * (SIZE // 2) + 8 * i + lane % 8, read_short(page, lane % 8 * 2, 16 * i))
        slot = 2 * buffer + room(SIZE) - slot


def test_pages_are_read_as_they_were_copied(device: torch.device) -> None:
    size = 4544 // 512 * 512 + 64
    page = torch.randint(0, 256, (2, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(3)).to(device)
    words = torch.empty(2, size // 4, dtype=torch.int32, device=device)
    shorts = torch.empty(2, size // 2, dtype=torch.int32, device=device)
    read_back_kernel[(1,)](page, words, shorts, SIZE=size, num_warps=1)
    assert torch.equal(words, page.view(torch.int32))
    assert torch.equal(shorts, page.view(torch.int16).int() & 65535)
