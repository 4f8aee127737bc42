"""Layers over TCP: several connections, pinned memory at both ends, every chunk hashed, the link paced.

One chunk: ``request u64 | layer u32 | offset u64 | bytes u64 | digest 16 bytes``, little endian, then its bytes. A
prompt's last word has the layer NO_LAYER and its first token as offset.
"""

import hmac
import queue
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from homkv.bench.pd.digest import host_digest
from homkv.errors import TransferError
from homkv.transport.shaper import LinkShaper

CHUNK = struct.Struct("<QIQQ16s")
NO_LAYER = 2**32 - 1
NO_DIGEST = bytes(16)
SOCKET_BUFFER = 4 << 20
CONNECT_TIMEOUT_S = 60.0


@dataclass
class Layer:
    """One layer of one prompt on its way out. ``ready``: the device has written ``payload``."""

    request: int
    layer: int
    payload: Tensor  # [bytes] uint8
    ready: torch.Event | None
    num_bytes: int  # of the payload that count; a trailer may follow
    on_sent: Callable[["Layer"], None] = lambda layer: None
    remaining: int = 0  # chunks


@dataclass(frozen=True)
class LastWord:
    """A prompt's first token, behind its layers."""

    request: int
    first_token: int

    def head(self) -> bytes:
        """As a chunk without bytes."""
        return CHUNK.pack(self.request, NO_LAYER, self.first_token, 0, NO_DIGEST)


@dataclass
class DigestCost:
    """Time that hashing took, over all threads."""

    seconds: float = 0.0
    num_bytes: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def reset(self) -> None:
        """Forget what was counted."""
        with self._lock:
            self.seconds, self.num_bytes = 0.0, 0

    def __call__(self, data: memoryview) -> bytes:
        """Hash a buffer and count."""
        start_s = time.perf_counter()
        digest = host_digest(data)
        took_s = time.perf_counter() - start_s
        with self._lock:
            self.seconds += took_s
            self.num_bytes += data.nbytes
        return digest


def staging(num_bytes: int, device: torch.device) -> Tensor:
    """Host memory that ``device`` copies to and from quickly."""
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")


def recv_exactly(connection: socket.socket, view: memoryview) -> bool:
    """Fill a buffer; False if the peer closed before the first byte. Raises TransferError if it closed later."""
    at = 0
    while at < view.nbytes:
        count = connection.recv_into(view[at:])
        if count == 0:
            if at == 0:
                return False
            raise TransferError(f"expected {view.nbytes} bytes, found the connection closed behind {at}")
        at += count
    return True


def configure(connection: socket.socket) -> socket.socket:
    """No delay, large buffers, no timeout: the worker's process is ended when a cell takes too long."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        connection.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER)
    connection.settimeout(None)
    return connection


def connect(port: int, token: str, rank: int, lane: int) -> socket.socket:
    """Open one lane to a decode worker of this host."""
    connection = configure(socket.create_connection(("127.0.0.1", port), CONNECT_TIMEOUT_S))
    connection.sendall(bytes.fromhex(token) + struct.pack("<II", rank, lane))
    return connection


def accept(listener: socket.socket, token: str, count: int) -> dict[tuple[int, int], socket.socket]:
    """Wait for ``count`` lanes that know the token, by rank and lane. Others are closed. Raises TransferError."""
    secret = bytes.fromhex(token)
    out: dict[tuple[int, int], socket.socket] = {}
    listener.settimeout(CONNECT_TIMEOUT_S)
    while len(out) < count:
        try:
            connection, _ = listener.accept()
        except TimeoutError as error:
            raise TransferError(f"expected {count} connections, found {len(out)} in {CONNECT_TIMEOUT_S} s") from error
        connection.settimeout(CONNECT_TIMEOUT_S)
        hello = bytearray(len(secret) + 8)
        if not recv_exactly(connection, memoryview(hello)) or not hmac.compare_digest(hello[:-8], secret):
            connection.close()
            continue
        rank, lane = struct.unpack("<II", hello[-8:])
        out[rank, lane] = configure(connection)
    return out


class Outgoing:
    """The sending end to one decode worker: layers in, chunks out, one thread per connection."""

    def __init__(self, lanes: list[socket.socket], chunk_bytes: int, device: torch.device, fail: Callable[..., None]):
        self.shaper = LinkShaper()
        self.digests = DigestCost()
        self._chunk_bytes, self._device, self._fail = chunk_bytes, device, fail
        self._lock = threading.Lock()
        self._queues: list[queue.SimpleQueue[tuple[Layer, int] | LastWord]] = [queue.SimpleQueue() for _ in lanes]
        self._next = 0
        for lane, jobs in zip(lanes, self._queues, strict=True):
            threading.Thread(target=self._run, args=(lane, jobs), daemon=True).start()

    def send(self, layer: Layer) -> None:
        """Queue a layer's chunks; ``layer.on_sent`` is called behind the last of them."""
        offsets = range(0, layer.num_bytes, self._chunk_bytes)
        layer.remaining = len(offsets)
        for offset in offsets:
            self._queues[self._next % len(self._queues)].put((layer, offset))
            self._next += 1

    def finish(self, word: LastWord) -> None:
        """Queue a prompt's last word; it may overtake layers on other lanes."""
        self._queues[0].put(word)

    def _run(self, lane: socket.socket, jobs: "queue.SimpleQueue[tuple[Layer, int] | LastWord]") -> None:
        try:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)
            buffer, stream = staging(self._chunk_bytes, self._device), side_stream(self._device)
            while True:
                job = jobs.get()
                if isinstance(job, LastWord):
                    lane.sendall(job.head())
                else:
                    self._send_chunk(lane, buffer, stream, *job)
        except BaseException as error:
            self._fail(error)

    def _send_chunk(self, lane: socket.socket, buffer: Tensor, stream: torch.Stream, layer: Layer, offset: int) -> None:
        size = min(self._chunk_bytes, layer.num_bytes - offset)
        if layer.ready is not None:
            layer.ready.synchronize()
        ready_s = time.monotonic()
        with torch.get_device_module(self._device).stream(stream):
            buffer[:size].copy_(layer.payload[offset : offset + size], non_blocking=True)
        synchronize(stream)
        data = buffer[:size].numpy().data
        digest = self.digests(data)
        pause_s = self.shaper.reserve(size, ready_s) - time.monotonic()
        if pause_s > 0:
            time.sleep(pause_s)
        lane.sendall(CHUNK.pack(layer.request, layer.layer, offset, size, digest))
        lane.sendall(data)
        with self._lock:
            layer.remaining -= 1
            is_last = layer.remaining == 0
        if is_last:
            layer.on_sent(layer)


class Incoming:
    """The receiving end: chunks in, verified, on the device; complete layers are handed on.

    ``place(request, layer)``: the tensor ``[bytes] uint8`` that takes the layer. ``arrived(request, layer, bytes)``:
    so many more of its bytes are there. ``finish(request, first_token)``. All are called from several threads.
    """

    def __init__(
        self,
        lanes: list[socket.socket],
        chunk_bytes: int,
        device: torch.device,
        place: Callable[[int, int], Tensor],
        arrived: Callable[[int, int, int], None],
        finish: Callable[[int, int], None],
        fail: Callable[..., None],
    ) -> None:
        self.digests = DigestCost()
        self._chunk_bytes, self._device = chunk_bytes, device
        self._place, self._arrived, self._finish, self._fail = place, arrived, finish, fail
        for lane in lanes:
            threading.Thread(target=self._run, args=(lane,), daemon=True).start()

    def _run(self, lane: socket.socket) -> None:
        try:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)
            buffer, stream = staging(self._chunk_bytes, self._device), side_stream(self._device)
            head = bytearray(CHUNK.size)
            while recv_exactly(lane, memoryview(head)):
                request, layer, offset, size, digest = CHUNK.unpack(head)
                if layer == NO_LAYER:
                    self._finish(request, offset)
                else:
                    self._take(lane, buffer, stream, (request, layer, offset, size, digest))
        except BaseException as error:
            self._fail(error)

    def _take(
        self, lane: socket.socket, buffer: Tensor, stream: torch.Stream, chunk: tuple[int, int, int, int, bytes]
    ) -> None:
        request, layer, offset, size, stated = chunk
        if size > self._chunk_bytes:
            raise TransferError(f"expected chunks of at most {self._chunk_bytes} bytes, found {size}")
        data = buffer[:size].numpy().data
        recv_exactly(lane, data)
        if self.digests(data) != stated:
            raise TransferError(
                f"expected digest {stated.hex()} of request {request}, layer {layer}, found another; the bytes changed"
            )
        with torch.get_device_module(self._device).stream(stream):
            place = self._place(request, layer)
            if offset + size > place.numel():
                raise TransferError(f"expected a chunk within {place.numel()} bytes, found {size} at {offset}")
            place[offset : offset + size].copy_(buffer[:size], non_blocking=True)
            synchronize(stream)
            self._arrived(request, layer, size)


def side_stream(device: torch.device) -> torch.Stream:
    """A stream beside the computation's; on a GPU its small kernels go first, or each would wait for a large one."""
    module = torch.get_device_module(device)
    stream: torch.Stream = module.Stream(priority=-1) if device.type == "cuda" else module.Stream()
    return stream


def synchronize(stream: torch.Stream) -> None:
    """Wait for a stream; a CPU's has nothing to wait for."""
    if isinstance(stream, torch.cuda.Stream):
        stream.synchronize()
