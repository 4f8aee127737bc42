"""The two ends of a link from device to device: layers announced on a socket, moved by a thread in whatever way."""

import queue
import socket
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from homkv.bench.pd.digest import TRAILER_BYTES, padded
from homkv.bench.pd.sockets import CHUNK, NO_DIGEST, NO_LAYER, LastWord, Layer, recv_exactly, side_stream


class Outgoing(ABC):
    """The sending end of one pair: one thread, one layer at a time. What it needs is set before ``_start``."""

    def __init__(self, lane: socket.socket, device: torch.device, fail: Callable[..., None]) -> None:
        self._lane, self._device, self._fail = lane, device, fail
        self._jobs: queue.SimpleQueue[Layer | LastWord] = queue.SimpleQueue()

    def _start(self) -> None:
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
                self._move(job.payload, stream)
                job.on_sent(job)
        except BaseException as error:
            self._fail(error)

    @abstractmethod
    def _move(self, payload: Tensor, stream: torch.Stream) -> None:
        """Hand an announced payload over; its memory is free afterwards."""


class Incoming(ABC):
    """The receiving end of one pair. ``arrived(request, layer, message)``: payload and trailer, not yet verified."""

    def __init__(
        self, lane: socket.socket, device: torch.device, arrived: Callable[[int, int, Tensor], None],
        finish: Callable[[int, int], None], fail: Callable[..., None],
    ) -> None:  # fmt: skip
        self._lane, self._device = lane, device
        self._arrived, self._finish, self._fail = arrived, finish, fail

    def _start(self) -> None:
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
                    message = torch.empty(padded(size) + TRAILER_BYTES, dtype=torch.uint8, device=self._device)
                    self._fill(message, stream)
                    self._arrived(request, layer, message)
        except BaseException as error:
            self._fail(error)

    @abstractmethod
    def _fill(self, message: Tensor, stream: torch.Stream) -> None:
        """Bring an announced layer into ``message``, complete on return."""
