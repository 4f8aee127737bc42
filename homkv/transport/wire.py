"""One frame: bytes with a checked length, a checked digest and a typed header. No sockets.

``docs/wire.md`` draws the frame byte by byte. Nothing of a frame is used before its digest was verified.
"""

import struct
from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec
import xxhash

from homkv.errors import ShapeError, TransferError

MAGIC = b"HKVF"
WIRE_VERSION = 2  # of the frame's bytes; any change of layout or meaning raises it
PRELUDE = struct.Struct("<4sHHQ")  # magic, wire version, header bytes, payload bytes
DIGEST_BYTES = 16
MAX_HEADER_BYTES = 4096
FRAME_OVERHEAD = PRELUDE.size + MAX_HEADER_BYTES
MAX_FRAME_BYTES = 8 << 20  # default; a longer layer is split into parts
HARD_CAP_BYTES = 64 << 20  # no setting goes beyond it
EXACT_WIDTHS = {"float16": 2, "bfloat16": 2, "float32": 4}

Buffer = bytes | bytearray | memoryview
Reason = Literal[
    "digest", "version", "format", "model", "layout", "truncated", "too_large", "epoch", "sequence", "duplicate",
    "order", "malformed",
]  # fmt: skip
ExactDtype = Literal["float16", "bfloat16", "float32"]
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
Hex = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{8,128}$")]
Count = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
Size = Annotated[int, msgspec.Meta(ge=1, lt=2**31)]
Epoch = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
Digest = Annotated[bytes, msgspec.Meta(min_length=DIGEST_BYTES, max_length=DIGEST_BYTES)]


class FrameError(TransferError):
    """A frame that must not be used. ``reason`` is one word, for counting."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason: Reason = reason


class FrameHeader(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """What a frame's payload is: one part of one layer of one sequence. Field order is the wire's order."""

    kind: Literal["kv"]
    format: Name  # as given to --kv-cache-dtype
    layout_id: Name  # page bytes and their version
    model: Hex  # fingerprint of the weights and config that made the KV
    num_layers: Size
    num_kv_heads: Size
    head_dim: Size
    page_bytes: Count
    exact_dtype: ExactDtype
    sequence: Name
    epoch: Epoch  # of the receiver's reservation; a restarted receiver has another one
    num_tokens: Count  # of the whole sequence
    layer: Count
    part: Count
    num_parts: Size
    first_page: Count
    num_pages: Count  # in this part
    num_exact: Count  # exact tokens (sinks, then window) in this part
    coded_bytes: Count  # of the pages, packed by the format's coder; 0: sent as they are
    digest: Digest = bytes(DIGEST_BYTES)  # last, so that it is the header's last 16 bytes

    @property
    def exact_bytes(self) -> int:
        """Bytes of the exact keys and values at the payload's start."""
        return 2 * self.num_kv_heads * self.num_exact * self.head_dim * EXACT_WIDTHS[self.exact_dtype]

    @property
    def payload_bytes(self) -> int:
        """Bytes of the payload: ``exact K | exact V | pages``."""
        return self.exact_bytes + (self.coded_bytes or self.num_pages * self.num_kv_heads * self.page_bytes)


@dataclass(frozen=True)
class Frame:
    """A verified frame. ``payload`` views the received buffer: copy what must outlive it."""

    header: FrameHeader
    payload: memoryview


@dataclass(frozen=True)
class Expectation:
    """What both sides must agree on before a page can be read."""

    format: str
    layout_id: str
    model: str  # fingerprint, lower-case hex
    num_layers: int
    num_kv_heads: int
    head_dim: int
    page_bytes: int
    exact_dtype: ExactDtype

    def check(self, header: FrameHeader) -> None:
        """Raise FrameError (format, layout or model) if the frame was made for another cache than ours."""
        for name in self.__dataclass_fields__:
            ours, theirs = getattr(self, name), getattr(header, name)
            if ours != theirs:
                raise FrameError(
                    _MISMATCH.get(name, "model"),
                    f"expected {name} {ours!r} as in this decode instance, found {theirs!r} in the frame; start both "
                    "instances with the same model, --kv-cache-dtype and homkv version",
                )


_MISMATCH: dict[str, Reason] = {  # everything else is the model
    "format": "format",
    "layout_id": "layout",
    "page_bytes": "layout",
    "exact_dtype": "layout",
}
_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(FrameHeader)


def encode_frame(
    header: FrameHeader, *payload: Buffer, max_frame_bytes: int = HARD_CAP_BYTES
) -> list[bytes | memoryview]:
    """Frame a payload without copying it.

    ``header.digest`` is ignored and computed. Returns buffers whose concatenation is the frame: the head, then the
    payload's buffers as byte views. Raises ShapeError if the payload is not what the header says or not contiguous,
    FrameError if the frame is above ``max_frame_bytes``.
    """
    views = [as_bytes(b) for b in payload]
    size = sum(v.nbytes for v in views)
    if size != header.payload_bytes:
        raise ShapeError(
            f"expected a payload of {header.payload_bytes} bytes for layer {header.layer} part {header.part}, found "
            f"{size}; pass exact K, exact V and pages of the shape in the header"
        )
    body = _encoder.encode(msgspec.structs.replace(header, digest=bytes(DIGEST_BYTES)))
    if PRELUDE.size + len(body) + size > max_frame_bytes:
        raise _too_large(PRELUDE.size + len(body) + size, max_frame_bytes)
    unsigned = PRELUDE.pack(MAGIC, WIRE_VERSION, len(body), size) + body[:-DIGEST_BYTES]
    return [unsigned + _digest(unsigned, views), *(v for v in views if v.nbytes)]


def decode_frame(*buffers: Buffer, max_frame_bytes: int = HARD_CAP_BYTES) -> Frame:
    """Verify and parse one frame, given whole or as consecutive buffers of which the first holds the head.

    The length is checked first, then the digest, then the header. Copies only a payload that arrived in several
    buffers. Raises FrameError for every byte string that is not a frame of at most ``max_frame_bytes``.
    """
    views = [as_bytes(b) for b in buffers] or [memoryview(b"")]
    total = sum(v.nbytes for v in views)
    if total > max_frame_bytes:
        raise _too_large(total, max_frame_bytes)
    head_bytes, payload_bytes = _read_prelude(views[0], total)
    head, first = views[0][:head_bytes], views[0][head_bytes:]
    pieces = [piece for piece in (first, *views[1:]) if piece.nbytes]
    unsigned, stated = head[:-DIGEST_BYTES], bytes(head[-DIGEST_BYTES:])
    computed = _digest(unsigned, pieces)
    if computed != stated:
        raise FrameError(
            "digest",
            f"expected digest {stated.hex()}, found {computed.hex()} over {total} bytes; the frame was damaged on the "
            "way and was not used: send it again, and look at the link if it repeats",
        )
    header = _read_header(head[PRELUDE.size :], payload_bytes)
    return Frame(header, pieces[0] if len(pieces) == 1 else memoryview(b"".join(pieces)))


def as_bytes(buffer: Buffer) -> memoryview:
    """View a contiguous buffer as bytes, without a copy. Raises ShapeError if it is not contiguous."""
    view = memoryview(buffer)
    if not view.c_contiguous:
        raise ShapeError(f"expected a contiguous buffer, found strides {view.strides}; call .contiguous() first")
    # cast() refuses shapes with a zero in them
    return view.cast("B") if view.nbytes else memoryview(b"")


def _read_prelude(view: memoryview, total: int) -> tuple[int, int]:
    """Bytes of head (prelude and header) and of payload, proven to add up to ``total``."""
    if view.nbytes < PRELUDE.size:
        raise _truncated(PRELUDE.size, view.nbytes)
    magic, version, header_bytes, payload_bytes = PRELUDE.unpack_from(view)
    if magic != MAGIC:
        raise FrameError("malformed", f"expected magic {MAGIC!r}, found {magic!r}; the sender is not homkv")
    if version != WIRE_VERSION:
        raise FrameError(
            "version",
            f"expected wire version {WIRE_VERSION}, found {version}; install the same homkv version on both sides",
        )
    if not DIGEST_BYTES < header_bytes <= MAX_HEADER_BYTES:
        raise FrameError(
            "malformed",
            f"expected a header of {DIGEST_BYTES + 1} to {MAX_HEADER_BYTES} bytes, found {header_bytes}; send it again",
        )
    head_bytes = PRELUDE.size + header_bytes
    if view.nbytes < head_bytes or total < head_bytes + payload_bytes:
        raise _truncated(head_bytes + payload_bytes, total)
    if total > head_bytes + payload_bytes:
        raise FrameError(
            "malformed", f"expected {head_bytes + payload_bytes} bytes as in the prelude, found {total}; send it again"
        )
    return head_bytes, payload_bytes


def _read_header(view: memoryview, payload_bytes: int) -> FrameHeader:
    try:
        header = _decoder.decode(view)
    except (msgspec.MsgspecError, ValueError) as error:  # ValueError: a name that is not UTF-8
        raise FrameError(
            "malformed", f"expected a header as in docs/wire.md, found one that breaks it ({error}); check the sender"
        ) from error
    if header.payload_bytes != payload_bytes:
        raise FrameError(
            "malformed",
            f"expected a payload of {header.payload_bytes} bytes from the header's counts, found {payload_bytes}; "
            "check the sender",
        )
    if header.layer >= header.num_layers or header.part >= header.num_parts:
        raise FrameError(
            "malformed",
            f"expected a layer below {header.num_layers} and a part below {header.num_parts}, found {header.layer} and "
            f"{header.part}; check the sender",
        )
    return header


def _digest(unsigned: Buffer, payload: list[memoryview]) -> bytes:
    """XXH3-128, big endian, of everything but the digest itself."""
    state = xxhash.xxh3_128(unsigned)
    for view in payload:
        state.update(view)
    return state.digest()


def _too_large(found: int, cap: int) -> FrameError:
    return FrameError(
        "too_large", f"expected a frame of at most {cap} bytes, found {found}; split the layer or raise max_frame_bytes"
    )


def _truncated(expected: int, found: int) -> FrameError:
    return FrameError("truncated", f"expected {expected} bytes, found {found}; the frame was cut short: send it again")
