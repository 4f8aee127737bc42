"""The two ends of a connection: a ``Listener`` that many peers reach, and a ``Peer`` that reaches one listener.

Threads: a socket belongs to the thread that made its object and polls it. ``Listener.send``, ``ack`` and ``nack``
may be called from any thread: they only queue, and ``poll`` sends.
"""

import itertools
import logging
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import msgspec
import zmq
from zmq.auth.thread import ThreadAuthenticator

from homkv.errors import TransferError
from homkv.transport.endpoint import (
    DEFAULTS,
    FRAME,
    MESSAGE,
    PROBE,
    RECEIPT,
    LinkError,
    LinkOptions,
    Receipt,
    Wake,
    decode_message,
    encode_message,
    open_socket,
    set_keys,
)
from homkv.transport.keys import Security
from homkv.transport.monitor import Monitor
from homkv.transport.wire import Frame, FrameError, decode_frame

log = logging.getLogger(__name__)
NUMBER_BYTES = 8
MAX_EVENTS = 64  # per poll, so that a busy link cannot starve the poller's other work


@dataclass(frozen=True)
class Message:
    """A control message from a peer."""

    peer: bytes
    body: msgspec.Struct


@dataclass(frozen=True)
class Arrival:
    """A verified frame that waits for ``ack`` or ``nack``."""

    peer: bytes
    number: int
    frame: Frame
    verify_s: float


@dataclass(frozen=True)
class PeerLost:
    """A peer that is gone, after finishing or not, or that does not read what it is sent."""

    peer: bytes


Event = Message | Arrival | PeerLost


class Listener:
    """The reachable end. Refused peers and damaged input are counted in ``refused`` and never raise."""

    def __init__(self, endpoint: str, messages: Any, security: Security, options: LinkOptions = DEFAULTS) -> None:
        """Bind ``endpoint`` (``tcp://host:port``, port 0 for a free one).

        ``messages``: the msgspec struct type, or union of tagged ones, that peers may send. Raises TransferError
        if the endpoint cannot be bound.
        """
        self._options, self._decoder = options, msgspec.msgpack.Decoder(messages)
        self.refused: Counter[str] = Counter()  # untrusted_key, handshake, malformed and FrameError reasons
        self._outbox: deque[tuple[bytes, list[bytes]]] = deque()
        self._peers: set[bytes] = set()
        self._probe_at_s = 0.0
        self._wake = Wake()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()  # its own: one authenticator per context
        self._authenticator = _authenticate(self._context, security)
        self._socket = open_socket(self._context, zmq.ROUTER, options)
        self._socket.router_mandatory = True  # sending to a peer that is gone is an error, not silence
        self._socket.curve_server = not security.insecure
        set_keys(self._socket, security)
        self._monitor = Monitor(self._socket)
        try:
            self._socket.bind(endpoint)
        except zmq.ZMQError as error:
            self.close()
            raise TransferError(f"expected to bind {endpoint}, found {error}; choose a free port") from error
        self.endpoint = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._poller = zmq.Poller()
        for readable in (self._socket, self._monitor.socket, self._wake.reader):
            self._poller.register(readable, zmq.POLLIN)

    def poll(self, timeout_s: float) -> list[Event]:
        """Send what is queued and return what came in; may return nothing before ``timeout_s`` is over."""
        until_probe_s = max(0.0, self._probe_at_s - time.monotonic())
        self._poller.poll(int(min(timeout_s, until_probe_s) * 1000))
        self._wake.drain()
        events = self._flush()
        while (happened := self._monitor.next()) is not None:
            if happened in ("untrusted_key", "handshake"):
                self.refused[happened] += 1
                log.warning("refused a peer: %s", happened)
        while self._socket.poll(0):
            if len(events) >= MAX_EVENTS:
                return events
            event = self._receive()
            if event is not None:
                events.append(event)
        return events + self._probe()  # last: what a lost peer sent before comes before its PeerLost

    def send(self, peer: bytes, message: msgspec.Struct) -> None:
        """Queue a control message. From any thread. A peer that is gone shows as PeerLost in ``poll``.

        Raises TransferError if the message is above ``max_message_bytes``.
        """
        self._queue(peer, [MESSAGE, encode_message(message, self._options.max_message_bytes)])

    def ack(self, arrival: Arrival) -> None:
        """Tell the sender that a frame was used: its bytes no longer count against the window. From any thread."""
        self._reply(arrival.peer, Receipt(arrival.number, verify_s=arrival.verify_s))

    def nack(self, arrival: Arrival, error: TransferError) -> None:
        """Tell the sender that a frame was not used, and why; the transfer fails there. From any thread."""
        self._refuse(arrival.peer, arrival.number, error)

    def close(self) -> None:
        """Close the socket; queued bytes get ``linger_s``."""
        self._monitor.close()
        self._socket.close()
        if self._authenticator is not None:
            self._authenticator.stop()
        self._context.term()
        self._wake.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _queue(self, peer: bytes, parts: list[bytes]) -> None:
        self._outbox.append((peer, parts))
        self._wake.ring()

    def _reply(self, peer: bytes, receipt: Receipt) -> None:
        self._queue(peer, [RECEIPT, encode_message(receipt, self._options.max_message_bytes)])

    def _refuse(self, peer: bytes, number: int | None, error: TransferError) -> None:
        reason = error.reason if isinstance(error, FrameError) else "malformed"
        self.refused[reason] += 1
        log.warning("refused input of peer %s (%s): %s", peer.hex(), reason, error)
        self._reply(peer, Receipt(number, reason, str(error)))

    def _flush(self) -> list[Event]:
        events: list[Event] = []
        while self._outbox:
            peer, parts = self._outbox.popleft()
            if not self._deliver(peer, parts):
                events += self._lose(peer)
        return events

    def _deliver(self, peer: bytes, parts: list[bytes]) -> bool:
        try:
            self._socket.send_multipart([peer, *parts], zmq.DONTWAIT)
        except zmq.Again:
            return parts[0] == PROBE  # not reading: a probe may be skipped, an answer may not
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            return False
        return True

    def _lose(self, peer: bytes) -> list[Event]:
        if peer not in self._peers:
            return []  # reported before
        self._peers.discard(peer)
        log.info("lost peer %s", peer.hex())
        return [PeerLost(peer)]

    def _probe(self) -> list[Event]:
        """Find peers whose connection broke: heartbeats break it, sending to it tells."""
        now = time.monotonic()
        if now < self._probe_at_s:
            return []
        self._probe_at_s = now + self._options.peer_timeout_s / 4
        return [event for peer in list(self._peers) if not self._deliver(peer, [PROBE]) for event in self._lose(peer)]

    def _receive(self) -> Event | None:
        identity, *parts = (part.buffer for part in self._socket.recv_multipart(copy=False))
        peer = bytes(identity)
        self._peers.add(peer)
        number = None
        try:
            if len(parts) < 3 or parts[1].nbytes != NUMBER_BYTES or parts[0] not in (MESSAGE, FRAME):
                raise FrameError("malformed", f"expected a message or frame, found {len(parts)} parts; see wire.md")
            number = int.from_bytes(parts[1], "little")
            return self._open(peer, number, parts[0] == FRAME, parts[2:])
        except TransferError as error:
            self._refuse(peer, number, error)
            return None

    def _open(self, peer: bytes, number: int, is_frame: bool, body: list[memoryview]) -> Event:
        """Verify a frame, or decode a message and acknowledge it: the caller decides only about frames."""
        if is_frame:
            start_s = time.perf_counter()
            frame = decode_frame(*body, max_frame_bytes=self._options.max_frame_bytes)
            return Arrival(peer, number, frame, time.perf_counter() - start_s)
        message = Message(peer, decode_message(self._decoder, body[0], self._options.max_message_bytes))
        self._reply(peer, Receipt(number))
        return message


class Peer:
    """The reaching end, connected when the constructor returns. One thread's; good for one connection.

    After a LinkError make a new Peer: the other side may have restarted, and then no epoch of before is valid.
    """

    def __init__(
        self,
        endpoint: str,
        messages: Any,
        security: Security,
        server_key: str | None = None,
        options: LinkOptions = DEFAULTS,
    ) -> None:
        """Connect to a listener whose public key is ``server_key`` (needed unless insecure).

        ``messages``: the struct type or union that the listener may send. Raises LinkError within
        ``peer_timeout_s`` if it is not reachable or one side does not trust the other.
        """
        if (server_key is None) != security.insecure:
            raise LinkError(
                "refused", "expected the listener's public key, or insecure=True and no key; see docs/wire.md"
            )
        self.endpoint, self._options, self._decoder = endpoint, options, msgspec.msgpack.Decoder(messages)
        self._unread: deque[msgspec.Struct] = deque()
        self._numbers = itertools.count()
        self._socket = open_socket(zmq.Context.instance(), zmq.DEALER, options)
        self._monitor = Monitor(self._socket)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._monitor.socket, zmq.POLLIN)
        try:
            self._connect(security, server_key)
        except BaseException:  # nobody else can close a half-made object
            self.close()
            raise

    def _connect(self, security: Security, server_key: str | None) -> None:
        try:
            set_keys(self._socket, security)
            if server_key is not None:
                self._socket.curve_serverkey = server_key.encode()
            self._socket.connect(self.endpoint)
        except zmq.ZMQError as error:
            raise LinkError(
                "refused", f"expected tcp://host:port and a Z85 key, found {self.endpoint!r}, {server_key!r} ({error})"
            ) from error
        self._await_handshake()

    def _await_handshake(self) -> None:
        deadline_s = time.monotonic() + self._options.peer_timeout_s
        while (left_s := deadline_s - time.monotonic()) > 0:
            happened = self._monitor.next(left_s)
            if happened == "connected":
                return
            if happened is not None:
                raise LinkError(
                    "refused",
                    f"expected {self.endpoint} to accept our key and to prove its own, found the handshake refused "
                    f"({happened}); add our public key to its trust store and check its key here",
                )
        raise LinkError(
            "timeout",
            f"expected a listener at {self.endpoint} within {self._options.peer_timeout_s} s, found none; start it",
        )

    @property
    def readable(self) -> "list[zmq.Socket[bytes]]":
        """What a poller of many peers watches; call ``poll(0)`` when one of them can be read."""
        return [self._socket, self._monitor.socket]

    def watch(self, wake: Wake) -> None:
        """Let ``wake`` end a ``poll`` early."""
        self._poller.register(wake.reader, zmq.POLLIN)

    def send(self, message: msgspec.Struct) -> None:
        """Send a control message.

        Raises LinkError if it cannot leave within ``peer_timeout_s``, TransferError if it is too large.
        """
        self.submit(MESSAGE, [encode_message(message, self._options.max_message_bytes)])

    def submit(self, kind: bytes, body: Sequence[bytes | memoryview]) -> tuple[int, zmq.MessageTracker]:
        """Send a MESSAGE or a FRAME without copying; returns the number that its receipt will carry.

        The buffers must not change until the receipt came or the tracker is done. Raises like ``send``.
        """
        number = next(self._numbers)
        parts = [kind, number.to_bytes(NUMBER_BYTES, "little"), *body]
        try:
            tracker = self._socket.send_multipart(parts, copy=False, track=True)
        except zmq.Again as error:
            raise LinkError(
                "timeout",
                f"expected {self.endpoint} to take a message within {self._options.peer_timeout_s} s, found it stuck; "
                "see its log",
            ) from error
        assert tracker is not None  # because of track=True
        return number, tracker

    def poll(self, timeout_s: float) -> list[msgspec.Struct]:
        """Return messages and receipts that came; may return none before ``timeout_s`` is over.

        Raises LinkError if the listener vanished.
        """
        self._poller.poll(int(timeout_s * 1000))
        received = []
        while self._socket.poll(0):
            received += self._receive()
        if not received and self._monitor.next() == "lost":
            raise LinkError(
                "vanished",
                f"expected {self.endpoint} to stay connected, found the peer vanished; see its log, then connect again",
            )
        return received

    def recv(self, timeout_s: float) -> msgspec.Struct:
        """Return the next control message.

        Raises LinkError if none comes in time or the listener vanished, TransferError if it refused a message of ours.
        """
        deadline_s = time.monotonic() + timeout_s
        while not self._unread:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                raise LinkError(
                    "timeout", f"expected a message of {self.endpoint} within {timeout_s} s, found none; is it busy?"
                )
            for received in self.poll(left_s):
                if not isinstance(received, Receipt):
                    self._unread.append(received)
                elif received.reason:
                    raise TransferError(f"expected {self.endpoint} to accept our message, found: {received.detail}")
        return self._unread.popleft()

    def close(self) -> None:
        """Close the socket. What the other side has not received may be lost: wait for receipts where it matters.

        Without lingering: libzmq may end the process if a connection breaks while its socket lingers and its
        heartbeats go on (docs/decisions/0016-chaos.md). Nothing here needs it: frames are acknowledged, and instances
        drop the requests of a connection that ends.
        """
        self._monitor.close()
        self._socket.close(linger=0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _receive(self) -> list[msgspec.Struct]:
        kind, *body = (part.buffer for part in self._socket.recv_multipart(copy=False))
        if kind == PROBE:
            return []
        if len(body) != 1 or kind not in (MESSAGE, RECEIPT):
            raise TransferError(
                f"expected a message or receipt of {self.endpoint}, found {1 + len(body)} parts; see docs/wire.md"
            )
        decoder: msgspec.msgpack.Decoder[Any] = _receipts if kind == RECEIPT else self._decoder
        return [decode_message(decoder, body[0], self._options.max_message_bytes)]


_receipts = msgspec.msgpack.Decoder(Receipt)


def _authenticate(context: "zmq.Context[zmq.Socket[bytes]]", security: Security) -> ThreadAuthenticator | None:
    """Ask the trust store about every key that connects."""
    if security.insecure:
        log.warning("listening without encryption and authentication: anyone who reaches the port may send KV")
        return None
    authenticator = ThreadAuthenticator(context)
    authenticator.start()
    authenticator.configure_curve_callback("*", security.trust)
    return authenticator
