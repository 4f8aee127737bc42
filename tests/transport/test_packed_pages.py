"""Pages that a format's coder packs for the wire: fewer bytes, the same layers, and no trust in what arrives."""

import zlib
from dataclasses import replace

import msgspec
import pytest
from transport_cases import layer_bytes, plan

from homkv.errors import FormatError
from homkv.transport.assemble import SequenceAssembler, SequencePlan, encode_layer
from homkv.transport.wire import FRAME_OVERHEAD, Frame, FrameError, decode_frame, encode_frame

TWO_PAGES = FRAME_OVERHEAD + 1200


class Zlib:
    """Stands for a format's coder: any lossless one will do here."""

    def encode(self, pages: memoryview, num_pages: int) -> bytes:
        return zlib.compress(pages)

    def decode(self, data: memoryview, num_pages: int, num_heads: int) -> bytes:
        try:
            raw = zlib.decompress(data)
        except zlib.error as error:
            raise FormatError(f"expected zlib, found {error}") from error
        if len(raw) != num_pages * num_heads * 192:
            raise FormatError(f"expected {num_pages} pages, found {len(raw)} bytes")
        return raw


PACKED = replace(plan(5), coder=Zlib())


def layer(p: SequencePlan, *, repetitive: bool) -> tuple[list[bytes], bytes]:
    exact, pages = layer_bytes(p, 0)
    return exact, bytes(len(pages)) if repetitive else pages


def frames(p: SequencePlan, *, repetitive: bool) -> list[Frame]:
    exact, pages = layer(p, repetitive=repetitive)
    return [decode_frame(*b) for b in encode_layer(p, 0, exact, pages, TWO_PAGES)]


@pytest.mark.parametrize("repetitive", [True, False])
def test_packed_parts_give_the_layer(repetitive: bool) -> None:
    """Bytes that cannot be packed travel as they are."""
    sent = frames(PACKED, repetitive=repetitive)
    assert len(sent) > 1
    assert all(bool(frame.header.coded_bytes) == repetitive for frame in sent)
    assembler = SequenceAssembler(PACKED)
    (data,) = [done for frame in reversed(sent) if (done := assembler.add(frame)) is not None]
    exact, pages = layer(PACKED, repetitive=repetitive)
    assert [bytes(data.exact_k), bytes(data.exact_v), bytes(data.pages)] == [*exact, pages]
    if repetitive:
        assert sum(frame.payload.nbytes for frame in sent) < PACKED.layer_bytes / 3


def test_packed_pages_that_do_not_unpack_change_nothing() -> None:
    frame = frames(PACKED, repetitive=True)[1]
    bad = decode_frame(*encode_frame(frame.header, bytes(frame.header.coded_bytes)))
    assembler = SequenceAssembler(PACKED)
    with pytest.raises(FrameError, match="zlib") as caught:
        assembler.add(bad)
    assert caught.value.reason == "malformed"
    other = msgspec.structs.replace(frame.header, num_pages=1)
    with pytest.raises(FrameError, match="1 pages"):
        assembler.add(decode_frame(*encode_frame(other, frame.payload)))
    done = [data for f in frames(PACKED, repetitive=True) if (data := assembler.add(f)) is not None]
    assert len(done) == 1


def test_a_format_without_a_coder_refuses_packed_pages() -> None:
    with pytest.raises(FrameError, match="as they are") as caught:
        SequenceAssembler(replace(PACKED, coder=None)).add(frames(PACKED, repetitive=True)[0])
    assert caught.value.reason == "format"
