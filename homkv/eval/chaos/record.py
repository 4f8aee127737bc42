"""A run on disk: how it was started, a line per fault as soon as it was judged, and the totals."""

from collections.abc import Iterable
from pathlib import Path

import msgspec

from homkv.errors import UnsupportedError
from homkv.eval.chaos.service import Service
from homkv.eval.jsonl import read_jsonl
from homkv.testing.faults import Fault, Kind


class Outcome(msgspec.Struct, tag="fault", tag_field="record", omit_defaults=True):
    """What one fault did. States and errors are of the victim and of its neighbour."""

    number: int  # in the plan
    service: Service
    fault: Fault
    policy: str
    passed_by: bool = False  # its message did not come
    states: list[str] = []
    noticed: list[str] = []  # what the service counted
    broken: list[str] = []  # invariants
    errors: list[str] = []  # that the clients were told
    num_tokens: int = 0  # told under the fault, and compared
    num_wrong: int = 0  # answers
    leaked_blocks: int = 0
    free_s: float = 0.0  # from the last end until nothing was held
    recovery_s: float = 0.0  # from then until a clean request was answered
    clean_s: float = 0.0  # that request alone
    patience: float = 1.0  # see Subject: by which all limits of time were stretched

    @property
    def place(self) -> str:
        """What was done to which message."""
        return f"{self.fault.kind} at {self.fault.where}: {self.fault.message}"

    @property
    def was_detected(self) -> bool:
        """Whether the service noticed anything or a client was told of an error."""
        return bool(self.noticed or self.errors)


class Plan(msgspec.Struct, frozen=True):
    """What decides which faults are injected."""

    model: str
    seed: int
    faults: int
    kinds: list[Kind]  # empty: all
    services: list[Service]

    def continues(self, other: "Plan") -> bool:
        """Whether it begins with the faults of ``other``."""
        return msgspec.structs.replace(other, faults=self.faults) == self and other.faults <= self.faults


class Start(msgspec.Struct, tag="run", tag_field="record", frozen=True):
    """How a run was started; one that goes on has several."""

    plan: Plan
    command: str
    machine: str
    load_average: str
    unix_time: int


class Totals(msgspec.Struct, tag="totals", tag_field="record"):
    """Of all faults, or of one kind, or of those at one message."""

    name: str
    injected: int = 0
    passed_by: int = 0  # armed, but the message did not come
    detected: int = 0  # noticed by the service, or told to a client; the others changed nothing
    done: int = 0
    failed: int = 0
    cancelled: int = 0
    tokens: int = 0
    wrong: int = 0
    leaked_blocks: int = 0
    broken: int = 0  # faults under which any promise was broken
    longest_free_s: float = 0.0
    longest_recovery_s: float = 0.0

    @classmethod
    def of(cls, name: str, outcomes: Iterable[Outcome]) -> "Totals":
        """Add up."""
        totals = cls(name)
        for o in outcomes:
            totals.injected += not o.passed_by
            totals.passed_by += o.passed_by
            totals.detected += not o.passed_by and o.was_detected
            totals.done += o.states.count("done")
            totals.failed += o.states.count("failed")
            totals.cancelled += o.states.count("cancelled")
            totals.tokens += o.num_tokens
            totals.wrong += o.num_wrong
            totals.leaked_blocks += o.leaked_blocks
            totals.broken += bool(o.broken)
            totals.longest_free_s = max(totals.longest_free_s, o.free_s)
            totals.longest_recovery_s = max(totals.longest_recovery_s, o.recovery_s)
        return totals


Line = Outcome | Start | Totals
_decoder: msgspec.json.Decoder[Line] = msgspec.json.Decoder(Line)


def read_lines(path: Path) -> list[Line]:
    """Read a record; nothing if there is none. See read_jsonl for its last line and for FormatError."""
    return read_jsonl(path, _decoder, "a record of homkv chaos", "name another file")


def read_outcomes(path: Path, plan: Plan) -> list[Outcome]:
    """What a run of the same plan, or of its beginning, has done. Raises UnsupportedError for a record of another."""
    lines = read_lines(path)
    other = next((line.plan for line in lines if isinstance(line, Start) and not plan.continues(line.plan)), None)
    if other is not None:
        raise UnsupportedError(f"expected a record of {plan} in {path}, found {other}; name another file with --json")
    return list({line.number: line for line in lines if isinstance(line, Outcome)}.values())
