"""Simulated against real: the requests of a record, run through the simulator with step times of the same machine."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from homkv.errors import TraceError
from homkv.sim.costs import Costs
from homkv.sim.engine import System, simulate
from homkv.sim.fitted import beside, fit, handoff_s, seal_per_token_s
from homkv.sim.formats import make_format
from homkv.sim.hardware import find_gpu, find_model
from homkv.sim.record import PHASES, RequestRecord, Run, read_record
from homkv.sim.roofline import RooflineCosts
from homkv.sim.trace import Request

MAX_MEAN_ERROR, MAX_P99_ERROR = 0.10, 0.20  # what a validated model may miss
MIN_REQUESTS = 2


@dataclass(frozen=True)
class Validation:
    """One run, measured and simulated. Errors: ``simulated / measured - 1``. ``pairs``: JCT of every request.

    ``turns_jct_s``: measured mean JCT of each turn.
    """

    run_id: str
    kv_cache_dtype: str
    link_gbps: float | None
    requests: int
    measured_jct_s: float
    simulated_jct_s: float
    measured_p99_s: float
    simulated_p99_s: float
    measured_phases_s: dict[str, float]
    simulated_phases_s: dict[str, float]
    pairs: list[tuple[float, float]]
    turns_jct_s: list[float]

    @property
    def noise(self) -> float:
        """How far a turn is from the mean of all turns, at most: what a model of the machine cannot know."""
        return max(abs(turn_s / self.measured_jct_s - 1) for turn_s in self.turns_jct_s)

    @property
    def mean_error(self) -> float:
        """Of the mean JCT."""
        return self.simulated_jct_s / self.measured_jct_s - 1

    @property
    def p99_error(self) -> float:
        """Of the 99th percentile of JCT."""
        return self.simulated_p99_s / self.measured_p99_s - 1

    @property
    def holds(self) -> bool:
        """Mean within 10 % and P99 within 20 %."""
        return abs(self.mean_error) <= MAX_MEAN_ERROR and abs(self.p99_error) <= MAX_P99_ERROR

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        errors = {"mean_error": self.mean_error, "p99_error": self.p99_error, "noise": self.noise, "holds": self.holds}
        return {"kind": "sim-validation", **asdict(self), **errors}


CostsOf = Callable[[Run], Costs]


def validate(paths: Sequence[Path], costs_of: CostsOf = fit, max_load: float = math.inf) -> list[Validation]:
    """Every run of some records; turns of one configuration (run ids that differ in ``/0``, ``/1`` … only) are pooled.

    ``costs_of``: step times, by default fitted to each run's own step lines; what one lacks besides may come from
    others on the same devices (homkv.sim.fitted). ``max_load``: turns behind which the machine's load average of one
    minute was above it are left out, with what was timed before them: other work ran. Raises TraceError for a record
    that cannot be used.
    """
    groups: dict[tuple[Path, str], list[Run]] = {}
    for path in paths:
        for run in read_record(path).values():
            if load_average(run) <= max_load:
                name, _, turn = run.info.run_id.rpartition("/")
                groups.setdefault((path, name if name and turn.isdecimal() else run.info.run_id), []).append(run)
    everything = [run for runs in groups.values() for run in runs]
    return [compared(name, runs, costs_of, everything) for (_, name), runs in groups.items()]


def load_average(run: Run) -> float:
    """The machine's, of one minute, behind a run; 0 where the record does not say."""
    return float(run.info.options.get("load_average", "0").split()[0])


def tables(gpu: str, model: str) -> CostsOf:
    """Step times and bytes from homkv.sim's tables instead: a prediction that knows nothing of the run.

    Raises UnsupportedError for an unknown GPU or model, FormatError for a format without a model.
    """
    machine, shape = find_gpu(gpu), find_model(model)
    return lambda run: RooflineCosts(shape, make_format(run.info.kv_cache_dtype, shape.head_dim), machine, machine)


def compared(run_id: str, runs: Sequence[Run], costs_of: CostsOf = fit, record: Sequence[Run] = ()) -> Validation:
    """Runs of one configuration, each simulated by itself, taken together. ``record``: all runs beside them.

    What was timed before each turn counts for all of them.
    """
    steps = tuple(step for run in runs for step in run.steps)
    turns = [simulated(msgspec.structs.replace(run, steps=steps), costs_of, record) for run in runs]
    pairs = [pair for turn in turns for pair in turn]
    measured_jct, simulated_jct = (np.array([r.jct_s for r in side]) for side in zip(*pairs, strict=True))
    measured_phases, simulated_phases = (
        {name: float(np.mean([getattr(r, name) for r in side])) for name in PHASES} for side in zip(*pairs, strict=True)
    )
    return Validation(
        run_id=run_id,
        kv_cache_dtype=runs[0].info.kv_cache_dtype,
        link_gbps=runs[0].info.link_gbps,
        requests=len(pairs),
        measured_jct_s=float(measured_jct.mean()),
        simulated_jct_s=float(simulated_jct.mean()),
        measured_p99_s=float(np.percentile(measured_jct, 99)),
        simulated_p99_s=float(np.percentile(simulated_jct, 99)),
        measured_phases_s=measured_phases,
        simulated_phases_s=simulated_phases,
        pairs=[(real.jct_s, found.jct_s) for real, found in pairs],
        turns_jct_s=[float(np.mean([real.jct_s for real, _ in turn])) for turn in turns],
    )


def simulated(
    run: Run, costs_of: CostsOf = fit, record: Sequence[Run] = ()
) -> list[tuple[RequestRecord, RequestRecord]]:
    """One run's requests at their recorded arrivals, as measured and as simulated. Raises TraceError for too few."""
    if len(run.requests) < MIN_REQUESTS:
        raise TraceError(f"run {run.info.run_id!r}: expected at least two requests, found {len(run.requests)}")
    real = sorted(run.requests, key=lambda r: r.arrival_s)
    requests = [Request(r.request_id, r.arrival_s, r.prompt_tokens, r.output_tokens) for r in real]
    found = {
        r.request_id: r
        for r in simulate(system_of(run, costs_of(run), record), requests).tally.records(run.info.run_id)
    }
    return [(r, found[r.request_id]) for r in real]


def system_of(run: Run, costs: Costs, record: Sequence[Run] = ()) -> System:
    """The system that a record describes. What a request takes with all else idle (handoff) adds to the latency."""
    info, (prefill_beside, decode_beside) = run.info, beside(run, record)
    return System(
        costs=costs,
        num_prefill=info.num_prefill,
        num_decode=info.num_decode,
        egress_gbps=info.link_gbps,  # replays shape what leaves an instance, not what enters one
        latency_s=info.link_latency_s + handoff_s(run),
        overlap=info.overlap,
        background_pack=info.background_pack,
        reserves_early=info.reserves_early,
        capacity_bytes=info.kv_capacity_bytes,
        max_batch=info.max_batch,
        seal_per_token_s=seal_per_token_s(run, record),
        prefill_beside=prefill_beside,
        decode_beside=decode_beside,
    )
