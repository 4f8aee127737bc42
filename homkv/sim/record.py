"""What a run says about its requests, real or simulated: one JSON object per line, four kinds.

``run`` describes one configuration (a format, a link, instances); ``step`` is a microbenchmark of the same machine,
taken outside the run; ``request`` is one request. ``run_id`` ties them together: one file may hold several runs.
``left-out`` names a configuration that was asked for and did not come to its end.

The seven phases of a request lie on its critical path, one after the other, and sum to its job completion time:

    arrival | queue | prefill | pack | transfer | unpack | wait | decode | last token
                                                              ^ first token

Work hidden behind another phase (packing and sending layers while the next ones compute) belongs to the phase it hides
behind. The decode instance gives out the first token, which prefill computed, when it admits the request.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from homkv.errors import TraceError
from homkv.sim.trace import read_text

Seconds = Annotated[float, msgspec.Meta(ge=0)]
NumBytes = Annotated[int, msgspec.Meta(ge=0)]
Count = Annotated[int, msgspec.Meta(ge=0)]
Stage = Literal["prefill", "pack", "unpack", "decode", "handoff", "seal"]
PHASES = ("queue_s", "prefill_s", "pack_s", "transfer_s", "unpack_s", "wait_s", "decode_s")


class RunInfo(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="run", kw_only=True):
    """One configuration. ``options`` holds whatever else reproduces it, as text."""

    run_id: str
    source: Literal["replay", "sim"]
    model: str
    kv_cache_dtype: str
    command: str
    machine: str
    seed: int = 0
    num_prefill: Count = 1
    num_decode: Count = 1
    link_gbps: float | None = None  # None: not shaped
    link_latency_s: Seconds = 0.0
    overlap: bool = True  # layers travel while the next ones compute
    background_pack: bool = False  # packing runs beside prefill's computing (another core), not between its layers
    num_layers: Count = 1
    max_batch: Count | None = None  # sequences that decode together; None: as many as fit
    kv_capacity_bytes: NumBytes | None = None  # of each decode instance; None: not limited
    reserves_early: bool = False  # room at decode is taken before prefill starts, not when KV arrives
    peak_kv_bytes: NumBytes | None = None  # largest of any decode instance
    peak_memory_bytes: NumBytes | None = None
    unix_time: int = 0
    options: dict[str, str] = {}


class StepSample(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="step", kw_only=True):
    """One measured step. ``tokens``: of the prompt for prefill, pack, unpack; of each sequence's context for decode.

    ``decode``: one step of ``batch`` sequences. ``pack``: all layers of one prompt, not overlapped. ``unpack``: verify,
    or decode an entropy-coded wire, once per request. ``handoff``: what a request takes besides, with all else idle.
    ``seal``: turn a window's ``tokens`` of one sequence into pages, in all layers, between two decode steps.
    ``beside``: not at rest, but while the other stage worked: a decode step during a prompt, a prompt during decoding.
    """

    run_id: str
    stage: Stage
    batch: Count
    tokens: Count
    seconds: Seconds
    beside: bool = False


class RequestRecord(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="request", kw_only=True
):
    """One finished request; module docstring for the phases."""

    run_id: str
    request_id: str
    arrival_s: Seconds
    prompt_tokens: Count
    output_tokens: Count
    queue_s: Seconds
    prefill_s: Seconds
    pack_s: Seconds
    transfer_s: Seconds
    unpack_s: Seconds
    wait_s: Seconds
    decode_s: Seconds
    ttft_s: Seconds
    tpot_s: Seconds  # mean behind the first token; 0 if there is none
    jct_s: Seconds
    wire_bytes: NumBytes
    kv_bytes: NumBytes  # held at decode at the end
    dequantize_s: Seconds | None = None  # share of decode_s for dequantizing or correcting; None: not told apart
    prefill_id: int = 0  # which instance
    decode_id: int = 0


class LeftOut(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="left-out", kw_only=True):
    """A configuration that failed, or that there was no time for. A later line may hold another attempt at it."""

    run_id: str
    reason: str
    unix_time: int = 0


Line = RunInfo | StepSample | RequestRecord | LeftOut
_DECODER = msgspec.json.Decoder(Line)


class Run(msgspec.Struct, frozen=True):
    """Everything a record says about one ``run_id``."""

    info: RunInfo
    requests: tuple[RequestRecord, ...]
    steps: tuple[StepSample, ...] = ()


def write_record(path: Path, lines: Iterable[Line], *, append: bool = False) -> None:
    """Write lines as JSONL. Numbers that are not finite are refused: JSON has none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab" if append else "wb") as file:
        for line in lines:
            check_finite(line, str(path))
            file.write(msgspec.json.encode(line) + b"\n")


def read_lines(path: Path) -> Iterator[tuple[int, Line]]:
    """Lines of a record with their numbers, gzip or not. Raises TraceError with the line and the reason."""
    for number, text in enumerate(read_text(path).splitlines(), 1):
        if not text.strip():
            continue
        try:
            yield number, _DECODER.decode(text)
        except (msgspec.DecodeError, RecursionError) as error:
            raise TraceError(
                f"{path}, line {number}: expected a run, step, request or left-out, found {text[:60]!r}: {error}"
            ) from error


def read_left_out(path: Path) -> list[LeftOut]:
    """What a record says it lacks. Raises TraceError as read_record."""
    return [line for _, line in read_lines(path) if isinstance(line, LeftOut)]


def read_record(path: Path) -> dict[str, Run]:
    """Runs of a record by id, in the file's order, gzip or not.

    Raises TraceError with the line and the reason: not JSON, an unknown or missing field, a value out of range, two
    runs or two requests of one id, requests of a run that is not described. No runs if all were left out.
    """
    infos: dict[str, RunInfo] = {}
    requests: dict[str, dict[str, RequestRecord]] = {}
    steps: dict[str, list[StepSample]] = {}
    is_empty = True
    for number, line in read_lines(path):
        is_empty = False
        if isinstance(line, LeftOut):
            continue
        if isinstance(line, StepSample):
            steps.setdefault(line.run_id, []).append(line)
            continue
        known: Mapping[str, object] = infos if isinstance(line, RunInfo) else requests.setdefault(line.run_id, {})
        key = line.run_id if isinstance(line, RunInfo) else line.request_id
        if key in known:
            raise TraceError(f"{path}, line {number}: expected every id once, found {key!r} again")
        if isinstance(line, RunInfo):
            infos[key] = line
        else:
            requests[line.run_id][key] = line
    for run_id in [*requests, *steps]:
        if run_id not in infos:
            raise TraceError(f"{path}: expected a line of kind run for {run_id!r}, found none")
    if is_empty:
        raise TraceError(f"{path}: expected at least one run, found none")
    return {
        run_id: Run(info, tuple(requests.get(run_id, {}).values()), tuple(steps.get(run_id, ())))
        for run_id, info in infos.items()
    }


def check_finite(line: Line, source: str) -> None:
    """Raise TraceError if a number is NaN or infinite."""
    for field in line.__struct_fields__:
        value = getattr(line, field)
        if isinstance(value, float) and not math.isfinite(value):
            raise TraceError(f"{source}: expected finite numbers, found {field}={value!r} in {line!r:.200}")
