"""Layers by NIXL: the decode worker reads them out of the prefill worker's memory, over whatever joins the two.

Both ends register one arena with NIXL. A layer crosses it in pieces: the sender fills its arena and announces the piece
on a socket, the receiver reads it into its own, copies it to where it belongs, and answers with one byte.
"""

import importlib.util
import socket
import struct
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from homkv.bench.pd.ends import Incoming, Outgoing
from homkv.bench.pd.sockets import recv_exactly, synchronize
from homkv.errors import TransferError

ARENA_BYTES = 72 << 20  # a layer of 16K tokens in 16 bits is one piece
MAX_METADATA_BYTES = 1 << 20
HELLO = struct.Struct("<QQI")  # arena's address, device index, bytes of metadata behind
POLL_S = 2e-5
READ = b"r"


def is_available() -> bool:
    """Whether NIXL is installed."""
    return importlib.util.find_spec("nixl") is not None


class Arena:
    """Memory that NIXL may read from or into, and the agent that knows it."""

    def __init__(self, name: str, device: torch.device) -> None:
        from nixl._api import nixl_agent, nixl_agent_config  # optional

        self.memory = torch.zeros(ARENA_BYTES, dtype=torch.uint8, device=device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self.kind, self.index = ("VRAM" if device.type == "cuda" else "DRAM"), device.index or 0
        self.agent: Any = nixl_agent(name, nixl_agent_config(backends=["UCX"]))
        self.agent.register_memory([(self.memory.data_ptr(), ARENA_BYTES, self.index, "")], self.kind)

    def introduce(self, lane: socket.socket) -> None:
        """Tell the other end where to read."""
        metadata: bytes = self.agent.get_agent_metadata()
        lane.sendall(HELLO.pack(self.memory.data_ptr(), self.index, len(metadata)) + metadata)

    def descriptors(self, address: int, index: int, num_bytes: int) -> Any:
        """One run of bytes, here or there."""
        return self.agent.get_xfer_descs([(address, num_bytes, index)], self.kind)


class NixlOutgoing(Outgoing):
    """The sending end: one piece after the other through its arena."""

    def __init__(self, lane: socket.socket, name: str, device: torch.device, fail: Callable[..., None]) -> None:
        super().__init__(lane, device, fail)
        self._arena = Arena(name, device)
        self._arena.introduce(lane)
        self._start()

    def _move(self, payload: Tensor, stream: torch.Stream) -> None:
        for piece in payload.split(ARENA_BYTES):
            with torch.get_device_module(self._device).stream(stream):
                self._arena.memory[: len(piece)].copy_(piece, non_blocking=True)
            synchronize(stream)
            self._lane.sendall(READ)
            if not recv_exactly(self._lane, memoryview(bytearray(1))):
                raise TransferError("expected an answer behind a piece, found the connection closed")


class NixlIncoming(Incoming):
    """The receiving end: reads each piece out of the sender's arena."""

    def __init__(
        self, lane: socket.socket, name: str, device: torch.device, arrived: Callable[[int, int, Tensor], None],
        finish: Callable[[int, int], None], fail: Callable[..., None],
    ) -> None:  # fmt: skip
        super().__init__(lane, device, arrived, finish, fail)
        self._arena = Arena(name, device)
        self._address, self._index, self._peer = self._meet()
        self._start()

    def _meet(self) -> tuple[int, int, str]:
        """The sender's arena, and its name."""
        head = bytearray(HELLO.size)
        recv_exactly(self._lane, memoryview(head))
        address, index, size = HELLO.unpack(head)
        if not 0 < size <= MAX_METADATA_BYTES:
            raise TransferError(f"expected 1 to {MAX_METADATA_BYTES} bytes of NIXL metadata, found {size}")
        metadata = bytearray(size)
        recv_exactly(self._lane, memoryview(metadata))
        name = self._arena.agent.add_remote_agent(bytes(metadata))
        return address, index, name if isinstance(name, str) else name.decode()

    def _fill(self, message: Tensor, stream: torch.Stream) -> None:
        for piece in message.split(ARENA_BYTES):
            if not recv_exactly(self._lane, memoryview(bytearray(1))):
                raise TransferError(f"expected {len(message)} bytes of a layer, found the connection closed")
            self._read(len(piece))
            piece.copy_(self._arena.memory[: len(piece)], non_blocking=True)
            synchronize(stream)
            self._lane.sendall(READ)

    def _read(self, num_bytes: int) -> None:
        """Bring the first bytes of the sender's arena into ours."""
        arena = self._arena
        ours = arena.descriptors(arena.memory.data_ptr(), arena.index, num_bytes)
        theirs = arena.descriptors(self._address, self._index, num_bytes)
        transfer = arena.agent.initialize_xfer("READ", ours, theirs, self._peer)
        state = arena.agent.transfer(transfer)
        while state == "PROC":
            time.sleep(POLL_S)
            state = arena.agent.check_xfer_state(transfer)
        arena.agent.release_xfer_handle(transfer)
        if state != "DONE":
            raise TransferError(f"expected NIXL to read {num_bytes} bytes, found state {state}; see the worker's log")
