"""A worker process: reads orders from standard input, writes answers to standard output, one JSON object per line."""

import functools
import os
import queue
import sys
import threading
from abc import ABC, abstractmethod
from typing import Any

import msgspec
import torch

from homkv.bench.generate import MODELS, random_model
from homkv.bench.pd.messages import Failed, Start, ToWorker
from homkv.errors import HomkvError, TransferError
from homkv.generate.fuse import fused_norms
from homkv.generate.loop import attention_of

_decoder = msgspec.json.Decoder(ToWorker)
SEED = 0  # of the weights: every worker has the same
SWITCH_S = 2e-4  # threads that move bytes take the interpreter from the one that launches kernels within this time


@functools.cache
def answers() -> int:
    """Where answers go: what standard output was. Libraries that print there reach standard error from now on."""
    kept = os.dup(1)
    os.dup2(2, 1)
    return kept


class Worker(ABC):
    """What prefill and decode workers share: the model, and a mailbox that threads put events in."""

    def __init__(self, start: Start) -> None:
        self.start, self.device = start, torch.device(start.device)
        self.shape = MODELS[start.model]
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        torch.set_num_threads(start.threads)
        torch.manual_seed(SEED)
        self.model = random_model(self.shape, self.device)
        if self.device.type == "cpu":
            self.model.float()  # 16-bit matrix products are slow there; KV has 16 bits all the same
        self.mailbox: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def fail(self, error: BaseException) -> None:
        """Called by a thread that cannot go on."""
        self.mailbox.put(error)

    def say(self, message: Any) -> None:
        """Answer the coordinator. Threads may call it: a line is one write."""
        os.write(answers(), msgspec.json.encode(message) + b"\n")

    def serve(self) -> None:
        """Handle orders and events until the input ends."""
        while True:
            for event in self.events():
                if event is None:
                    return
                if isinstance(event, BaseException):
                    raise event
                self.handle(event)
            self.turn()

    def events(self) -> list[Any]:
        """What has come; waits for something while there is nothing to do."""
        out = [] if self.is_busy else [self.mailbox.get()]
        while not self.mailbox.empty():
            out.append(self.mailbox.get())
        return out

    @property
    def is_busy(self) -> bool:
        """Whether :meth:`turn` has work."""
        return False

    @abstractmethod
    def handle(self, event: Any) -> None:
        """Take an order or an event in."""

    @abstractmethod
    def turn(self) -> None:
        """Do a bounded piece of work."""

    def reset_peak(self) -> None:
        """Count the device's peak memory from now on."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_bytes(self) -> int:
        """The device's peak memory; 0 on a CPU."""
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0


def lane_of(start: Start, kind: str) -> int:
    """Which connection of a pair a link between devices talks on, behind those that carry bytes."""
    return start.lanes + (kind == "nixl" and start.store_port is not None)


def num_lanes(start: Start) -> int:
    """Connections per pair."""
    return start.lanes + (start.store_port is not None) + start.use_nixl


def listen(worker: Worker) -> None:
    """Put orders in the mailbox; None at the input's end."""
    try:
        for line in sys.stdin.buffer:
            worker.mailbox.put(_decoder.decode(line))
        worker.mailbox.put(None)
    except msgspec.MsgspecError as error:
        worker.fail(error)


def make_worker(start: Start) -> Worker:
    """The worker of a role."""
    if start.role == "prefill":
        from homkv.bench.pd.prefill import PrefillWorker

        return PrefillWorker(start)
    from homkv.bench.pd.decode import DecodeWorker

    return DecodeWorker(start)


def main() -> int:
    """Run a worker whose first line of input is Start. Exit code 2 behind an error that was reported."""
    answers()
    sys.setswitchinterval(SWITCH_S)
    start = _decoder.decode(sys.stdin.buffer.readline())
    if not isinstance(start, Start):
        raise TransferError(f"expected Start as the first line, found {start}; `homkv bench pd` starts workers")
    try:
        worker = make_worker(start)
        threading.Thread(target=listen, args=(worker,), daemon=True).start()
        with attention_of(worker.model), fused_norms(worker.model), torch.no_grad():
            worker.serve()
    except (HomkvError, RuntimeError, OSError, ValueError) as error:
        os.write(answers(), msgspec.json.encode(Failed(f"{type(error).__name__}: {error}"[:2000])) + b"\n")
        raise
    return 0


if __name__ == "__main__":
    # As everyone else imports it, so that there is one module and one place for answers.
    from homkv.bench.pd.worker import main as run_worker

    # Threads that wait on sockets would keep the interpreter; there is nothing left to clean up.
    code = run_worker()
    sys.stdout.flush()
    os._exit(code)
