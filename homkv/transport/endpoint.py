"""What both ends of a connection share: options, link messages, socket settings, waking up."""

import socket as plain_socket
from dataclasses import dataclass
from typing import Any, Literal

import msgspec
import xxhash
import zmq

from homkv.errors import ShapeError, TransferError
from homkv.transport.keys import Security
from homkv.transport.wire import FRAME_OVERHEAD, HARD_CAP_BYTES, MAX_FRAME_BYTES

# The first part of every message on a link says what follows (docs/wire.md, link messages).
MESSAGE, FRAME, RECEIPT, PROBE = b"M", b"F", b"R", b"P"
MESSAGE_DIGEST_BYTES = 8  # XXH3-64 behind every message and receipt: a damaged token must not be believed


class LinkError(TransferError):
    """A connection that failed. ``reason`` is one word, for counting."""

    def __init__(self, reason: Literal["refused", "vanished", "timeout", "closed"], message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Receipt(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The receiver's word on a frame (``number``) or, without a number, on a message that it refused."""

    number: int | None
    reason: str = ""  # empty: accepted
    detail: str = ""
    verify_s: float = 0.0  # time the receiver spent on digest and header


@dataclass(frozen=True)
class LinkOptions:
    """Limits of a connection. Every wait is bounded by one of them."""

    peer_timeout_s: float = 10.0  # a vanished peer is noticed, and a connection made, within this time
    ack_timeout_s: float = 30.0  # a frame is acknowledged, and room in the send queue found, within this time
    window_bytes: int = 32 << 20  # sent and not acknowledged: what the receiver must be able to hold
    queue_bytes: int = 256 << 20  # accepted by send() and not acknowledged: what the sender keeps alive
    max_frame_bytes: int = MAX_FRAME_BYTES
    max_message_bytes: int = 4 << 20  # one control message
    max_messages: int = 1000  # that a sender has on one connection: frames without receipt, or words not yet taken
    linger_s: float = 1.0  # Listener.close() gives unsent bytes this long

    def __post_init__(self) -> None:
        if not FRAME_OVERHEAD < self.max_frame_bytes <= HARD_CAP_BYTES:
            raise ShapeError(
                f"expected max_frame_bytes over {FRAME_OVERHEAD}, up to {HARD_CAP_BYTES}, found {self.max_frame_bytes}"
            )
        for name in self.__dataclass_fields__:
            if getattr(self, name) <= 0:
                raise ShapeError(f"expected a positive {name}, found {getattr(self, name)}")


def open_socket(context: "zmq.Context[zmq.Socket[bytes]]", kind: int, options: LinkOptions) -> "zmq.Socket[bytes]":
    """A socket with every limit set: memory, heartbeats, waiting, lingering.

    What was sent is always taken; its sender limits it (``max_messages``, ``window_bytes``). A socket that stopped to
    read would not hear heartbeats, and libzmq could end the process over it (docs/decisions/0016-chaos.md).
    """
    socket = context.socket(kind)
    timeout_ms = int(options.peer_timeout_s * 1000)
    socket.maxmsgsize = max(options.max_frame_bytes, options.max_message_bytes) + FRAME_OVERHEAD
    socket.sndhwm, socket.rcvhwm = options.max_messages, 0
    socket.heartbeat_ivl = max(timeout_ms // 4, 1)
    socket.heartbeat_timeout = max(3 * timeout_ms // 4, 1)  # with the wait for the next heartbeat: all of it
    socket.handshake_ivl = timeout_ms
    socket.sndtimeo = timeout_ms
    socket.linger = int(options.linger_s * 1000)
    return socket


def set_keys(socket: "zmq.Socket[bytes]", security: Security) -> None:
    """Give a socket its own key pair; nothing if the connection is insecure."""
    if security.keys is not None:
        socket.curve_publickey = security.keys.public.encode()
        socket.curve_secretkey = security.keys.secret.encode()


def encode_message(message: msgspec.Struct, max_bytes: int) -> bytes:
    """Encode a control message, digest last. Raises TransferError if the receiver would refuse its size."""
    data = msgspec.msgpack.encode(message)
    _check_size(len(data), max_bytes)
    return data + xxhash.xxh3_64_digest(data)


def decode_message(decoder: "msgspec.msgpack.Decoder[Any]", data: memoryview, max_bytes: int) -> msgspec.Struct:
    """Decode a control message strictly. Raises TransferError for anything damaged or not of the declared types."""
    body, digest = data[:-MESSAGE_DIGEST_BYTES], data[-MESSAGE_DIGEST_BYTES:]
    _check_size(body.nbytes, max_bytes)
    if xxhash.xxh3_64_digest(body) != digest:
        raise TransferError("expected a message with its digest, found it damaged; nothing was used")
    try:
        message: msgspec.Struct = decoder.decode(body)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise TransferError(
            f"expected a message of a declared type, found one that is not ({error}); use the same homkv version on "
            "both sides"
        ) from error
    return message


def _check_size(found: int, cap: int) -> None:
    if found > cap:
        raise TransferError(
            f"expected a message of at most {cap} bytes, found {found}; shorten it or raise max_message_bytes"
        )


DEFAULTS = LinkOptions()


class Wake:
    """Lets another thread end a poll. ``ring`` is safe from any thread; the rest belongs to the poller's."""

    def __init__(self) -> None:
        self.reader, self._writer = plain_socket.socketpair()
        self.reader.setblocking(False)
        self._writer.setblocking(False)

    def ring(self) -> None:
        """End the poll that watches ``reader``, or the next one."""
        try:
            self._writer.send(b"\0")
        except BlockingIOError:
            return  # thousands of rings are already waiting: the poller will wake

    def drain(self) -> None:
        """Forget all rings so far."""
        try:
            while self.reader.recv(4096):
                continue
        except BlockingIOError:
            return  # empty

    def close(self) -> None:
        """Release both ends."""
        self.reader.close()
        self._writer.close()
