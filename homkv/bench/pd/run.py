"""The whole measurement: which cells, in which order, within which time; their record as they end."""

import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from homkv.bench.generate import MODELS
from homkv.bench.jct.summary import RateAtP99, Summary, rate_at_p99
from homkv.bench.pd.cell import Outcome, run_cell
from homkv.bench.pd.forms import Form, make_form
from homkv.bench.pd.messages import Cell
from homkv.bench.pd.options import BASE, PdOptions
from homkv.bench.pd.pool import CellError, Pool, PoolOptions
from homkv.bench.pd.workload import burst, poisson
from homkv.sim.record import Line, Run, RunInfo, StepSample, read_record, write_record
from homkv.sim.trace import Request

GIB = 2**30
START_TIMEOUT_S = 180.0  # until workers have their model and their connections


@dataclass(frozen=True)
class Point:
    """One cell with its requests."""

    workload: str
    cell: Cell
    load: float | None  # None: calibration
    requests: list[Request]
    rate_rps: float

    @property
    def case(self) -> str:
        """What is the same for all formats that are compared."""
        link = {"direct": "device to device", "tcp": "TCP, unshaped"}.get(self.cell.link, f"{self.cell.link} Gb/s")
        at = f"{self.rate_rps:.2f} req/s" + (f" (load {self.load:g})" if self.load else "")
        return f"{self.workload}, {link}, {at}"

    @property
    def run_id(self) -> str:
        """Unique in a record."""
        how = "overlap" if self.cell.overlap else "after"
        load = "calibration" if self.load is None else f"{self.load:g}"
        return f"{self.workload}/{self.cell.link}/{self.cell.format}/{how}/{load}"


class PdBench:
    """Runs points one after another on workers that live as long as all goes well."""

    def __init__(self, options: PdOptions, console: Console) -> None:
        self.options, self.console = options, console
        self.end_s = time.monotonic() + options.budget_s
        self.shape = MODELS[options.model]
        self._pool: Pool | None = None
        self._steps: dict[tuple[str, str], list[StepSample]] = {}
        self.capacity_rps: dict[tuple[str, str], float] = {}  # (workload, link) -> of the baseline
        self.skipped: list[str] = []

    def run(self) -> list[Run]:
        """Everything that fits into the budget, appended to the record as it ends."""
        options = self.options
        options.record.parent.mkdir(parents=True, exist_ok=True)
        options.record.unlink(missing_ok=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        try:
            with Progress(*columns, console=self.console, transient=True) as progress:
                task = progress.add_task("starting workers", total=None)
                for point in self._points():
                    progress.update(task, description=point.run_id, total=len(point.requests), completed=0)
                    self._measure(point, lambda: progress.advance(task))
        finally:
            self._close()
        return self.recorded()

    def recorded(self) -> list[Run]:
        """What the record holds."""
        record = self.options.record
        return list(read_record(record).values()) if record.exists() else []

    def _points(self) -> Iterator[Point]:
        """Calibrations first, then format by format: what workers prepared for a format serves all its cells."""
        options = self.options
        for workload in options.workloads:
            if options.rate_rps is None:
                for link in options.links:
                    requests = burst(options.lengths[workload], options.calibration_requests)
                    yield Point(workload, self._cell(workload, BASE, link, True), None, requests, 0.0)
            for name in options.formats:
                for link in options.links:
                    yield from self._format_points(workload, name, link)

    def _format_points(self, workload: str, name: str, link: str) -> Iterator[Point]:
        options = self.options
        capacity = self.capacity_rps.get((workload, link))
        loads = [(load, load * capacity) for load in options.loads] if capacity else []
        if options.rate_rps is not None:
            loads = [(0.0, options.rate_rps)]
        elif not capacity:
            self.skipped.append(f"{workload}/{link}/{name}: the baseline's capacity was not measured")
        for load, rate in loads:
            requests = poisson(options.lengths[workload], options.requests, rate, options.seed)
            for overlap in options.overlaps:
                yield Point(workload, self._cell(workload, name, link, overlap), load, requests, rate)

    def _cell(self, workload: str, name: str, link: str, overlap: bool) -> Cell:
        lengths, budget = self.options.lengths[workload], int(self.options.kv_budget_gib * GIB)
        slots = self.options.slots
        if budget:  # no more slots than sequences could fit: dense slots take their memory whether used or not
            smallest = self._form(name).kv_bytes(lengths.shortest)
            slots = max(1, min(slots, budget // smallest))
        return Cell(name, link, overlap, self.options.prefill, slots, lengths.prompt, lengths.longest, budget)

    def _form(self, name: str) -> Form:
        return make_form(self.shape, name)

    def _measure(self, point: Point, on_done: Callable[[], None]) -> None:
        """One point, and what its failure means for the workers."""
        now_s = time.monotonic()
        if now_s >= self.end_s:
            self.skipped.append(f"{point.run_id}: the time was used up")
            return
        try:
            pool = self._pool or self._open(min(now_s + START_TIMEOUT_S, self.end_s))
            deadline_s = min(time.monotonic() + self.options.cell_timeout_s, self.end_s)
            self._probe(pool, point, deadline_s)
            outcome = run_cell(pool, point.cell, point.requests, deadline_s, on_done)
        except CellError as error:
            self._close()
            self.skipped.append(f"{point.run_id}: {error}")
            return
        if point.load is None:
            self.capacity_rps[point.workload, point.cell.link] = capacity(outcome)
        self._write(point, outcome, pool)

    def _open(self, deadline_s: float) -> Pool:
        o = self.options
        options = PoolOptions(
            o.prefill_devices, o.decode_devices, o.model, lanes=o.lanes, chunk_bytes=int(o.chunk_mib * 2**20),
            threads=o.threads, use_direct="direct" in o.links,
        )  # fmt: skip
        self._pool = Pool(options, deadline_s)
        return self._pool

    def _close(self) -> None:
        if self._pool is not None:
            self._pool.close()
        self._pool = None

    def _probe(self, pool: Pool, point: Point, deadline_s: float) -> None:
        """Two requests, one at a time, in a system at rest: what a request takes besides its steps. Once per format."""
        key = (point.workload, point.cell.format)
        if key in self._steps:
            return
        samples = []
        for tokens in point.cell.prompts:
            outcome = run_cell(pool, point.cell, [Request("0", 0.0, tokens, 2)], deadline_s)
            record = outcome.records("", lambda _: 0)[0]
            samples += [("unpack", tokens, record.unpack_s), ("handoff", tokens, record.queue_s + record.wait_s)]
        steps = [StepSample(run_id="", stage=s, batch=1, tokens=n, seconds=t) for s, n, t in samples]  # type: ignore[arg-type]
        for rank in (0, pool.num_prefill):  # one of each kind
            for step in outcome.opened[rank].steps:
                steps.append(
                    StepSample(run_id="", stage=step.stage, batch=step.batch, tokens=step.tokens, seconds=step.seconds)
                )
        self._steps[key] = steps

    def _write(self, point: Point, outcome: Outcome, pool: Pool) -> None:
        form = self._form(point.cell.format)
        info = run_info(self.options, point, outcome, pool)
        steps = self._steps[point.workload, point.cell.format]
        lines: list[Line] = [info, *(with_run(step, point.run_id) for step in steps)]
        lines += outcome.records(point.run_id, form.kv_bytes)
        write_record(self.options.record, lines, append=True)


def with_run(step: StepSample, run_id: str) -> StepSample:
    """The sample under another run's name."""
    return StepSample(run_id=run_id, stage=step.stage, batch=step.batch, tokens=step.tokens, seconds=step.seconds)


def capacity(outcome: Outcome) -> float:
    """Requests per second of a burst: between the first and the last first token, and between the ends, the slower."""
    ended = [life.finished for life in outcome.lives if life.finished is not None]
    rates = []
    for times in ([f.first_token_s for f in ended], [f.done_s for f in ended]):
        rates.append((len(times) - 1) / max(max(times) - min(times), 1e-6))
    return min(rates)


def run_info(options: PdOptions, point: Point, outcome: Outcome, pool: Pool) -> RunInfo:
    """Everything a reader needs to judge or repeat a run."""
    cell, decode = point.cell, [outcome.closed[rank] for rank in pool.decode_ranks]
    everyone = outcome.closed.values()
    digest_s, digest_bytes = sum(c.digest_s for c in everyone), sum(c.digest_bytes for c in everyone)
    where = "XXH3-128 on both hosts" if cell.link != "direct" else "64-bit sums on both devices"
    extra = {
        "case": point.case,
        "variant": "" if cell.overlap else "(no overlap)",
        "load": "calibration" if point.load is None else f"{point.load:g}",
        "rate_rps": f"{point.rate_rps:.4f}",
        "link": cell.link,
        "prefill": cell.prefill,
        "devices": ", ".join((*options.prefill_devices, *options.decode_devices)),
        "digest": f"{where}: {digest_s:.3f} s for {digest_bytes / 1e9:.2f} GB, beside the computation",
        "kv_allocated_bytes": str(max(outcome.opened[rank].kv_bytes for rank in pool.decode_ranks)),
        "torch": str(torch.__version__),
    }
    budget = cell.kv_budget_bytes or cell.slots * make_form(MODELS[options.model], cell.format).kv_bytes(cell.longest)
    return RunInfo(
        run_id=point.run_id,
        source="replay",
        model=f"{options.model} ({pool.num_params / 1e9:.2f} B random weights)",
        kv_cache_dtype=cell.format,
        command=" ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        machine=f"{platform.machine()}, {', '.join(sorted(set(pool.devices.values())))}",
        seed=options.seed,
        num_prefill=pool.num_prefill,
        num_decode=pool.num_decode,
        link_gbps=cell.link_gbps,
        overlap=cell.overlap,
        num_layers=MODELS[options.model].num_layers,
        max_batch=cell.slots,
        kv_capacity_bytes=budget,
        reserves_early=True,
        peak_kv_bytes=max(c.peak_kv_bytes for c in decode),
        peak_memory_bytes=max(c.peak_device_bytes for c in everyone),
        unix_time=int(time.time()),
        options=extra,
    )


def rates_at_p99(summaries: list[Summary], load: str) -> list[tuple[str, RateAtP99]]:
    """What every format serves while its P99 is at most the baseline's at ``load``, by workload and link."""
    out = []
    for place in dict.fromkeys(place_of(s) for s in summaries):
        here = [s for s in summaries if place_of(s) == place]
        target = next((s for s in here if s.name == BASE and s.options["load"] == load), None)
        for name in dict.fromkeys(s.name for s in here):
            points = [(float(s.options["rate_rps"]), s.percentile("jct_s", 99)) for s in here if s.name == name]
            rate = None if target is None else rate_at_p99(points, target.percentile("jct_s", 99), name)
            if rate is not None:
                out.append((place, rate))
    return out


def place_of(s: Summary) -> str:
    """Workload and link."""
    return s.case.rsplit(", ", 1)[0]
