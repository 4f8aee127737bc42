"""Layers from device to device by torch.distributed: NCCL between GPUs, gloo between CPUs.

A layer is announced on a socket, so that nobody waits on a GPU for what has not been computed. Its digest is a sum
taken by both devices; no byte of it passes through a host's memory.
"""

import datetime
import queue
import socket
import threading
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from homkv.bench.pd.digest import TRAILER_BYTES, padded
from homkv.bench.pd.messages import Start
from homkv.bench.pd.sockets import CHUNK, NO_DIGEST, NO_LAYER, LastWord, Layer, recv_exactly, side_stream, synchronize

TIMEOUT = datetime.timedelta(seconds=120)


def join(start: Start, device: torch.device) -> dict[tuple[int, int], dist.ProcessGroup]:
    """Meet all workers; returns one group per pair of ranks (prefill, decode), each with a connection of its own."""
    assert start.store_port is not None
    world = start.num_prefill + start.num_decode
    store = dist.TCPStore(  # type: ignore[attr-defined]  # torch exports it by a star
        "127.0.0.1", start.store_port, world, is_master=False, timeout=TIMEOUT
    )
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=start.rank, world_size=world, timeout=TIMEOUT)
    pairs = [(p, start.num_prefill + d) for p in range(start.num_prefill) for d in range(start.num_decode)]
    options = None
    if backend == "nccl":  # sends and receives share their GPU with the computation, and must not wait behind it
        options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    groups = {pair: dist.new_group(list(pair), timeout=TIMEOUT, pg_options=options) for pair in pairs}
    for (source, target), group in groups.items():  # the first transfer sets up the connection
        word = torch.zeros(1024, dtype=torch.uint8, device=device)
        if start.rank == source:
            dist.send(word, target, group=group)
        elif start.rank == target:
            dist.recv(word, source, group=group)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return groups


def has_backend(device: torch.device) -> bool:
    """Whether torch.distributed can connect devices of this kind."""
    return bool(dist.is_available()) and (
        dist.is_nccl_available() if device.type == "cuda" else dist.is_gloo_available()
    )


class DirectOutgoing:
    """The sending end of one pair: one thread, one layer at a time."""

    def __init__(
        self, lane: socket.socket, group: dist.ProcessGroup, target: int, device: torch.device,
        fail: Callable[..., None],
    ) -> None:  # fmt: skip
        self._lane, self._group, self._target, self._device = lane, group, target, device
        self._fail = fail
        self._jobs: queue.SimpleQueue[Layer | LastWord] = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True).start()

    def send(self, layer: Layer) -> None:
        """Queue a layer, whose payload ends with its trailer."""
        self._jobs.put(layer)

    def finish(self, word: LastWord) -> None:
        """Queue a prompt's last word."""
        self._jobs.put(word)

    def _run(self) -> None:
        try:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)
            stream = side_stream(self._device)
            while True:
                job = self._jobs.get()
                if isinstance(job, LastWord):
                    self._lane.sendall(job.head())
                    continue
                if job.ready is not None:
                    job.ready.synchronize()
                self._lane.sendall(CHUNK.pack(job.request, job.layer, 0, job.num_bytes, NO_DIGEST))
                with torch.get_device_module(self._device).stream(stream):
                    dist.send(job.payload, self._target, group=self._group)
                synchronize(stream)
                job.on_sent(job)
        except BaseException as error:
            self._fail(error)


class DirectIncoming:
    """The receiving end of one pair. ``arrived(request, layer, message)``: payload and trailer, not yet verified."""

    def __init__(
        self, lane: socket.socket, group: dist.ProcessGroup, source: int, device: torch.device,
        arrived: Callable[[int, int, Tensor], None], finish: Callable[[int, int], None], fail: Callable[..., None],
    ) -> None:  # fmt: skip
        self._lane, self._group, self._source, self._device = lane, group, source, device
        self._arrived, self._finish, self._fail = arrived, finish, fail
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        try:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)
            stream, head = side_stream(self._device), bytearray(CHUNK.size)
            while recv_exactly(self._lane, memoryview(head)):
                request, layer, token, size, _ = CHUNK.unpack(head)
                if layer == NO_LAYER:
                    self._finish(request, token)
                    continue
                with torch.get_device_module(self._device).stream(stream):
                    self._take(request, layer, size, stream)
        except BaseException as error:
            self._fail(error)

    def _take(self, request: int, layer: int, size: int, stream: torch.Stream) -> None:
        message = torch.empty(padded(size) + TRAILER_BYTES, dtype=torch.uint8, device=self._device)
        dist.recv(message, self._source, group=self._group)
        synchronize(stream)
        self._arrived(request, layer, message)
