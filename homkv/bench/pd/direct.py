"""Layers from device to device by torch.distributed: NCCL between GPUs, gloo between CPUs.

A layer is announced on a socket, so that nobody waits on a GPU for what has not been computed. Its digest is a sum
taken by both devices; no byte of it passes through a host's memory.
"""

import datetime
import socket
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from homkv.bench.pd.ends import Incoming, Outgoing
from homkv.bench.pd.messages import Start
from homkv.bench.pd.sockets import synchronize

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


class DirectOutgoing(Outgoing):
    """The sending end, by ``dist.send``."""

    def __init__(
        self, lane: socket.socket, group: dist.ProcessGroup, target: int, device: torch.device,
        fail: Callable[..., None],
    ) -> None:  # fmt: skip
        super().__init__(lane, device, fail)
        self._group, self._target = group, target
        self._start()

    def _move(self, payload: Tensor, stream: torch.Stream) -> None:
        with torch.get_device_module(self._device).stream(stream):
            dist.send(payload, self._target, group=self._group)
        synchronize(stream)


class DirectIncoming(Incoming):
    """The receiving end, by ``dist.recv``."""

    def __init__(
        self, lane: socket.socket, group: dist.ProcessGroup, source: int, device: torch.device,
        arrived: Callable[[int, int, Tensor], None], finish: Callable[[int, int], None], fail: Callable[..., None],
    ) -> None:  # fmt: skip
        super().__init__(lane, device, arrived, finish, fail)
        self._group, self._source = group, source
        self._start()

    def _fill(self, message: Tensor, stream: torch.Stream) -> None:
        dist.recv(message, self._source, group=self._group)
        synchronize(stream)
