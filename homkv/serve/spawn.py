"""Start prefill and decode instances as processes of this machine, with fresh keys, and stop them cleanly."""

import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from homkv.errors import TransferError
from homkv.serve.fleet import Address, Role
from homkv.transport.keys import KeyPair, Security

Report = Callable[[str, str], None]  # (instance, line of text)
LOG_LINES = 20  # of an instance's log, quoted in errors
STOP_TIMEOUT_S = 30.0  # a child that has not stopped by then is killed; it takes none but on a busy machine
COMMAND = "homkv.cli"  # the module that children run
# Every transfer has threads of its own. With an arena for each, glibc keeps what they freed, and memory creeps up.
FEW_ARENAS = {"MALLOC_ARENA_MAX": "2"}
DEATH_TIMEOUT_S = 1.0  # between a connection's end and the end of the process behind it


class Starting(msgspec.Struct, frozen=True, tag="loading", tag_field="event"):
    """A line of an instance that is not ready."""

    text: str


class Ready(msgspec.Struct, frozen=True, tag="ready", tag_field="event"):
    """The line of an instance that listens."""

    endpoint: str
    model: str
    fingerprint: str


_lines: "msgspec.json.Decoder[Starting | Ready]" = msgspec.json.Decoder(Starting | Ready)


@dataclass(frozen=True)
class InstanceOptions:
    """What the instances are started with; see ServeSettings."""

    model: str
    formats: tuple[str, ...]
    num_prefill: int = 1
    num_decode: int = 1
    link_gbps: float | None = None
    num_threads: int | None = None
    max_tokens: int = 32_768
    start_timeout_s: float = 600.0
    log_json: bool = False
    show_logs: bool = False  # on our standard error; else they are kept for errors
    # more settings of the roles, by the names of ServeSettings
    prefill: dict[str, object] = field(default_factory=dict)
    decode: dict[str, object] = field(default_factory=dict)
    # by role: arguments of the interpreter in place of -m COMMAND, for tests
    entry: dict[Role, list[str]] = field(default_factory=dict)

    def flags(self, role: Role) -> dict[str, object]:
        """Settings of an instance, by name."""
        common = {"model": self.model, "num_threads": self.num_threads, "log_json": self.log_json or None}
        if role == "prefill":
            return common | {"link_gbps": self.link_gbps} | self.prefill
        formats = msgspec.json.encode(self.formats).decode()  # JSON: a format's name may have commas
        return common | {"max_tokens": self.max_tokens, "kv_cache_dtype": formats} | self.decode


ROLES: tuple[Role, Role] = ("decode", "prefill")  # in the order in which they start


class LocalCluster:
    """Prefill and decode instances as child processes: ``prefill-0``, ``decode-0`` … Use as a context manager.

    Keys are made for this cluster, live in a private folder and go when it closes. A child stops when its standard
    input closes, so none outlives this process, however it ends. A TransferError that leaves the block after a child
    died is raised again as one that says so, with the child's log.
    """

    def __init__(self, options: InstanceOptions, report: Report = lambda name, text: None) -> None:
        self._options, self._report = options, report
        self._names: dict[Role, list[str]] = {
            "decode": [f"decode-{i}" for i in range(options.num_decode)],
            "prefill": [f"prefill-{i}" for i in range(options.num_prefill)],
        }
        names = [name for group in self._names.values() for name in group]
        self._keys = {name: KeyPair.generate() for name in ("client", *names)}
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self.processes: dict[str, subprocess.Popen[str]] = {}
        self._endpoints: dict[str, str] = {}
        self._lock = threading.Lock()  # between close() and revive()
        self._is_closed = False

    @property
    def security(self) -> Security:
        """The client's keys."""
        return Security(self._keys["client"])

    def addresses(self, role: Role) -> list[Address]:
        """Where the instances of a role listen."""
        return [Address(self._endpoints[name], self._keys[name].public) for name in self._names[role]]

    @property
    def folder(self) -> Path:
        """Where keys and logs are, while the cluster runs."""
        if self._folder is None:
            raise TransferError("expected a running cluster, found none; use it in a with statement")
        return Path(self._folder.name)

    def __enter__(self) -> Self:
        self._is_closed = False
        self._folder = tempfile.TemporaryDirectory(prefix="homkv-")  # for this user only
        try:
            for role in ROLES:
                trusted = ["client", *(self._names["prefill"] if role == "decode" else [])]
                for name in self._names[role]:
                    self._keys[name].save(self.folder / f"{name}.key")
                    trust = "\n".join(self._keys[other].public for other in trusted)
                    (self.folder / f"{name}.trust").write_text(trust)
                    self._start(name)
            for name in self.processes:
                self._await_ready(name)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        deaths = self._deaths() if isinstance(error, TransferError) else ""
        self.close()
        if deaths:
            raise TransferError(f"expected all instances to live, found {deaths}") from error

    def _deaths(self) -> str:
        """Which children ended by themselves, with their logs; empty if none did."""
        said = []
        for name, process in self.processes.items():
            try:
                code = process.wait(DEATH_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                continue  # alive
            said.append(f"the {name} instance ended with code {code}; {self.log(name)}")
        return "\n".join(said)

    def revive(self, name: str) -> None:
        """Start a child that has ended again, at its old address with its old keys. Raises TransferError."""
        code = self.processes[name].wait()
        self._report(name, f"ended with code {code}, starts again")
        with self._lock:
            if self._is_closed:
                return
            self._start(name, endpoint=self._endpoints[name])
        self._await_ready(name)

    def _start(self, name: str, **more: object) -> None:
        role: Role = "decode" if name in self._names["decode"] else "prefill"
        files = {"keys": self.folder / f"{name}.key", "trust": self.folder / f"{name}.trust"}
        command = [sys.executable, *self._options.entry.get(role, ["-m", COMMAND]), "serve", role, "--until-eof"]
        for setting, value in (self._options.flags(role) | files | more).items():
            if value is not None:
                flag = setting.replace("_", "-")
                command += [f"--no-{flag}" if value is False else f"--{flag}"]
                command += [] if isinstance(value, bool) else [str(value)]
        with open(self.folder / f"{name}.log", "w") as log:
            self.processes[name] = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=None if self._options.show_logs else log,
                env=FEW_ARENAS | os.environ,
                text=True,
                process_group=0,  # Ctrl-C is for the parent, which lets the children finish first
            )

    def _await_ready(self, name: str) -> None:
        """Read the child's lines until it is ready. Raises TransferError with its log if it is not."""
        process = self.processes[name]
        assert process.stdout is not None  # opened as a pipe above
        watchdog = threading.Timer(self._options.start_timeout_s, process.kill)
        watchdog.start()
        try:
            while line := process.stdout.readline():
                said = self._parse(name, line)
                if isinstance(said, Ready):
                    self._endpoints[name] = said.endpoint
                    self._report(name, f"ready, process {process.pid}")
                    return
                self._report(name, said.text)
        finally:
            watchdog.cancel()
        raise TransferError(
            f"expected the {name} instance to start within {self._options.start_timeout_s} s, found it ended with code "
            f"{process.wait()}; {self.log(name)}"
        )

    def _parse(self, name: str, line: str) -> Starting | Ready:
        try:
            return _lines.decode(line)
        except msgspec.MsgspecError as error:
            raise TransferError(
                f"expected a line of the {name} instance about its start, found {line!r} ({error}); keep standard "
                "output free of other text"
            ) from error

    def log(self, name: str) -> str:
        """The last lines that an instance logged, or where they are."""
        if self._options.show_logs:
            return "what it said stands above"
        return "its log:\n" + "\n".join(
            (self.folder / f"{name}.log").read_text(errors="replace").splitlines()[-LOG_LINES:]
        )

    def close(self) -> None:
        """Ask the children to stop, end those that do not, remove the keys."""
        with self._lock:
            self._is_closed = True
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
