"""A gate: thresholds that formats must keep on a model. A JSON file says what to measure and what to ask for."""

from collections.abc import Sequence
from pathlib import Path

import msgspec

from homkv.errors import FormatError
from homkv.eval.summary import Summary


class Threshold(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one format must keep. What is None is not asked for."""

    kl_at_most: float | None = None
    top1_at_least: float | None = None
    passkeys_at_least: int | None = None
    copies_at_least: int | None = None


class Gate(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``model`` and amounts as ``homkv eval`` takes them; ``formats``: name to threshold."""

    model: str
    formats: dict[str, Threshold]
    texts: int = 1
    prefix: int = 448
    scored: int = 64
    passkeys: int = 0
    copies: int = 0

    @property
    def tasks(self) -> tuple[str, ...]:
        """What has to be measured."""
        return tuple(t for t, on in (("text", self.texts), ("passkey", self.passkeys), ("copy", self.copies)) if on)


class Check(msgspec.Struct, frozen=True):
    """One threshold and what was found."""

    format: str
    what: str
    wanted: float
    found: float
    kept: bool


def load_gate(path: Path) -> Gate:
    """Read a gate file. Raises FormatError, with the place in the file, for anything else."""
    try:
        gate = msgspec.json.decode(path.read_bytes(), type=Gate)
    except (OSError, msgspec.MsgspecError) as error:
        raise FormatError(f"expected a gate file, found {path}: {error}; see benchmarks/gates") from error
    if not gate.formats or not gate.tasks:
        raise FormatError(f"expected at least one format and one task in {path}, found none; a gate must ask something")
    return gate


def check(gate: Gate, summaries: Sequence[Summary]) -> list[Check]:
    """Every threshold against the summaries. Raises FormatError if a format was not measured."""
    found = {summary.format: summary for summary in summaries}
    if missing := gate.formats.keys() - found.keys():
        raise FormatError(f"expected results of {', '.join(sorted(missing))}, found none")
    checks = []
    for name, wanted in gate.formats.items():
        row = found[name]
        kl, top1 = (float("nan") if e is None else e.mean for e in (row.kl, row.top1))
        upper = [("KL", wanted.kl_at_most, kl)]
        lower = [
            ("top-1", wanted.top1_at_least, top1),
            ("pass-keys", wanted.passkeys_at_least, float(row.passkey.found)),
            ("copies", wanted.copies_at_least, float(row.copy.found)),
        ]
        checks += [Check(name, what, limit, value, value <= limit) for what, limit, value in upper if limit is not None]
        checks += [Check(name, what, limit, value, value >= limit) for what, limit, value in lower if limit is not None]
    return checks
