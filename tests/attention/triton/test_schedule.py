"""Which split takes what: every exact tile and every page once, in shares that differ by one."""

import pytest
import torch
import triton
import triton.language as tl

from homkv.attention.triton.runtime import device_type
from homkv.attention.triton.schedule import split_range, tiles_before


@triton.jit
def share_kernel(Out, tiles, units, count):
    split = tl.program_id(0)
    first, stop = split_range(split, count, units)
    tl.store(Out + split * 4, first)
    tl.store(Out + split * 4 + 1, stop)
    tl.store(Out + split * 4 + 2, tiles_before(first, tiles, units))
    tl.store(Out + split * 4 + 3, tiles_before(stop, tiles, units))


def shares(tiles: int, pages: int, count: int) -> list[tuple[range, range]]:
    """Tiles and units of pages of every split."""
    out = torch.empty(count, 4, dtype=torch.int32, device=device_type())
    share_kernel[(count,)](out, tiles, tiles + pages, count)
    return [(range(c, d), range(a - c, b - d)) for a, b, c, d in out.tolist()]


@pytest.mark.parametrize("tiles", [0, 1, 5, 9])
@pytest.mark.parametrize("pages", [0, 1, 7, 128])
@pytest.mark.parametrize("count", [1, 3, 16, 40])
def test_splits_divide_tiles_and_pages(tiles: int, pages: int, count: int) -> None:
    found = shares(tiles, pages, count)
    assert [i for own, _ in found for i in own] == list(range(tiles))
    assert [i for _, own in found for i in own] == list(range(pages))
    sizes = [len(a) + len(b) for a, b in found]
    assert max(sizes) - min(sizes) <= 1


def test_no_split_takes_all_tiles() -> None:
    assert max(len(own) for own, _ in shares(9, 512, 16)) == 1
    assert max(len(own) for own, _ in shares(9, 23, 4)) == 3
