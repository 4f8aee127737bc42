"""The whole measurement: which cells, in which order, within which time; their record as they end.

Formats take turns at every point, so that a run that is cut short has compared them at all points it reached.
"""

import platform
import time
from collections.abc import Callable, Sequence
from statistics import fmean

import msgspec
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from homkv.bench.generate import MODELS
from homkv.bench.pd.capacity import capacity_rps, seconds_on_link
from homkv.bench.pd.cell import Outcome, run_cell
from homkv.bench.pd.forms import make_form
from homkv.bench.pd.messages import DEVICE_LINKS
from homkv.bench.pd.options import PdOptions
from homkv.bench.pd.points import Point, budget_bytes, walk
from homkv.bench.pd.pool import CellError, Pool, PoolOptions
from homkv.bench.pd.probe import probe, probe_beside
from homkv.bench.rows import command_line
from homkv.sim.record import LeftOut, Line, Run, RunInfo, StepSample, read_record, write_record

START_TIMEOUT_S = 180.0  # until workers have their model and their connections


class PdBench:
    """Runs points one after another on workers that live as long as all goes well.

    ``legs``: more measurements on the same workers instead of the one that ``options`` says; see homkv.bench.pd.plan.
    Raises UnsupportedError for devices or links that are not here.
    """

    def __init__(self, options: PdOptions, console: Console, legs: Sequence[PdOptions] = ()) -> None:
        self.options, self.legs, self.console = options, legs or (options,), console
        for leg in self.legs:
            leg.require_here()
        self.start_s = time.monotonic()
        self.end_s = self.start_s + options.budget_s
        self.shape = MODELS[options.model]
        self._pool: Pool | None = None
        self._steps: dict[object, list[StepSample]] = {}  # by Point.key
        self._beside: dict[object, list[StepSample]] = {}  # by workload and format
        self._done: set[str] = set()
        self._broken: dict[str, str] = {}  # links between devices that did not open, and why
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
                for _, point in walk(self.legs, self._capacity, self._done):
                    progress.update(task, description=point.run_id, total=len(point.requests), completed=0)
                    self._measure(point, lambda: progress.advance(task))
        finally:
            self._close()
        return self.recorded()

    def recorded(self) -> list[Run]:
        """What the record holds."""
        record = self.options.record
        return list(read_record(record).values()) if record.exists() else []

    def _capacity(self, leg: PdOptions, base: Point) -> float | None:
        """What the baseline can serve, by its steps at rest; None if they could not be timed."""
        if not self._try(base, lambda pool, deadline_s: self._probe(pool, base, deadline_s)):
            return None
        return capacity_rps(leg, base, self._steps[base.key])

    def _measure(self, point: Point, on_done: Callable[[], None]) -> None:
        """One point, into the record."""

        def run(pool: Pool, deadline_s: float) -> None:
            self._probe(pool, point, deadline_s)
            probed_s = time.monotonic()
            outcome = run_cell(pool, point.cell, point.requests, deadline_s, on_done)
            self._write(point, outcome, pool)
            times = [life.finished.done_s - life.arrival_s for life in outcome.lives if life.finished]
            self._log(
                f"{point.run_id} at {point.rate_rps:.2f} req/s: JCT {fmean(times):.2f} s, at most {max(times):.2f}; "
                f"prepared in {probed_s - start_s:.1f} s, ran {time.monotonic() - probed_s:.1f} s"
            )

        start_s = time.monotonic()
        if self._try(point, run):
            self._done.add(point.run_id)

    def _skip(self, point: Point, reason: str) -> None:
        """Name a point that was not measured, in the record too."""
        self.skipped.append(f"{point.run_id}: {reason}")
        self._log(f"left out: {point.run_id}: {reason}")
        line = LeftOut(run_id=point.run_id, reason=reason, unix_time=int(time.time()))
        write_record(self.options.record, [line], append=True)

    def _log(self, text: str) -> None:
        """One line per event, for those who watch a log."""
        self.console.print(f"{time.monotonic() - self.start_s:6.1f} s  {text}", highlight=False, markup=False)

    def _try(self, point: Point, work: Callable[[Pool, float], None]) -> bool:
        """Do something with the workers in the time of a cell; a failure is noted and costs the workers."""
        now_s, kind = time.monotonic(), point.cell.kind
        if now_s >= self.end_s or kind in self._broken:
            self._skip(point, self._broken.get(kind, "the time was used up"))
            return False
        try:
            pool = self._pool or self._open(min(now_s + START_TIMEOUT_S, self.end_s))
            deadline_s = min(time.monotonic() + self.options.cell_timeout_s, self.end_s)
            if kind in DEVICE_LINKS:
                self._join(pool, kind, deadline_s)
            work(pool, deadline_s)
        except CellError as error:
            self._close()
            self._skip(point, str(error))
            return False
        return True

    def _join(self, pool: Pool, kind: str, deadline_s: float) -> None:
        """Open a link between devices; one that does not open is not tried again. Raises CellError."""
        try:
            pool.join(kind, deadline_s)
        except CellError as error:
            self._broken[kind] = f"the link {kind} did not open: {error}"
            raise

    def _open(self, deadline_s: float) -> Pool:
        o = self.options
        options = PoolOptions(
            o.prefill_devices, o.decode_devices, o.model, lanes=o.lanes, chunk_bytes=int(o.chunk_mib * 2**20),
            threads=o.threads, use_direct=any("direct" in leg.links for leg in self.legs),
            use_nixl=any("nixl" in leg.links for leg in self.legs),
        )  # fmt: skip
        self._pool = Pool(options, deadline_s)
        self._log(f"workers started: {', '.join(self._pool.devices.values())}")
        return self._pool

    def _close(self) -> None:
        if self._pool is not None:
            self._pool.close()
        self._pool = None

    def _probe(self, pool: Pool, point: Point, deadline_s: float) -> None:
        """Steps at rest, once per format; where workers share a device, also beside one another."""
        if point.key in self._steps:
            return
        steps = probe(pool, point.cell, deadline_s)
        if self.options.shares_a_device:
            place = (point.workload, point.cell.format)
            if not point.cell.kv_budget_bytes:  # a budget may not hold two sequences
                link_s = seconds_on_link(point.cell, self.options.model, point.cell.prompts[0])
                self._beside[place] = probe_beside(pool, point.cell, steps, link_s, deadline_s)
            steps += self._beside.get(place, [])
        self._steps[point.key] = steps

    def _write(self, point: Point, outcome: Outcome, pool: Pool) -> None:
        form = make_form(self.shape, point.cell.format)
        info = run_info(self.options, point, outcome, pool)
        steps = self._steps[point.key]
        lines: list[Line] = [info, *(with_run(step, point.run_id) for step in steps)]
        lines += outcome.records(point.run_id, form.kv_bytes)
        write_record(self.options.record, lines, append=True)


def with_run(step: StepSample, run_id: str) -> StepSample:
    """The sample under another run's name."""
    return msgspec.structs.replace(step, run_id=run_id)


def run_info(options: PdOptions, point: Point, outcome: Outcome, pool: Pool) -> RunInfo:
    """Everything a reader needs to judge or repeat a run."""
    cell, decode = point.cell, [outcome.closed[rank] for rank in pool.decode_ranks]
    everyone = outcome.closed.values()
    digest_s, digest_bytes = sum(c.digest_s for c in everyone), sum(c.digest_bytes for c in everyone)
    where = "XXH3-128 on both hosts" if cell.kind == "tcp" else "64-bit sums on both devices"
    extra = {
        "case": point.case,
        "variant": point.variant,
        "load": f"{point.load:g}",
        "rate_rps": f"{point.rate_rps:.4f}",
        "link": cell.link,
        "prefill": cell.prefill,
        "devices": ", ".join(options.devices),
        "digest": f"{where}: {digest_s:.3f} s for {digest_bytes / 1e9:.2f} GB, beside the computation",
        "kv_allocated_bytes": str(max(outcome.opened[rank].kv_bytes for rank in pool.decode_ranks)),
        "torch": str(torch.__version__),
    }
    return RunInfo(
        run_id=point.run_id,
        source="replay",
        model=f"{options.model} ({pool.num_params / 1e9:.2f} B random weights)",
        kv_cache_dtype=cell.format,
        command=command_line(),
        machine=f"{platform.machine()}, {', '.join(sorted(set(pool.devices.values())))}",
        seed=options.seed,
        num_prefill=pool.num_prefill,
        num_decode=pool.num_decode,
        link_gbps=cell.link_gbps,
        overlap=cell.overlap,
        num_layers=MODELS[options.model].num_layers,
        max_batch=cell.slots,
        kv_capacity_bytes=budget_bytes(cell, options.model),
        reserves_early=True,
        peak_kv_bytes=max(c.peak_kv_bytes for c in decode),
        peak_memory_bytes=max(c.peak_device_bytes for c in everyone),
        unix_time=int(time.time()),
        options=extra,
    )
