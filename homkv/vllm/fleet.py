"""Run a list of commands as one system: all of them come up, or none stays; any that ends takes the others along."""

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx

from homkv.errors import TransferError
from homkv.vllm.launch import Command

Report = Callable[[str, str], None]  # (process, line of text)
LOG_LINES = 25
POLL_S = 0.5
TAKEN = "address already in use"  # in a server's log
STOP_TIMEOUT_S = 20.0  # vLLM ends its engine within seconds; what has not ended by then is killed


class Fleet:
    """Processes of this machine, each in a group of its own. Use as a context manager.

    ``logs``: folder for their output; None takes one that goes when the fleet has stopped in order.
    """

    def __init__(
        self, commands: list[Command], report: Report, logs: Path | None = None, timeout_s: float = 900
    ) -> None:
        self.commands, self._report, self._timeout_s = commands, report, timeout_s
        self._scratch = None if logs else tempfile.TemporaryDirectory(prefix="homkv-vllm-")
        self.logs = logs or Path(self._scratch.name if self._scratch else "")
        self._running: list[tuple[Command, subprocess.Popen[bytes]]] = []

    def __enter__(self) -> Self:
        """Start everything and wait until it answers. Raises TransferError with the log of what did not."""
        try:
            self.logs.mkdir(parents=True, exist_ok=True)
            for command in self.commands:
                self._start(command)
            self._await_ready()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def pid(self, name: str) -> int:
        """Process id of a command."""
        return next(process.pid for command, process in self._running if command.name == name)

    def kill(self, name: str) -> Command:
        """End one process and all of its children without warning, as a crash would. Returns its command."""
        at = next(i for i, (command, _) in enumerate(self._running) if command.name == name)
        command, process = self._running.pop(at)
        _signal_group(process, signal.SIGKILL)
        process.wait()
        return command

    def add(self, *commands: Command) -> None:
        """Start more processes and wait until everything answers."""
        for command in commands:
            self._start(command)
        self._await_ready()

    def _start(self, command: Command) -> None:
        with open(self.logs / f"{command.name}.log", "ab") as log:
            process = subprocess.Popen(
                command.argv,
                env={**os.environ, **dict(command.env)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._running.append((command, process))
        self._report(command.name, f"starting, process {process.pid}")

    def _await_ready(self) -> None:
        waiting, deadline = [command for command, _ in self._running], time.monotonic() + self._timeout_s
        while waiting:
            self.check()
            for command in [c for c in waiting if _answers(c.url)]:
                waiting.remove(command)
                self._report(command.name, f"ready at {command.url}")
            self._check_ports(waiting)
            if waiting and time.monotonic() > deadline:
                names = ", ".join(c.name for c in waiting)
                raise TransferError(
                    f"expected {names} to answer within {self._timeout_s:g} s, found nothing; its log:\n"
                    f"{self.log(waiting[0].name)}"
                )
            time.sleep(POLL_S)

    def _check_ports(self, waiting: list[Command]) -> None:
        """Raise TransferError if a server cannot have a port. vLLM's thread for NIXL's side channel ends then, and its
        engine waits for it without end."""
        for command in waiting:
            if TAKEN in self._written(command.name).lower():
                raise TransferError(
                    f"expected the ports of {command.name} to be free, found one taken; choose another --port, below "
                    f"those that the system hands out by itself (net.ipv4.ip_local_port_range). Its log:\n"
                    f"{self.log(command.name)}"
                )

    def check(self) -> None:
        """Raise TransferError, with its log, if a process has ended."""
        for command, process in self._running:
            code = process.poll()
            if code is not None:
                raise TransferError(
                    f"expected {command.name} to run, found that it ended with code {code}; the others are stopped. "
                    f"Its log:\n{self.log(command.name)}"
                )

    def wait(self) -> None:
        """Return never; raises as :meth:`check` does."""
        while True:
            self.check()
            time.sleep(POLL_S)

    def log(self, name: str) -> str:
        """The last lines that a process wrote."""
        return "\n".join(self._written(name).splitlines()[-LOG_LINES:])

    def _written(self, name: str) -> str:
        return (self.logs / f"{name}.log").read_text(errors="replace")

    def close(self) -> None:
        """Ask every process to stop, router first, and end the groups of those that do not."""
        for _, process in reversed(self._running):
            if process.poll() is None:
                process.terminate()
        deadline = time.monotonic() + STOP_TIMEOUT_S
        for command, process in reversed(self._running):
            try:
                process.wait(max(deadline - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                self._report(command.name, "does not stop, killing it")
            _signal_group(process, signal.SIGKILL)  # its engine processes, if it left any
            process.wait()
        self._running.clear()
        if self._scratch is not None:
            self._scratch.cleanup()
            self._scratch = None


def _signal_group(process: "subprocess.Popen[bytes]", number: signal.Signals) -> None:
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return  # the whole group has ended


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=2).is_success
    except httpx.TransportError:
        return False
