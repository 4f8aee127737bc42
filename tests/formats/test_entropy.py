"""The wire's entropy coder: lossless for any codes, near the entropy, and a typed error for any other bytes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from homkv.errors import FormatError
from homkv.formats.entropy import HEAD, ChannelCoder

D, T = 3, 8
PAGE = 2 * T * D + 4
KINDS = ("zeros", "any", "few", "constant")


def coder(chunk_pages: int | None = None, table: str = "u1") -> ChannelCoder:
    return ChannelCoder(D, T, PAGE, chunk_pages, table)


def pages(kind: str, num_pages: int, num_heads: int, seed: int) -> NDArray[np.uint8]:
    rng = np.random.default_rng(seed)
    codes = {
        "zeros": np.zeros((num_pages, num_heads, 2 * T * D), np.int8),
        "any": rng.integers(-127, 128, (num_pages, num_heads, 2 * T * D), np.int8),
        "few": rng.integers(-3, 4, (num_pages, num_heads, 2 * T * D), np.int8),
        "constant": np.full((num_pages, num_heads, 2 * T * D), -127, np.int8),
    }[kind]
    rest = rng.integers(0, 256, (num_pages, num_heads, 4), np.uint8)
    return np.concatenate((codes.view(np.uint8), rest), -1)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    num_pages=st.integers(1, 5),
    num_heads=st.integers(1, 3),
    chunk_pages=st.sampled_from((None, 1, 2)),
    table=st.sampled_from(("u1", "u2")),
    seed=st.integers(0, 2**31),
)
def test_any_codes_come_back(
    kind: str, num_pages: int, num_heads: int, chunk_pages: int | None, table: str, seed: int
) -> None:
    x = pages(kind, num_pages, num_heads, seed)
    packed = coder(chunk_pages, table).encode(x.data, num_pages)
    assert coder(chunk_pages, table).decode(memoryview(packed), num_pages, num_heads) == x.tobytes()


def test_the_size_is_near_the_entropy() -> None:
    """8,000 codes per channel with a distribution of 1.75 bits: within 1 % and a few words."""
    big = ChannelCoder(4, 8000, 2 * 8000 * 4, None, "u2")
    rng = np.random.default_rng(0)
    codes = rng.choice(np.array([0, 1, -1, 2], np.int8), (1, 1, 2 * 8000 * 4), p=(0.5, 0.25, 0.125, 0.125))
    packed = big.encode(codes.view(np.uint8).data, 1)
    assert len(packed) == pytest.approx(8 * 8000 * 1.75 / 8, rel=0.01)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), table=st.sampled_from(("u1", "u2")))
def test_damaged_bytes_are_refused_or_of_the_right_length(data: st.DataObject, table: str) -> None:
    """A digest guards the wire; behind it nothing may crash, hang or grow."""
    packed = bytearray(coder(None, table).encode(pages("few", 2, 2, 0).data, 2))
    how = data.draw(st.sampled_from(("cut", "flip", "any", "longer")))
    if how == "cut":
        packed = packed[: data.draw(st.integers(0, len(packed) - 1))]
    elif how == "flip":
        packed[data.draw(st.integers(0, len(packed) - 1))] ^= data.draw(st.integers(1, 255))
    elif how == "any":
        packed = bytearray(data.draw(st.binary(max_size=200)))
    else:
        packed += data.draw(st.binary(min_size=1, max_size=40))
    try:
        outcome = len(coder(None, table).decode(memoryview(bytes(packed)), 2, 2))
    except FormatError:
        outcome = 0
    assert outcome in (0, 2 * 2 * PAGE)


def test_what_no_encoder_makes_is_named() -> None:
    packed = coder().encode(pages("few", 1, 1, 0).data, 1)
    largest_k, largest_v, table_bytes = HEAD.unpack_from(packed)
    no_counts = packed[: HEAD.size] + bytes(table_bytes) + packed[HEAD.size + table_bytes :]
    for bad, message in (
        (b"", "at least"),
        (HEAD.pack(0, largest_v, table_bytes) + packed[HEAD.size :], "tables"),
        (HEAD.pack(largest_k, largest_v, table_bytes + 1) + packed[HEAD.size :], "tables"),
        (packed + b"x", "whole"),
        (packed + bytes(16), "behind"),
        (no_counts, "distribution"),
    ):
        with pytest.raises(FormatError, match=message):
            coder().decode(memoryview(bad), 1, 1)
