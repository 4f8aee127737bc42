"""The workers as processes: started together, stopped together, their answers in one queue."""

import os
import queue
import secrets
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import msgspec
import torch.distributed as dist

from homkv.bench.pd.messages import Connect, Connected, Failed, FromWorker, Hello, Join, Joined, Role, Start
from homkv.errors import TransferError

LOG_LINES = 15
STOP_TIMEOUT_S = 5.0
_decoder = msgspec.json.Decoder(FromWorker)


class CellError(TransferError):
    """A cell that did not come to its end: a worker failed or died, or time is up. The workers must be started anew."""


@dataclass(frozen=True)
class PoolOptions:
    """How workers are started. ``devices``: of prefill workers, then of decode workers."""

    prefill: tuple[str, ...]
    decode: tuple[str, ...]
    model: str
    lanes: int = 4
    chunk_bytes: int = 1 << 20
    max_unsent_bytes: int = 6 << 30
    threads: int = 1
    use_direct: bool = False
    use_nixl: bool = False


def make_store(world: int) -> Any:
    """Where the workers of torch.distributed meet; lives in this process, on a free port."""
    return dist.TCPStore("127.0.0.1", 0, world, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]


class Pool:
    """Running workers. Use as a context manager; a child ends when its standard input closes."""

    def __init__(self, options: PoolOptions, deadline_s: float) -> None:
        self.options, self.events = options, queue.SimpleQueue[tuple[int, Any]]()
        self.num_prefill, self.num_decode = len(options.prefill), len(options.decode)
        self.devices: dict[int, str] = {}
        self.num_params = 0
        self._folder = tempfile.TemporaryDirectory(prefix="homkv-pd-")
        self._processes: list[subprocess.Popen[bytes]] = []
        self._joined: set[str] = set()
        world = self.num_prefill + self.num_decode
        self._store = make_store(world) if options.use_direct else None
        try:
            self._start(deadline_s)
        except BaseException:
            self.close()
            raise

    @property
    def prefill_ranks(self) -> range:
        """Workers that compute prompts."""
        return range(self.num_prefill)

    @property
    def decode_ranks(self) -> range:
        """Workers that decode."""
        return range(self.num_prefill, self.num_prefill + self.num_decode)

    def apart(self) -> list[list[int]]:
        """All workers, in groups that share no device."""
        devices = (*self.options.prefill, *self.options.decode)
        everyone = list(range(len(devices)))
        if len(set(devices)) == len(devices) and devices[0] != "cpu":
            return [everyone]
        return [[rank] for rank in everyone]

    def _start(self, deadline_s: float) -> None:
        options, token = self.options, secrets.token_hex(16)
        port = None if self._store is None else self._store.port
        for rank, device in enumerate((*options.prefill, *options.decode)):
            role: Role = "prefill" if rank < self.num_prefill else "decode"
            self._spawn(rank)
            self.send(
                [rank],
                Start(
                    role=role,
                    rank=rank,
                    num_prefill=self.num_prefill,
                    num_decode=self.num_decode,
                    device=device,
                    model=options.model,
                    token=token,
                    lanes=options.lanes,
                    chunk_bytes=options.chunk_bytes,
                    max_unsent_bytes=options.max_unsent_bytes,
                    store_port=port,
                    threads=options.threads,
                    use_nixl=options.use_nixl,
                ),
            )
        hellos = self.gather(Hello, range(len(self._processes)), deadline_s)
        ports = [hellos[rank].port for rank in self.decode_ranks]
        self.send(range(len(self._processes)), Connect(ports))
        connected = self.gather(Connected, range(len(self._processes)), deadline_s)
        self.devices = {rank: said.device for rank, said in connected.items()}
        self.num_params = connected[0].num_params

    def join(self, kind: str, deadline_s: float) -> None:
        """Open a link between devices when first needed, so that it cannot fail cells of others. Raises CellError."""
        if kind in self._joined:
            return
        everyone = range(len(self._processes))
        self.send(everyone, Join(kind))
        self.gather(Joined, everyone, deadline_s)
        self._joined.add(kind)

    def _spawn(self, rank: int) -> None:
        # Multicast over NVLink reaches past the machine's own devices; point to point needs none of it.
        environment = os.environ | {"NCCL_NVLS_ENABLE": "0"}
        with open(self._log(rank), "w", encoding="utf-8") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "homkv.bench.pd.worker"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=environment,
            )  # fmt: skip
        self._processes.append(process)
        threading.Thread(target=self._listen, args=(rank, process), daemon=True).start()

    def _listen(self, rank: int, process: "subprocess.Popen[bytes]") -> None:
        """Queue what a child says, and its end."""
        assert process.stdout is not None
        for line in process.stdout:
            try:
                self.events.put((rank, _decoder.decode(line)))
            except msgspec.MsgspecError as error:
                self.events.put((rank, Failed(f"expected a line of a worker, found {line[:200]!r}: {error}")))
        self.events.put((rank, Failed(f"ended with code {process.wait()}; its log:\n{self.log(rank)}")))

    def _log(self, rank: int) -> Path:
        return Path(self._folder.name) / f"worker{rank}.log"

    def log(self, rank: int) -> str:
        """The last lines that a worker wrote to standard error; nothing once the pool is closed."""
        try:
            text = self._log(rank).read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return ""
        return "\n".join(text.splitlines()[-LOG_LINES:])

    def send(self, ranks: Sequence[int], message: Any) -> None:
        """Give an order to workers. Raises CellError if one is gone."""
        for rank in ranks:
            pipe = self._processes[rank].stdin
            assert pipe is not None
            try:
                pipe.write(msgspec.json.encode(message) + b"\n")
                pipe.flush()
            except OSError as error:
                raise CellError(f"expected worker {rank} to live, found it gone; its log:\n{self.log(rank)}") from error

    def receive(self, deadline_s: float) -> tuple[int, Any] | None:
        """The next answer and who gave it; None at the deadline. Raises CellError for a worker that failed."""
        try:
            rank, message = self.events.get(timeout=max(deadline_s - time.monotonic(), 0.0))
        except queue.Empty:
            return None
        if isinstance(message, Failed):
            raise CellError(f"expected worker {rank} to go on, found: {message.error}\n{self.log(rank)}")
        return rank, message

    def gather(self, kind: type[Any], ranks: Sequence[int], deadline_s: float) -> dict[int, Any]:
        """One answer of a kind from each of some workers. Raises CellError."""
        out: dict[int, Any] = {}
        while len(out) < len(ranks):
            event = self.receive(deadline_s)
            if event is None:
                missing = sorted(set(ranks) - set(out))
                raise CellError(f"expected {kind.__name__} of workers {missing} in time, found none; allow more time")
            if isinstance(event[1], kind):
                out[event[0]] = event[1]
        return out

    def close(self) -> None:
        """Close the children's input; end those that do not stop."""
        for process in self._processes:
            if process.stdin is not None:
                try:
                    process.stdin.close()
                except OSError:
                    continue  # it is gone already
        for process in self._processes:
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._folder.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
