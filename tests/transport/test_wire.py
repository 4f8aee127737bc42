import tracemalloc
from dataclasses import replace

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transport_cases import EXPECT, layer_bytes, no_deadline, plan

from homkv.errors import ShapeError, TransferError
from homkv.transport.assemble import encode_layer
from homkv.transport.wire import HARD_CAP_BYTES, PRELUDE, FrameError, decode_frame, encode_frame


def small_frame(**changes: object) -> bytes:
    p = plan(**{"num_pages": 1, "num_exact": 1} | changes)
    exact, pages = layer_bytes(p, 0)
    (buffers,) = encode_layer(p, 0, exact, pages)
    return b"".join(buffers)


def reason(data: bytes, **options: int) -> str:
    with pytest.raises(FrameError) as caught:
        decode_frame(data, **options)
    assert isinstance(caught.value, TransferError)
    assert "expected" in str(caught.value)
    assert "found" in str(caught.value)
    return caught.value.reason


@pytest.mark.parametrize("num_pages", [0, 1, 2, 63, 64, 1000])
@pytest.mark.parametrize("num_exact", [0, 1, 4, 131])
def test_round_trip_is_exact(num_pages: int, num_exact: int) -> None:
    p = plan(num_pages, num_exact)
    exact, pages = layer_bytes(p, 1)
    (buffers,) = encode_layer(p, 1, exact, pages)
    for received in (buffers, [b"".join(buffers)], [bytes(buffers[0]), b"".join(buffers[1:])]):
        frame = decode_frame(*received)
        assert bytes(frame.payload) == exact[0] + exact[1] + pages
        assert (frame.header.layer, frame.header.num_pages, frame.header.num_exact) == (1, num_pages, num_exact)
        EXPECT.check(frame.header)


def test_frame_is_the_documented_bytes() -> None:
    frame = small_frame()
    magic, version, header_bytes, payload_bytes = PRELUDE.unpack_from(frame)
    assert (magic, version) == (b"HKVF", 2)
    assert len(frame) == 16 + header_bytes + payload_bytes
    fields = msgspec.msgpack.decode(frame[16 : 16 + header_bytes])
    assert fields[:-1] == [
        "kv", "balanced", "rows-1", "ab" * 16, 3, 2, 8, 192, "float16", "r1", 7, 65, 0, 0, 1, 0, 1, 1, 0
    ]  # fmt: skip
    assert frame[16 + header_bytes - 16 : 16 + header_bytes] == fields[-1]


def test_encoding_copies_no_payload() -> None:
    p = plan()
    exact, pages = layer_bytes(p, 0)
    array = np.frombuffer(pages, dtype=np.uint8).copy().reshape(5, 2, 192)
    (buffers,) = encode_layer(p, 0, exact, memoryview(array))
    assert np.shares_memory(np.frombuffer(buffers[-1], dtype=np.uint8), array)


def test_every_bit_flip_is_refused() -> None:
    frame = small_frame()
    for bit in range(8 * len(frame)):
        damaged = bytearray(frame)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(FrameError):
            decode_frame(damaged)


def test_every_truncation_and_any_extension_is_refused() -> None:
    frame = small_frame()
    assert {reason(frame[:n]) for n in range(len(frame))} == {"truncated"}
    assert reason(frame + b"\0") == "malformed"
    assert reason(frame + frame) == "malformed"


def test_swapped_pieces_are_refused() -> None:
    one, two = small_frame(), small_frame(sequence="r2")
    payload = plan(1, 1).layer_bytes
    head = len(one) - payload
    assert reason(one[:head] + one[head + 64 :] + one[head : head + 64]) == "digest"
    assert reason(one[:head] + bytes(payload)) == "digest"
    signed = head - 16
    assert reason(two[:signed] + one[signed:]) == "digest"  # same payload under another name


@no_deadline
@given(st.binary(max_size=600))
def test_no_byte_string_is_mistaken_for_a_frame(data: bytes) -> None:
    with pytest.raises(FrameError):
        decode_frame(data)


@no_deadline
@given(st.integers(0, 2**16 - 1), st.integers(0, 2**64 - 1), st.binary(max_size=300))
def test_a_valid_prelude_makes_no_frame(header_bytes: int, payload_bytes: int, rest: bytes) -> None:
    with pytest.raises(FrameError):
        decode_frame(PRELUDE.pack(b"HKVF", 2, header_bytes, payload_bytes) + rest)


@no_deadline
@given(st.recursive(st.none() | st.integers(-(2**63), 2**63) | st.text() | st.binary(), st.lists, max_leaves=40))
def test_a_header_that_verifies_but_breaks_the_schema_is_malformed(fields: object) -> None:
    from homkv.transport.wire import _digest

    body = msgspec.msgpack.encode([fields, b""]) + b"\xc4\x10"
    unsigned = PRELUDE.pack(b"HKVF", 2, len(body) + 16, 0) + body
    assert reason(unsigned + _digest(unsigned, [])) == "malformed"


def test_nothing_above_the_cap_is_allocated() -> None:
    lies = [PRELUDE.pack(b"HKVF", 2, 200, size) + bytes(300) for size in (2**63, 2**40, HARD_CAP_BYTES + 1)]
    tracemalloc.start()
    for lie in lies:
        reason(lie)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_frames_above_the_cap_are_neither_made_nor_read() -> None:
    frame = small_frame()
    assert reason(frame, max_frame_bytes=len(frame) - 1) == "too_large"
    decode_frame(frame, max_frame_bytes=len(frame))
    header = decode_frame(frame).header
    with pytest.raises(FrameError, match="split the layer") as caught:
        encode_frame(header, bytes(header.payload_bytes), max_frame_bytes=len(frame) - 1)
    assert caught.value.reason == "too_large"


def test_another_wire_version_or_magic_is_named() -> None:
    frame = small_frame()
    assert reason(frame[:4] + b"\x03\x00" + frame[6:]) == "version"
    assert reason(b"HTTP" + frame[4:]) == "malformed"


def test_counts_that_contradict_the_payload_are_malformed() -> None:
    header = decode_frame(small_frame()).header
    lying = msgspec.structs.replace(header, layer=3)
    assert reason(b"".join(encode_frame(lying, bytes(header.payload_bytes)))) == "malformed"
    with pytest.raises(ShapeError, match="expected a payload of"):
        encode_frame(header, b"short")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"format": "small"}, "format"),
        ({"layout_id": "rows-2"}, "layout"),
        ({"page_bytes": 256}, "layout"),
        ({"exact_dtype": "bfloat16"}, "layout"),
        ({"model": "cd" * 16}, "model"),
        ({"num_layers": 4}, "model"),
        ({"num_kv_heads": 3}, "model"),
        ({"head_dim": 16}, "model"),
    ],
)
def test_mismatch_is_refused_and_names_both_sides(change: dict[str, object], expected: str) -> None:
    header = decode_frame(small_frame()).header
    with pytest.raises(FrameError) as caught:
        replace(EXPECT, **change).check(header)
    ((name, ours),) = change.items()
    assert caught.value.reason == expected
    for word in (name, repr(ours), repr(getattr(header, name)), "start both"):
        assert word in str(caught.value)


def test_a_buffer_with_gaps_is_refused() -> None:
    p = plan()
    exact, _ = layer_bytes(p, 0)
    gaps = np.zeros((10, 2, 192), np.uint8)[::2]
    with pytest.raises(ShapeError, match="contiguous"):
        list(encode_layer(p, 0, exact, memoryview(gaps)))
