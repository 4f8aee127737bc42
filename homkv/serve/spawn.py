"""Start a prefill and a decode instance as processes of this machine, with fresh keys, and stop them cleanly."""

import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from homkv.errors import TransferError
from homkv.serve.client import Address
from homkv.transport.keys import KeyPair, Security

Report = Callable[[str, str], None]  # (role, line of text)


@dataclass(frozen=True)
class InstanceOptions:
    """What both instances are started with."""

    model: str
    formats: tuple[str, ...]
    link_gbps: float | None = None
    num_threads: int | None = None
    max_tokens: int = 32_768
    start_timeout_s: float = 600.0


class LocalPair:
    """One prefill and one decode instance as child processes. Use as a context manager.

    Keys are made for this pair, live in a private folder and go when it closes. A child stops when its standard
    input closes, so none outlives this process, however it ends.
    """

    def __init__(self, options: InstanceOptions, report: Report = lambda role, text: None) -> None:
        self._options, self._report = options, report
        self._folder = tempfile.TemporaryDirectory(prefix="homkv-")
        self._keys = {role: KeyPair.generate() for role in ("client", "prefill", "decode")}
        self.processes: dict[str, subprocess.Popen[str]] = {}
        self.addresses: dict[str, Address] = {}

    @property
    def security(self) -> Security:
        """The client's keys."""
        return Security(self._keys["client"])

    def __enter__(self) -> Self:
        try:
            self._start("decode", ["client", "prefill"])
            self._start("prefill", ["client"])
            for role in self.processes:
                self._await_ready(role)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self, role: str, trusted: list[str]) -> None:
        folder = Path(self._folder.name)
        self._keys[role].save(folder / f"{role}.key")
        (folder / f"{role}.trust").write_text("\n".join(self._keys[name].public for name in trusted))
        command = [sys.executable, "-m", "homkv.cli", "serve", role, "--until-eof"]
        command += ["--model", self._options.model, "--keys", str(folder / f"{role}.key")]
        command += ["--trust", str(folder / f"{role}.trust")]
        if self._options.num_threads is not None:
            command += ["--num-threads", str(self._options.num_threads)]
        if role == "decode":
            command += ["--max-tokens", str(self._options.max_tokens)]
            command += [arg for name in self._options.formats for arg in ("--kv-cache-dtype", name)]
        elif self._options.link_gbps is not None:
            command += ["--link-gbps", str(self._options.link_gbps)]
        with open(folder / f"{role}.log", "w") as log:
            self.processes[role] = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )

    def _await_ready(self, role: str) -> None:
        """Read the child's lines until it is ready. Raises TransferError with its log if it is not."""
        process = self.processes[role]
        watchdog = threading.Timer(self._options.start_timeout_s, process.kill)
        watchdog.start()
        try:
            while line := self._readline(process):
                event: dict[str, Any] = json.loads(line)
                if event["event"] == "ready":
                    self.addresses[role] = Address(event["endpoint"], self._keys[role].public)
                    self._report(role, f"ready, process {process.pid}")
                    return
                self._report(role, event["text"])
        finally:
            watchdog.cancel()
        raise TransferError(
            f"expected the {role} instance to start within {self._options.start_timeout_s} s, found it ended with code "
            f"{process.wait()}:\n{self.log(role)}"
        )

    @staticmethod
    def _readline(process: "subprocess.Popen[str]") -> str:
        assert process.stdout is not None  # opened as a pipe above
        return process.stdout.readline()

    def log(self, role: str) -> str:
        """The last lines that an instance logged."""
        return "\n".join((Path(self._folder.name) / f"{role}.log").read_text().splitlines()[-20:])

    def close(self) -> None:
        """Ask the children to stop, end those that do not, remove the keys."""
        for process in self.processes.values():
            if process.stdin is not None:
                process.stdin.close()
        for process in self.processes.values():
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stdout is not None:
                process.stdout.close()
        self._folder.cleanup()
