"""The byte map of docs/format.md: every code at its address, every section at its offset."""

import by_the_book
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from homkv.page import pack_codes, read_centre, read_rows, unpack_codes, write_page
from homkv.quant import QuantizedRows
from homkv.spec import DIGITS, HEAD_DIMS, ChannelClass, PageLayout, RowsSpec

digits = st.tuples(*[st.sampled_from(DIGITS)] * 4)


def random_lanes(cls: ChannelClass, *lead: int) -> Tensor:
    bits = cls.bits
    levels = torch.arange(-127, 128) if bits == 8 else torch.arange(2**bits) * 2 ** (8 - bits) - 128 + 2 ** (7 - bits)
    return levels[torch.randint(len(levels), (*lead, 64, cls.width))].to(torch.int8)


def random_rows(cls: ChannelClass, *lead: int) -> QuantizedRows:
    return QuantizedRows(random_lanes(cls, *lead), torch.randint(256, (*lead, 64)).to(torch.uint8))


def random_page(layout: PageLayout, *lead: int) -> tuple[Tensor, list[QuantizedRows], list[QuantizedRows], Tensor]:
    k_rows, v_rows = ([random_rows(c, *lead) for c in classes] for classes in (layout.k_classes, layout.v_classes))
    centre = torch.randn(*lead, layout.head_dim).to(torch.float16)
    return write_page(k_rows, v_rows, centre, layout), k_rows, v_rows, centre


@pytest.mark.parametrize(
    ("name", "head_dim", "page_bytes"),
    [
        ("small", 128, 71 * 64 + 0),
        ("balanced", 128, 5056),
        ("quality", 128, 106 * 64),
        ("near-lossless", 128, 152 * 64),
        ("int8", 128, 262 * 64),
        ("balanced", 64, 2624),
    ],
)
def test_pages_have_the_sizes_of_the_document(name: str, head_dim: int, page_bytes: int) -> None:
    layout = RowsSpec.parse(name).layout(head_dim)
    assert layout.page_bytes == page_bytes
    assert random_page(layout)[0].shape == (page_bytes,)


@given(k_digits=digits, v_digits=digits, head_dim=st.sampled_from(HEAD_DIMS))
def test_offsets_are_those_of_the_document(k_digits: tuple, v_digits: tuple, head_dim: int) -> None:
    layout = RowsSpec(k_digits, v_digits).layout(head_dim)
    found = []
    for found_classes, expected in ((layout.k_classes, k_digits), (layout.v_classes, v_digits)):
        assert [(c.start, c.width, c.bits) for c in found_classes] == by_the_book.classes(expected, head_dim)
        found += [[c.codes_offset for c in found_classes], [c.scales_offset for c in found_classes]]
    expected_sections = by_the_book.sections(k_digits, v_digits, head_dim)
    assert (*found, layout.centre_offset, layout.page_bytes) == expected_sections


@pytest.mark.parametrize("is_key", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("width", [16, 20, 24, 48, 64, 160])
def test_every_code_lies_at_its_address(width: int, bits: int, is_key: bool) -> None:
    cls = ChannelClass(0, width, bits, 0, 0)
    lanes = random_lanes(cls)
    packed = pack_codes(lanes, cls, reduce_channels=is_key)
    assert packed.shape == (cls.code_bytes,)
    for t in range(64):
        for c in range(width):
            byte, plane = by_the_book.address(is_key, width, bits, t, c)
            assert by_the_book.lane_of(int(packed[byte]), bits, plane) == lanes[t, c]
    assert torch.equal(unpack_codes(packed, cls, reduce_channels=is_key), lanes)


@given(k_digits=digits, v_digits=digits, head_dim=st.sampled_from(HEAD_DIMS))
@settings(deadline=None, max_examples=25)
def test_a_page_gives_back_what_was_written(k_digits: tuple, v_digits: tuple, head_dim: int) -> None:
    layout = RowsSpec(k_digits, v_digits).layout(head_dim)
    pages, k_rows, v_rows, centre = random_page(layout, 2, 3)
    for classes, rows, is_key in ((layout.k_classes, k_rows, True), (layout.v_classes, v_rows, False)):
        for cls, expected in zip(classes, rows, strict=True):
            found = read_rows(pages, cls, is_key=is_key)
            assert torch.equal(found.lanes, expected.lanes)
            assert torch.equal(found.scales, expected.scales)
    assert torch.equal(read_centre(pages, layout), centre)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("name", ["k4420v2222", "k2000v0000", "k8444v4440"])
def test_the_centre_is_little_endian_fp16_and_the_padding_zero(name: str, head_dim: int) -> None:
    layout = RowsSpec.parse(name).layout(head_dim)
    page, *_, centre = random_page(layout)
    raw = bytes(page[layout.centre_offset : layout.used_bytes].tolist())
    assert np.array_equal(np.frombuffer(raw, dtype="<f2"), centre.numpy())
    assert not page[layout.used_bytes :].any()


def test_one_shift_and_one_mask_unpack_a_plane() -> None:
    cls = ChannelClass(0, 16, 2, 0, 0)
    lanes = torch.full((64, 16), -96, dtype=torch.int8)
    lanes[16:32], lanes[32:48], lanes[48:] = -32, 32, 96
    assert pack_codes(lanes, cls, reduce_channels=True).unique().tolist() == [0b10_11_00_01]
