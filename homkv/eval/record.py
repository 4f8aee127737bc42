"""Results on disk: one JSON line per case, written as soon as it is measured; a run goes on where it stopped."""

import math
from collections.abc import Iterable
from pathlib import Path

import msgspec

from homkv.errors import FormatError
from homkv.eval.jsonl import read_jsonl

CALIBRATION = "calibrate"  # the task of cases that choose and verify plans: no report counts them
EXACT, MODEL_BF16 = "exact", "model-bf16"  # rows that are no formats: the model itself, and all of it in bfloat16


class Case(msgspec.Struct, tag="case", tag_field="kind", frozen=True, omit_defaults=True):
    """One format on one item. ``top1 hit``: one character per token, 0 or 1; see homkv.eval.metrics."""

    key: str  # digest of everything that decides the result
    model: str
    format: str
    task: str
    item: str
    prefill: str
    prefix: int
    kl: list[float] = []
    nll: list[float] = []
    top1: str = ""
    hit: str = ""
    head_error: list[list[float]] = []
    text: str | None = None  # what was written
    similarity: float | None = None  # to what the exact model wrote
    passed: bool | None = None
    seconds: float = 0.0
    error: str | None = None  # why there are no scores: the format cannot hold this model's numbers


class Size(msgspec.Struct, tag="size", tag_field="kind", frozen=True):
    """Bits per element of a format, everything counted: stored by decode, and sent."""

    key: str
    model: str
    format: str
    context: int
    stored: float
    sent: float
    stored_32k: float | None  # 32,768 tokens of head_dim 128; None for a format bound to another head_dim


class Speed(msgspec.Struct, tag="speed", tag_field="kind", frozen=True):
    """Attention of one new token, time per layer. ``ratios``: the 16-bit step's time through this one's, in pairs."""

    key: str
    model: str
    format: str
    impl: str
    context: int
    heads: str
    microseconds: float
    ratios: list[float]
    peer: str
    machine: str
    layers: int = 1  # that were computed in turn, each with its own KV


class Run(msgspec.Struct, tag="run", tag_field="kind", frozen=True):
    """How a run was started; every run appends one. ``sliding_windows``: LoadedModel's."""

    model: str
    fingerprint: str
    command: str
    machine: str
    dtype: str
    device: str
    versions: str
    unix_time: int
    sliding_windows: tuple[int | None, ...] = ()


Record = Case | Size | Speed | Run
_decoder: msgspec.json.Decoder[Record] = msgspec.json.Decoder(Record)


def read_records(path: Path) -> list[Record]:
    """Read a file of results; none if it does not exist. See read_jsonl for its last line and for FormatError."""
    return read_jsonl(path, _decoder, "results of homkv eval", "name another --out folder")


def newest(records: Iterable[Record]) -> dict[str, Record]:
    """Results by key; of several with one key the last. Cases that failed are left out: they are tried again."""
    by_key = {record.key: record for record in records if not isinstance(record, Run)}
    return {key: record for key, record in by_key.items() if not (isinstance(record, Case) and record.error)}


def rounded(values: Iterable[float]) -> list[float]:
    """Five significant digits: what a result keeps of each number. Raises FormatError for NaN and infinity."""
    kept = [float(f"{x:.5g}") for x in values]
    if not all(map(math.isfinite, kept)):
        raise FormatError("expected finite scores, found NaN or infinity; the format destroyed the model's numbers")
    return kept
