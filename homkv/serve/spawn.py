"""Start a prefill and a decode instance as processes of this machine, with fresh keys, and stop them cleanly."""

import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import msgspec

from homkv.errors import TransferError
from homkv.serve.client import Address
from homkv.transport.keys import KeyPair, Security

Report = Callable[[str, str], None]  # (role, line of text)
LOG_LINES = 20  # of an instance's log, quoted in errors
STOP_TIMEOUT_S = 10.0  # a child that has not stopped by then is killed
DEATH_TIMEOUT_S = 1.0  # between a connection's end and the end of the process behind it


class Starting(msgspec.Struct, frozen=True, tag="loading", tag_field="event"):
    """A line of an instance that is not ready."""

    text: str


class Ready(msgspec.Struct, frozen=True, tag="ready", tag_field="event"):
    """The line of an instance that listens."""

    endpoint: str
    model: str
    fingerprint: str


Role = Literal["prefill", "decode"]
_lines: "msgspec.json.Decoder[Starting | Ready]" = msgspec.json.Decoder(Starting | Ready)


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
    input closes, so none outlives this process, however it ends. A TransferError that leaves the block after a child
    died is raised again as one that says so, with the child's log.
    """

    def __init__(self, options: InstanceOptions, report: Report = lambda role, text: None) -> None:
        self._options, self._report = options, report
        self._keys = {name: KeyPair.generate() for name in ("client", "prefill", "decode")}
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self.processes: dict[Role, subprocess.Popen[str]] = {}
        self.addresses: dict[Role, Address] = {}

    @property
    def security(self) -> Security:
        """The client's keys."""
        return Security(self._keys["client"])

    @property
    def folder(self) -> Path:
        """Where keys and logs are, while the pair runs."""
        if self._folder is None:
            raise TransferError("expected a running pair, found none; use it in a with statement")
        return Path(self._folder.name)

    def __enter__(self) -> Self:
        self._folder = tempfile.TemporaryDirectory(prefix="homkv-")  # for this user only
        try:
            self._start("decode", ["client", "prefill"])
            self._start("prefill", ["client"])
            for role in self.processes:
                self._await_ready(role)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        deaths = self._deaths() if isinstance(error, TransferError) else ""
        self.close()
        if deaths:
            raise TransferError(f"expected both instances to live, found {deaths}") from error

    def _deaths(self) -> str:
        """Which children ended by themselves, with their logs; empty if none did."""
        said = []
        for role, process in self.processes.items():
            try:
                code = process.wait(DEATH_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                continue  # alive
            said.append(f"the {role} instance ended with code {code}; its log:\n{self.log(role)}")
        return "\n".join(said)

    def _start(self, role: Role, trusted: list[str]) -> None:
        key, trust = self.folder / f"{role}.key", self.folder / f"{role}.trust"
        self._keys[role].save(key)
        trust.write_text("\n".join(self._keys[name].public for name in trusted))
        options = self._options
        command = [sys.executable, "-m", "homkv.cli", "serve", role, "--until-eof", "--model", options.model]
        command += ["--keys", str(key), "--trust", str(trust)]
        if options.num_threads is not None:
            command += ["--num-threads", str(options.num_threads)]
        if role == "decode":
            command += ["--max-tokens", str(options.max_tokens)]
            command += [arg for name in options.formats for arg in ("--kv-cache-dtype", name)]
        elif options.link_gbps is not None:
            command += ["--link-gbps", str(options.link_gbps)]
        with open(self.folder / f"{role}.log", "w") as log:
            self.processes[role] = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )

    def _await_ready(self, role: Role) -> None:
        """Read the child's lines until it is ready. Raises TransferError with its log if it is not."""
        process = self.processes[role]
        assert process.stdout is not None  # opened as a pipe above
        watchdog = threading.Timer(self._options.start_timeout_s, process.kill)
        watchdog.start()
        try:
            while line := process.stdout.readline():
                said = self._parse(role, line)
                if isinstance(said, Ready):
                    self.addresses[role] = Address(said.endpoint, self._keys[role].public)
                    self._report(role, f"ready, process {process.pid}")
                    return
                self._report(role, said.text)
        finally:
            watchdog.cancel()
        raise TransferError(
            f"expected the {role} instance to start within {self._options.start_timeout_s} s, found it ended with code "
            f"{process.wait()}; its log:\n{self.log(role)}"
        )

    def _parse(self, role: Role, line: str) -> Starting | Ready:
        try:
            return _lines.decode(line)
        except msgspec.MsgspecError as error:
            raise TransferError(
                f"expected a line of the {role} instance about its start, found {line!r} ({error}); keep standard "
                "output free of other text"
            ) from error

    def log(self, role: Role) -> str:
        """The last lines that an instance logged."""
        return "\n".join((self.folder / f"{role}.log").read_text(errors="replace").splitlines()[-LOG_LINES:])

    def close(self) -> None:
        """Ask the children to stop, end those that do not, remove the keys."""
        for process in self.processes.values():
            if process.stdin is not None:
                process.stdin.close()
        for process in self.processes.values():
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stdout is not None:
                process.stdout.close()
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None
