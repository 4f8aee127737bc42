"""From layers to frames and back. No sockets.

Both sides build the same ``SequencePlan`` from the reservation, so the receiver knows every byte count before the
first frame arrives and allocates nothing else.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from homkv.errors import HomkvError, ShapeError
from homkv.transport.wire import (
    EXACT_WIDTHS,
    FRAME_OVERHEAD,
    MAX_FRAME_BYTES,
    Buffer,
    Expectation,
    Frame,
    FrameError,
    FrameHeader,
    as_bytes,
    encode_frame,
)

MAX_SEQUENCE_BYTES = 16 << 30


class PageCoder(Protocol):
    """What packs a format's pages for the wire, and unpacks them; see homkv.formats.base."""

    def encode(self, pages: memoryview, num_pages: int) -> bytes:
        """Pack ``num_pages`` pages of all kv heads, at least one."""
        ...

    def decode(self, data: memoryview, num_pages: int, num_heads: int) -> bytes:
        """Unpack them, or raise HomkvError."""
        ...


@dataclass(frozen=True)
class SequencePlan:
    """One sequence on its way: who it is and how many bytes each of its layers has."""

    expect: Expectation
    sequence: str
    epoch: int
    num_tokens: int
    num_pages: int  # per layer and kv head
    num_exact: int  # sinks and window
    coder: PageCoder | None = None  # of the format; the byte counts below are those without it

    @property
    def exact_bytes(self) -> int:
        """Bytes of a layer's exact keys, and of its exact values."""
        e = self.expect
        return e.num_kv_heads * self.num_exact * e.head_dim * EXACT_WIDTHS[e.exact_dtype]

    @property
    def page_row_bytes(self) -> int:
        """Bytes of one page of all kv heads: the unit a layer is split at."""
        return self.expect.num_kv_heads * self.expect.page_bytes

    @property
    def layer_bytes(self) -> int:
        """Payload bytes of one layer: exact K, exact V, pages."""
        return 2 * self.exact_bytes + self.num_pages * self.page_row_bytes

    @property
    def total_bytes(self) -> int:
        """Payload bytes of the sequence."""
        return self.expect.num_layers * self.layer_bytes


@dataclass(frozen=True)
class LayerData:
    """One complete layer: ``exact_k exact_v [G, E, D]`` and ``pages [N, G, P]`` as writable bytes, the taker's own."""

    layer: int
    exact_k: memoryview
    exact_v: memoryview
    pages: memoryview


def encode_layer(
    plan: SequencePlan, layer: int, exact: Sequence[Buffer], pages: Buffer, max_frame_bytes: int = MAX_FRAME_BYTES
) -> Iterator[list[bytes | memoryview]]:
    """Yield the frames of one layer; as few as ``max_frame_bytes`` allows. Payloads are views, not copies.

    ``exact``: keys ``[G, E, D]`` and values ``[G, E, D]``; ``pages [N, G, P]``. Part 0 carries all exact tokens.
    Raises ShapeError if the buffers are not what the plan says, FrameError if one page does not fit in a frame.
    """
    page_view, sizes = as_bytes(pages), [as_bytes(b).nbytes for b in exact]
    stride, found = plan.page_row_bytes, [*sizes, page_view.nbytes]
    if found != [plan.exact_bytes, plan.exact_bytes, plan.num_pages * stride]:
        raise ShapeError(
            f"expected exact K and V of {plan.exact_bytes} bytes each and pages of {plan.num_pages * stride} bytes, "
            f"found {found}; pass the layer of the sequence that the ticket names"
        )
    counts = _split(plan, max_frame_bytes)
    first = 0
    for part, count in enumerate(counts):
        view = page_view[first * stride : (first + count) * stride]
        packed = _pack(plan, view, count)
        header = _header(plan, layer, part, len(counts), first, count, len(packed))
        yield encode_frame(header, *(exact if part == 0 else ()), packed or view, max_frame_bytes=max_frame_bytes)
        first += count


def _split(plan: SequencePlan, max_frame_bytes: int) -> list[int]:
    """Pages per part; part 0 leaves room for the exact tokens."""
    room = max_frame_bytes - FRAME_OVERHEAD
    if 2 * plan.exact_bytes > room or (plan.num_pages and plan.page_row_bytes > room):
        raise FrameError(
            "too_large",
            f"expected exact tokens ({2 * plan.exact_bytes} bytes) and a page of all heads ({plan.page_row_bytes}) "
            f"to fit in a frame, found room for {room}; raise max_frame_bytes",
        )
    if not plan.num_pages:
        return [0]
    per_part = room // plan.page_row_bytes
    counts = [min(plan.num_pages, (room - 2 * plan.exact_bytes) // plan.page_row_bytes)]
    while (left := plan.num_pages - sum(counts)) > 0:
        counts.append(min(left, per_part))
    return counts


def _pack(plan: SequencePlan, pages: memoryview, num_pages: int) -> bytes:
    """Pages as the format's coder packs them; empty where it has none or would make them larger."""
    if plan.coder is None or not num_pages:
        return b""
    packed = plan.coder.encode(pages, num_pages)
    return packed if len(packed) < pages.nbytes else b""


def _unpack(plan: SequencePlan, frame: Frame) -> Buffer:
    """Pages of a frame as they lie in the cache. Raises FrameError."""
    h, data = frame.header, frame.payload[frame.header.exact_bytes :]
    if not h.coded_bytes:
        return data
    if plan.coder is None:
        raise FrameError("format", f"expected pages as they are in {h.format!r}, found packed ones; update the sender")
    try:
        return plan.coder.decode(data, h.num_pages, h.num_kv_heads)
    except HomkvError as error:
        raise FrameError("malformed", str(error)) from error


def _header(
    plan: SequencePlan, layer: int, part: int, num_parts: int, first_page: int, num_pages: int, coded_bytes: int
) -> FrameHeader:
    e = plan.expect
    return FrameHeader(
        kind="kv",
        format=e.format,
        layout_id=e.layout_id,
        model=e.model,
        num_layers=e.num_layers,
        num_kv_heads=e.num_kv_heads,
        head_dim=e.head_dim,
        page_bytes=e.page_bytes,
        exact_dtype=e.exact_dtype,
        sequence=plan.sequence,
        epoch=plan.epoch,
        num_tokens=plan.num_tokens,
        layer=layer,
        part=part,
        num_parts=num_parts,
        first_page=first_page,
        num_pages=num_pages,
        num_exact=plan.num_exact if part == 0 else 0,
        coded_bytes=coded_bytes,
    )


class LayerAssembler:
    """The parts of one layer, in any order."""

    def __init__(self, plan: SequencePlan, layer: int) -> None:
        self._plan, self._layer = plan, layer
        self._buffer = memoryview(bytearray(plan.layer_bytes))
        self._spans: dict[int, tuple[int, int]] = {}  # part -> first page, one past the last
        self._num_parts: int | None = None

    def add(self, frame: Frame) -> LayerData | None:
        """Copy a part to its place; returns the layer when it is complete. Raises FrameError, storing nothing."""
        h, stride = frame.header, self._plan.page_row_bytes
        self._check(h)
        pages, exact = _unpack(self._plan, frame), h.exact_bytes
        self._num_parts, self._spans[h.part] = h.num_parts, (h.first_page, h.first_page + h.num_pages)
        self._buffer[:exact] = frame.payload[:exact]
        at = 2 * self._plan.exact_bytes + h.first_page * stride
        self._buffer[at : at + h.num_pages * stride] = pages
        return self._layer_data() if len(self._spans) == h.num_parts else None

    def _check(self, h: FrameHeader) -> None:
        stop, total = h.first_page + h.num_pages, self._plan.num_pages
        taken = [*self._spans.values()]
        problem = None
        if self._num_parts not in (None, h.num_parts):
            problem = f"expected {self._num_parts} parts, found {h.num_parts}"
        elif h.num_exact != (self._plan.num_exact if h.part == 0 else 0):
            problem = f"expected {self._plan.num_exact} exact tokens, in part 0, found {h.num_exact} in part {h.part}"
        elif stop > total or any(h.first_page < b and a < stop for a, b in taken):
            problem = f"expected free pages below {total}, found {h.first_page}..{stop} with {taken} taken"
        elif len(taken) == h.num_parts - 1 and sum(b - a for a, b in taken) + h.num_pages != total:
            problem = f"expected the parts to cover {total} pages, found {taken} and {h.first_page}..{stop}"
        if problem:
            raise FrameError("order", f"{problem} (layer {self._layer}); the sender must split a layer without gaps")

    def _layer_data(self) -> LayerData:
        n = self._plan.exact_bytes
        return LayerData(self._layer, self._buffer[:n], self._buffer[n : 2 * n], self._buffer[2 * n :])


class SequenceAssembler:
    """The frames of one sequence, in any order. Holds only layers that have begun and are not complete."""

    def __init__(self, plan: SequencePlan, max_bytes: int = MAX_SEQUENCE_BYTES) -> None:
        """Raises FrameError if the plan's ``total_bytes`` are above ``max_bytes``."""
        if plan.total_bytes > max_bytes:
            raise FrameError(
                "too_large",
                f"expected a sequence of at most {max_bytes} bytes, found {plan.total_bytes}; shorten the prompt",
            )
        self.plan = plan
        self.missing = set(range(plan.expect.num_layers))  # layers not complete yet
        self._open: dict[int, LayerAssembler] = {}
        self._seen: dict[tuple[int, int], bytes] = {}  # (layer, part) -> digest of header and payload

    @property
    def complete(self) -> bool:
        """Whether every layer has been returned."""
        return not self.missing

    def add(self, frame: Frame) -> LayerData | None:
        """Take one verified frame; returns its layer if that is now complete, else None.

        A frame that came before, byte for byte, is ignored. Raises FrameError for any other frame that does not
        belong here; the assembler stays as it was.
        """
        h = frame.header
        self._check(h)
        if self._repeats(h):
            return None
        assembler = self._open.get(h.layer) or LayerAssembler(self.plan, h.layer)
        data = assembler.add(frame)
        self._seen[h.layer, h.part] = h.digest
        self._open[h.layer] = assembler
        if data is not None:
            del self._open[h.layer]
            self.missing.discard(h.layer)
        return data

    def _check(self, h: FrameHeader) -> None:
        """Ours by name, epoch, cache and length, in this order: the first that fails names the cause."""
        plan = self.plan
        if h.sequence != plan.sequence:
            raise FrameError(
                "sequence", f"expected sequence {plan.sequence!r}, found {h.sequence!r}; route frames by their header"
            )
        if h.epoch != plan.epoch:
            raise FrameError(
                "epoch",
                f"expected epoch {plan.epoch} for sequence {plan.sequence!r}, found {h.epoch}; the reservation it was "
                "made for is gone: reserve again",
            )
        plan.expect.check(h)
        if h.num_tokens != plan.num_tokens:
            raise FrameError(
                "sequence",
                f"expected {plan.num_tokens} tokens as reserved, found {h.num_tokens}; reserve the true length",
            )

    def _repeats(self, h: FrameHeader) -> bool:
        before = self._seen.get((h.layer, h.part))
        if before is None and h.layer in self.missing:
            return False
        if before == h.digest:
            return True
        raise FrameError(
            "duplicate",
            f"expected layer {h.layer} part {h.part} once, found it again with other content; the first one is kept",
        )
