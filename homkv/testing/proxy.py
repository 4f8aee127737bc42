"""A proxy in front of a listener that reads ZMTP 3.1 on its way, so that it can harm single messages of a link.

It works on TCP connections: each connection of a peer has one of its own to the listener, and when one side ends, the
other does. That keeps what ZeroMQ says about connections true through the proxy. On links with keys it sees each part
of a message as a message of its own, sealed, whose length tells what it is (homkv.testing.names).
"""

import contextlib
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Self

from homkv.errors import TransferError
from homkv.testing.faults import Fault
from homkv.testing.names import Names, PlainNames

GREETING_BYTES = 64
MORE, LONG, COMMAND = 1, 2, 4  # flags of a ZMTP frame
CHUNK = 1 << 16


def parse_endpoint(endpoint: str) -> tuple[str, int]:
    """Host and port of ``tcp://HOST:PORT``. Raises TransferError."""
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    if not endpoint.startswith("tcp://") or not host or not port.isdigit():
        raise TransferError(f"expected tcp://HOST:PORT, found {endpoint!r}")
    return host, int(port)


class _Reader:
    """Units of one direction: the greeting in pieces, commands, and whole messages as lists of parts."""

    def __init__(self, source: socket.socket) -> None:
        self._source, self._buffer, self._greeting_left = source, bytearray(), GREETING_BYTES

    def _fill(self, count: int) -> bool:
        while len(self._buffer) < count:
            data = self._source.recv(CHUNK)  # a timeout loses nothing: the buffer stays
            if not data:
                return False
            self._buffer += data
        return True

    def next(self) -> bytes | list[bytes] | None:
        """Raw bytes to pass on, a message, or None at the end. Raises TimeoutError."""
        if self._greeting_left:
            if not self._fill(1):
                return None
            return self._take(min(self._greeting_left, len(self._buffer)), greeting=True)
        parts, at = list[bytes](), 0
        while True:
            if not self._fill(at + 2):
                return None
            flags = self._buffer[at]
            head = 9 if flags & LONG else 2
            if not self._fill(at + head):
                return None
            size = struct.unpack_from("!Q", self._buffer, at + 1)[0] if flags & LONG else self._buffer[at + 1]
            if not self._fill(at + head + size):
                return None
            if flags & COMMAND:
                if not parts:
                    return self._take(head + size)
                raise TransferError("expected no command between the parts of a message, found one")
            parts.append(bytes(self._buffer[at + head : at + head + size]))
            at += head + size
            if not flags & MORE:
                self._take(at)
                return parts

    def _take(self, count: int, greeting: bool = False) -> bytes:
        data = bytes(self._buffer[:count])
        del self._buffer[:count]
        if greeting:
            self._greeting_left -= count
        return data


def encode_parts(parts: list[bytes]) -> bytes:
    """One message as ZMTP frames."""
    out = bytearray()
    for i, part in enumerate(parts):
        flags = MORE * (i < len(parts) - 1) | LONG * (len(part) > 255)
        out += bytes([flags]) + (struct.pack("!Q", len(part)) if flags & LONG else bytes([len(part)])) + part
    return bytes(out)


class _Connection:
    """One connection through the proxy. Its two directions share what stalls, and its end."""

    def __init__(self, link: "FaultyLink", near: socket.socket, far: socket.socket) -> None:
        self.link, self._ends = link, (near, far)
        self.names, self.stalled_until_s = link.make_names(), 0.0
        for direction in (_Direction(self, near, far, True), _Direction(self, far, near, False)):
            threading.Thread(target=direction.run, daemon=True, name="faulty-link").start()

    def close(self) -> None:
        """End both sides at once, without a word: what is on its way is lost."""
        for end in self._ends:
            with contextlib.suppress(OSError):  # its own side has ended it
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        self.link.forget(self)


class _Direction:
    """Everything that goes one way on one connection."""

    def __init__(
        self, connection: _Connection, source: socket.socket, target: socket.socket, to_listener: bool
    ) -> None:
        self._connection, self._source, self._target = connection, source, target
        self._to_listener = to_listener
        self._reader = _Reader(source)
        self._held: list[bytes] = []  # a message that a later one shall overtake
        self._is_silent = False

    def run(self) -> None:
        """Pass everything on, until one side ends."""
        try:
            while (unit := self._next()) is not None:
                time.sleep(max(0.0, self._connection.stalled_until_s - time.monotonic()))
                if isinstance(unit, bytes):
                    self._send(unit)
                else:
                    self._pass(unit)
        except (OSError, TransferError) as error:
            self._connection.link.note(str(error))
        finally:
            self._connection.close()

    def _next(self) -> bytes | list[bytes] | None:
        try:
            return self._reader.next()
        except TimeoutError:  # nothing came to overtake what is held
            self._release()
            return b""

    def _send(self, data: bytes) -> None:
        if not self._is_silent:
            self._target.sendall(data)

    def _release(self) -> None:
        self._source.settimeout(None)
        while self._held:
            self._send(self._held.pop())

    def _pass(self, parts: list[bytes]) -> None:
        """Pass a message on, or do to it what the fault says."""
        name = self._connection.names.name(self._to_listener, parts)
        fault, data = self._connection.link.take(name), encode_parts(parts)
        match fault.kind if fault is not None else None:
            case "drop":
                return
            case "duplicate":
                data *= 2
            case "reorder" if fault is not None:
                self._held.append(data)
                self._source.settimeout(max(fault.duration_s, 0.001))
                return
            case "truncate" | "flip" if fault is not None:
                data = encode_parts([*parts[:-1], fault.damage(parts[-1])])
            case "cut":
                self._send(data[: len(data) // 2])
                raise TransferError("cut by a fault")
            case "half_open":
                self._is_silent = True
            case "delay" if fault is not None:
                time.sleep(fault.duration_s)
            case "stall" if fault is not None:
                self._connection.stalled_until_s = time.monotonic() + fault.duration_s
                time.sleep(fault.duration_s)
        self._send(data)
        if self._held:
            self._release()


class FaultyLink:
    """Listens at ``endpoint`` for the listener at ``target``, and harms what passes. A context manager.

    One fault is armed at a time; each happens once. ``counts``: messages that passed, by name. ``make_names``: who
    names the messages of a connection; with keys SealedNames.
    """

    def __init__(self, target: str, make_names: Callable[[], Names] = PlainNames) -> None:
        self._target: tuple[str, int] | None = parse_endpoint(target)
        self.make_names = make_names
        self.counts: Counter[str] = Counter()
        self.notes: list[str] = []  # why connections ended
        self._lock = threading.Lock()
        self._fault: Fault | None = None
        self._on_hit: Callable[[], None] | None = None
        self._left = 0
        self._connections: set[_Connection] = set()
        self._is_open = True
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"tcp://127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True, name="faulty-link").start()

    def arm(self, fault: Fault, on_hit: Callable[[], None] | None = None) -> None:
        """Wait for the fault's message, counted from now. ``on_hit`` is called before the message passes."""
        with self._lock:
            self._fault, self._on_hit, self._left = fault, on_hit, fault.nth

    def disarm(self) -> bool:
        """Forget the fault; whether it was still waiting, so that nothing happened."""
        with self._lock:
            waited, self._fault = self._fault is not None, None
            return waited

    @property
    def is_armed(self) -> bool:
        """Whether a fault waits for its message."""
        return self._fault is not None

    def take(self, name: str) -> Fault | None:
        """Count a message; the fault, if this is the one it waits for."""
        with self._lock:
            self.counts[name] += 1
            fault = self._fault
            if fault is None or fault.message != name:
                return None
            self._left -= 1
            if self._left >= 0:
                return None
            self._fault, on_hit = None, self._on_hit
        if on_hit is not None:
            on_hit()
        return fault

    def note(self, text: str) -> None:
        """Remember why a connection ended."""
        self.notes = [*self.notes[-99:], text]

    def forget(self, connection: _Connection) -> None:
        """A connection has ended."""
        with self._lock:
            self._connections.discard(connection)

    def sever(self) -> None:
        """End all connections without a word, as a dying host does; new ones may come."""
        with self._lock:
            connections = list(self._connections)
        for connection in connections:
            connection.close()

    def retarget(self, target: str | None) -> None:
        """Lead new connections to another listener; None refuses them."""
        self._target = None if target is None else parse_endpoint(target)

    def close(self) -> None:
        """End everything."""
        self._is_open = False
        with contextlib.suppress(OSError):  # not every system lets a listening socket be shut down
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread in accept
        self._socket.close()
        self.sever()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _accept(self) -> None:
        while self._is_open:
            try:
                near, _ = self._socket.accept()
            except OSError as error:
                self.note(f"stopped listening: {error}")
                return
            target = self._target
            try:
                if target is None:
                    raise ConnectionRefusedError("no listener behind this link")
                far = socket.create_connection(target, timeout=5.0)
            except OSError as error:
                self.note(str(error))
                near.close()
                continue
            for end in (near, far):
                end.settimeout(None)
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._connections.add(_Connection(self, near, far))
