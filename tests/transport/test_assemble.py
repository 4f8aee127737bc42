import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transport_cases import EXPECT, layer_bytes, no_deadline, plan

from homkv.errors import ShapeError
from homkv.transport.assemble import LayerData, SequenceAssembler, SequencePlan, encode_layer
from homkv.transport.wire import FRAME_OVERHEAD, Frame, FrameError, decode_frame, encode_frame

TINY = FRAME_OVERHEAD + 400  # one page row (384 bytes) per part


def frames(p: SequencePlan, max_frame_bytes: int = TINY) -> list[Frame]:
    made = []
    for layer in range(p.expect.num_layers):
        exact, pages = layer_bytes(p, layer)
        made += [decode_frame(*b) for b in encode_layer(p, layer, exact, pages, max_frame_bytes)]
    return made


def changed(frame: Frame, payload: bytes | None = None, **fields: object) -> Frame:
    """A frame that verifies, with other fields or another payload."""
    header = msgspec.structs.replace(frame.header, **fields)
    if payload is None:
        payload = bytes(frame.payload)[: header.payload_bytes].ljust(header.payload_bytes)
    return decode_frame(*encode_frame(header, payload))


def assert_is_layer(data: LayerData, p: SequencePlan) -> None:
    exact, pages = layer_bytes(p, data.layer)
    assert [bytes(data.exact_k), bytes(data.exact_v), bytes(data.pages)] == [*exact, pages]
    assert not data.pages.readonly


@no_deadline
@given(st.data(), st.integers(0, 7), st.integers(0, 6), st.sampled_from([TINY, TINY + 400, 1 << 20]))
def test_any_order_with_repeats_gives_every_layer_once(
    data: st.DataObject, num_pages: int, num_exact: int, max_frame_bytes: int
) -> None:
    p = plan(num_pages, num_exact)
    sent = frames(p, max_frame_bytes)
    order = data.draw(st.permutations(sent + data.draw(st.lists(st.sampled_from(sent), max_size=4))))
    assembler = SequenceAssembler(p)
    done = [layer for frame in order if (layer := assembler.add(frame)) is not None]
    assert sorted(layer.layer for layer in done) == [0, 1, 2]
    assert assembler.complete
    for layer in done:
        assert_is_layer(layer, p)


def test_a_missing_part_keeps_the_layer_back() -> None:
    p = plan()
    assembler = SequenceAssembler(p)
    for frame in frames(p):
        if (frame.header.layer, frame.header.part) != (1, 2):
            assembler.add(frame)
    assert assembler.missing == {1}
    assert not assembler.complete


def refused(assembler: SequenceAssembler, frame: Frame) -> str:
    with pytest.raises(FrameError) as caught:
        assembler.add(frame)
    return caught.value.reason


def test_frames_of_another_sequence_epoch_or_cache_are_refused() -> None:
    p = plan()
    frame, assembler = frames(p)[0], SequenceAssembler(p)
    assert refused(assembler, changed(frame, sequence="r2")) == "sequence"
    assert refused(assembler, changed(frame, epoch=6)) == "epoch"
    assert refused(assembler, changed(frame, num_tokens=9)) == "sequence"
    assert refused(assembler, changed(frame, format="small")) == "format"
    assert assembler.missing == {0, 1, 2}


@pytest.mark.parametrize("complete_first", [False, True])
def test_a_duplicate_with_other_content_is_refused_and_the_first_kept(complete_first: bool) -> None:
    p = plan()
    sent, assembler = frames(p), SequenceAssembler(p)
    mine = [f for f in sent if f.header.layer == 0]
    early = mine if complete_first else mine[:2]
    done = [assembler.add(f) for f in early]
    assert refused(assembler, changed(mine[1], payload=bytes(len(mine[1].payload)))) == "duplicate"
    assert assembler.add(mine[1]) is None
    done += [assembler.add(f) for f in mine[len(early) :]]
    assert_is_layer(next(d for d in done if d is not None), p)


def test_overlap_gap_and_contradiction_are_refused() -> None:
    p = plan()
    first, second, third, *_ = frames(p)
    assembler = SequenceAssembler(p)
    assembler.add(first)
    assembler.add(third)
    assert refused(assembler, changed(second, first_page=third.header.first_page)) == "order"  # overlap
    assert refused(assembler, changed(second, first_page=5)) == "order"  # beyond the sequence
    assert refused(assembler, changed(second, num_parts=9)) == "order"
    assert refused(assembler, changed(second, num_exact=1)) == "order"
    assembler = SequenceAssembler(p)
    assert refused(assembler, changed(first, num_parts=1)) == "order"  # one part that leaves pages out
    assembler.add(first)  # a refusal leaves no trace
    assembler.add(second)


def test_memory_is_bounded_before_the_first_frame() -> None:
    p = plan()
    assert p.total_bytes == 3 * (2 * 2 * 6 * 8 * 2 + 5 * 2 * 192)
    with pytest.raises(FrameError, match="shorten the prompt") as caught:
        SequenceAssembler(p, max_bytes=p.total_bytes - 1)
    assert caught.value.reason == "too_large"


def test_parts_respect_the_cap() -> None:
    p = plan(40, 3)
    exact, pages = layer_bytes(p, 0)
    for cap in (TINY, TINY + 1000, 1 << 20):
        sizes = [sum(len(b) for b in buffers) for buffers in encode_layer(p, 0, exact, pages, cap)]
        assert max(sizes) <= cap
    assert len(sizes) == 1
    with pytest.raises(FrameError, match="raise max_frame_bytes"):
        list(encode_layer(p, 0, exact, pages, FRAME_OVERHEAD + 10))


def test_a_layer_of_the_wrong_size_is_refused() -> None:
    p = plan()
    exact, pages = layer_bytes(p, 0)
    with pytest.raises(ShapeError, match="the ticket names"):
        list(encode_layer(p, 0, exact, pages[:-1]))
    with pytest.raises(ShapeError):
        list(encode_layer(p, 0, exact[:1], pages))
    assert EXPECT.page_bytes * 2 == p.page_row_bytes(0)
