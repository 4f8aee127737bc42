"""Decode attention on `hack-2026` pages in Triton against the float64 oracle; the rest is in test_hack_decode."""

from itertools import product

import pytest
import torch
from chosen import cases
from decode_cases import HEADS, assert_accurate, error, queries, run

from homkv.attention import reference
from homkv.formats.hack2026 import Hack2026Codec, Hack2026Options
from homkv.testing.inputs import make_view


@pytest.mark.parametrize(
    ("group_size", "bits", "group", "stored"),
    cases(
        [(*page, *rows) for page in product((32, 64, 128), (2, 4, 8)) for rows in ((3, False), (7, True))],
        [(32, 2, 7, True), (64, 8, 3, False), (128, 4, 7, True), (32, 4, 3, False)],
    ),
)
def test_every_page(group_size: int, bits: int, group: int, stored: bool, device: torch.device) -> None:
    """Pages of one pair, half a pair, sinks and the open block, with sums and without."""
    codec = Hack2026Codec(64, Hack2026Options(group_size, bits, summation_elimination=stored))
    view, q = make_view(codec, [3 * group_size + 9], 1), queries(1, group, 64)[:, :group]
    assert_accurate(run(q, view, codec, device), q, view, codec)


# Partitions of 16, 16, 80, 32, 48, 96, 32, 64 channels: padded, and cut into chunks of 16 to 64.
@pytest.mark.parametrize(
    ("head_dim", "group_size"),
    cases(
        [(16, 64), (80, 64), (80, 128), (96, 32), (96, 64), (96, 128), (128, 32), (256, 64)],
        [(16, 64), (80, 128), (96, 64), (96, 128), (256, 64)],
    ),
)
def test_every_head_dim(head_dim: int, group_size: int, device: torch.device) -> None:
    codec = Hack2026Codec(head_dim, Hack2026Options(group_size))
    view = make_view(codec, [2 * group_size + 7, group_size + 4], 1, exact_dtype=torch.bfloat16)
    q = queries(2, 4, head_dim)[:, :4]
    assert_accurate(run(q, view, codec, device), q, view, codec)


@pytest.mark.parametrize("group", [2, 6])
def test_padded_partitions_sum_their_own_codes_only(group: int, device: torch.device) -> None:
    codec = Hack2026Codec(96, Hack2026Options(64, summation_elimination=False))
    view, q = make_view(codec, [201], HEADS), queries(1, group, 96)
    assert_accurate(run(q, view, codec, device), q, view, codec)


def test_only_rounding_separates_it_from_the_oracle(device: torch.device) -> None:
    """With channels far from zero the codes' minima carry most of a score, and they are not rounded."""
    codec = Hack2026Codec(64, Hack2026Options(bits=8))
    view, q = make_view(codec, [300], HEADS, kind="outliers"), queries(1, 4, 64) * 0.05
    exact = reference.oracle(q, view, codec, 64**-0.5)
    assert error(run(q, view, codec, device)[0], exact[0]) < 0.02
