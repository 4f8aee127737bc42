"""Decode attention on a GPU: homkv and every peer, side by side, against the time it takes to read the cache once.

Each candidate runs in a CUDA graph over several caches, so that L2 does not help. All candidates of a case take turns,
and ratios are taken inside a turn. The floor is the cache's bytes over the fastest read stream of the run. Peers get
their caches for free, contiguous and unpacked; homkv's and the dequantizer's times include everything from q to o.
Every candidate is compared with float64 attention on what it stores before it is timed.
"""

import importlib.metadata
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from homkv.bench.cpu import LARGE_MODEL, HeadShape
from homkv.bench.gpu_candidates import (
    Candidate,
    Case,
    compressed_peers,
    num_sets,
    our_formats,
    random_queries,
    sixteen_bit_peers,
)
from homkv.bench.gpu_clock import Replay, measure
from homkv.bench.gpu_report import print_report
from homkv.bench.gpu_stats import add_floors, decode_rows, fit_rows, plan_rows, tera_per_second
from homkv.bench.rows import append_rows, command_line
from homkv.errors import UnsupportedError

STREAM_BYTES = (2**30, 2**32)
FREE_FRACTION = 0.9  # of the free memory; workspaces and graphs take the rest
LONG_ENOUGH_MS = 2.0
COMPILE_THREADS = 8


@dataclass(frozen=True)
class GpuBenchOptions:
    """What to measure. ``cases`` run homkv and the 16-bit peers, and every peer where ``full`` says so."""

    cases: tuple[Case, ...]
    full: frozenset[Case]  # cases in which the compressed peers run too; in none, they are not compiled
    formats: tuple[str, ...] = ("small", "balanced")
    rounds: int = 9
    rates: bool = True  # packing, prefill and extension too
    record: Path | None = None  # JSONL, appended
    plots: Path | None = None  # folder
    plans: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # formats of the layers, all of them measured


def make_options(
    *,
    quick: bool,
    batches: Sequence[int] | None = None,
    contexts: Sequence[int] | None = None,
    formats: Sequence[str] | None = None,
    shapes: Sequence[HeadShape] | None = None,
    rounds: int | None = None,
) -> GpuBenchOptions:
    """The quick or the whole selection, or the cross product of what is named.

    Quick: 32/8 heads at the sizes that count, all peers at batch 8 and 64k. Whole: every peer at every size, more
    formats, other head groups at one size.
    """
    if quick:
        grid = {1: (16384, 131072), 8: (16384, 65536, 131072), 32: (65536, 131072)}
        chosen = GpuBenchOptions(make_cases(grid, LARGE_MODEL), frozenset({Case(LARGE_MODEL, 8, 65536)}), rounds=7)
    else:
        grid = dict.fromkeys((1, 8, 32), (4096, 16384, 65536, 131072))
        groups = (HeadShape(64, 9, 3), HeadShape(128, 28, 4), HeadShape(128, 64, 8), HeadShape(128, 16, 16))
        cases = make_cases(grid, LARGE_MODEL) + tuple(Case(shape, 8, 65536) for shape in groups)
        chosen = GpuBenchOptions(cases, frozenset(cases), ("small", "balanced", "quality"))
    if batches or contexts or shapes:
        named = dict.fromkeys(batches or (8,), tuple(contexts or (65536,)))
        cases = tuple(case for shape in shapes or (LARGE_MODEL,) for case in make_cases(named, shape))
        chosen = replace(chosen, cases=cases, full=chosen.full if quick else frozenset(cases))
    if formats:
        chosen = replace(chosen, formats=tuple(formats))
    return replace(chosen, rounds=rounds or chosen.rounds)


def make_cases(grid: dict[int, tuple[int, ...]], shape: HeadShape) -> tuple[Case, ...]:
    """All batches with their contexts."""
    return tuple(Case(shape, batch, context) for batch, contexts in grid.items() for context in contexts)


def require_cuda() -> torch.device:
    """The GPU, or UnsupportedError."""
    if not torch.cuda.is_available():
        raise UnsupportedError("expected a CUDA device, found none; run `homkv bench attention --device cpu`")
    return torch.device("cuda", torch.cuda.current_device())


def run(options: GpuBenchOptions, console: Console) -> list[dict[str, Any]]:
    """Measure, print tables, write JSONL and plots; returns one dict per row.

    A candidate that is missing, fails or does not fit becomes a row with the reason. Raises UnsupportedError without a
    CUDA device.
    """
    device = require_cuda()
    rows = list(stream_rows(device))
    with progress_bar(console) as progress:
        shapes = list(dict.fromkeys(case.shape for case in options.cases))
        task = progress.add_task("check", total=len(shapes) + len(options.cases) + options.rates)
        right: dict[HeadShape, list[Candidate]] = {}
        for shape in shapes:
            progress.update(task, description=f"check {shape}")
            everyone = [*our_formats(options.formats), *sixteen_bit_peers()]
            everyone += compressed_peers(options.formats) if options.full else []
            checks = check_all(everyone, shape, device)
            right[shape] = [c for c, row in zip(everyone, checks, strict=True) if row["status"] == "ok"]
            rows += checks
            progress.advance(task)
        for case in options.cases:
            progress.update(task, description=str(case))
            wanted = right[case.shape]
            if case not in options.full:
                few = {c.name for c in (*our_formats(options.formats), *sixteen_bit_peers())}
                wanted = [c for c in wanted if c.name in few]
            rows += run_case(case, wanted, device, options.rounds)
            progress.advance(task)
        if options.rates:
            from homkv.bench.gpu_rates import rate_rows

            progress.update(task, description="packing, prefill, extension")
            rows += rate_rows(options.formats[0], device, options.rounds)
            progress.advance(task)
    rows += plan_rows(rows, {name: of_layers(layers) for name, layers in options.plans.items()})
    add_floors(rows)
    rows += fit_rows(rows)
    about = machine(device)
    rows = [row | about for row in rows]
    finish(rows, options, console)
    return rows


def of_layers(formats: Sequence[str]) -> tuple[str, ...]:
    """Candidates of a plan's layers."""
    return tuple(candidate.name for candidate in our_formats(tuple(formats)))


def finish(rows: list[dict[str, Any]], options: GpuBenchOptions, console: Console) -> None:
    """Print, record and plot."""
    print_report(rows, console)
    append_rows(rows, options.record)
    if options.plots is not None:
        from homkv.bench.plots import plot

        for path in plot(rows, options.plots):
            console.print(f"[dim]{path}[/dim]")


def progress_bar(console: Console) -> Progress:
    """One bar for the whole run."""
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console,
        transient=True,
    )  # fmt: skip


def stream_rows(device: torch.device) -> Iterator[dict[str, Any]]:
    """How fast this GPU reads: torch.sum of float32."""
    for num_bytes in STREAM_BYTES:
        if num_bytes > torch.cuda.mem_get_info(device)[0] * FREE_FRACTION:
            continue
        x = torch.empty(num_bytes // 4, device=device).normal_()
        us = statistics.median(measure({"sum": Replay([x.sum])}, 5)["sum"])
        rate = tera_per_second(num_bytes, us)
        yield {"kind": "stream", "candidate": "torch.sum", "bytes": num_bytes, "us": us, "tbps": rate}


def check(candidate: Candidate, shape: HeadShape, device: torch.device) -> dict[str, Any]:
    """Compare with float64 on a small case: a row with the error, or with the reason why the candidate is out."""
    row = {"kind": "check", "shape": str(shape), "candidate": candidate.name, "tolerance": candidate.tolerance}
    try:
        error = candidate.error(shape, device)
    except Exception as problem:  # whatever a rival's library raises, the others go on
        return row | {"status": "failed", "reason": reason_of(problem)}
    if not error <= candidate.tolerance:
        return row | {"status": "failed", "error": error, "reason": f"relative error {error:.2g}"}
    return row | {"status": "ok", "error": error}


def check_all(candidates: Sequence[Candidate], shape: HeadShape, device: torch.device) -> list[dict[str, Any]]:
    """Check every candidate. Most of the time goes into compiling, so kernels are compiled side by side.

    What fails is checked once more alone, so that no candidate is out because of a compiler that minds company.
    """
    rows: dict[str, dict[str, Any]] = {}
    with ThreadPoolExecutor(COMPILE_THREADS) as pool:
        first = [candidate for candidate in candidates if candidate.compiles]
        for candidate, row in zip(first, pool.map(lambda c: check(c, shape, device), first), strict=True):
            if row["status"] == "ok":
                rows[candidate.name] = row
    return [rows.get(candidate.name) or check(candidate, shape, device) for candidate in candidates]


def reason_of(problem: Exception) -> str:
    """First line of a message, short enough for a table."""
    lines = str(problem).strip().splitlines() or [""]
    return f"{type(problem).__name__}: {lines[0][:160]}"


def fitting(candidates: Sequence[Candidate], case: Case, free: float) -> tuple[list[Candidate], list[dict[str, Any]]]:
    """Candidates whose caches fit together into ``free`` bytes, first come first served; rows for the others."""
    kept: list[Candidate] = []
    out: list[dict[str, Any]] = []
    stores: set[str] = set()
    for candidate in candidates:
        need = candidate.kv_bytes(case) * num_sets(candidate.kv_bytes(case))
        if candidate.store not in stores and need > free:
            reason = f"needs {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are left"
            out.append(outcome(case, candidate, "skipped", reason))
            continue
        if candidate.store not in stores:
            stores.add(candidate.store)
            free -= need
        kept.append(candidate)
    return kept, out


def outcome(case: Case, candidate: Candidate, status: str, reason: str) -> dict[str, Any]:
    """Row of a candidate without a time."""
    return {"kind": "decode", **case.fields, "candidate": candidate.name, "status": status, "reason": reason}


def run_case(case: Case, candidates: Sequence[Candidate], device: torch.device, rounds: int) -> list[dict[str, Any]]:
    """All candidates of one case, each once per round."""
    torch.cuda.empty_cache()
    kept, rows = fitting(candidates, case, torch.cuda.mem_get_info(device)[0] * FREE_FRACTION)
    scale = case.shape.head_dim**-0.5
    stores: dict[str, list[Any]] = {}
    samplers: dict[str, Callable[[], float]] = {}
    sizes = {candidate.name: candidate.kv_bytes(case) for candidate in kept}
    for candidate in kept:
        if candidate.store not in stores:
            count = num_sets(sizes[candidate.name])
            stores[candidate.store] = [candidate.make(case, device) for _ in range(count)]
        q = random_queries(case.shape, case.batch, device)
        calls = [bind(candidate, q, kv, scale) for kv in stores[candidate.store]]
        try:
            samplers[candidate.name] = Replay(calls, LONG_ENOUGH_MS)
        except Exception as problem:  # for example out of memory in a workspace
            rows.append(outcome(case, candidate, "failed", reason_of(problem)))
    sets = {candidate.name: len(stores[candidate.store]) for candidate in kept}
    measured = decode_rows(case.fields, measure(samplers, rounds), sizes)
    return rows + [row | {"sets": sets[row["candidate"]]} for row in measured]


def bind(candidate: Candidate, q: Tensor, kv: Any, scale: float) -> Callable[[], object]:
    """The call that is timed."""
    return lambda: candidate.attend(q, kv, scale)


def machine(device: torch.device) -> dict[str, Any]:
    """What a reader needs to judge or repeat the numbers."""
    properties = torch.cuda.get_device_properties(device)
    cudnn = torch.backends.cudnn.version()
    return {
        "gpu": properties.name,
        "processors": properties.multi_processor_count,
        "memory_gb": round(properties.total_memory / 1e9, 1),
        "versions": {
            "homkv": importlib.metadata.version("homkv") if is_installed("homkv") else "source",
            "torch": torch.__version__,
            "triton": importlib.metadata.version("triton"),
            "cuda": torch.version.cuda,
            "cudnn": cudnn,
            "python": platform.python_version(),
        },
        "command": command_line(),
        "unix_time": int(time.time()),
    }


def is_installed(package: str) -> bool:
    """Whether a distribution is there; from a checkout alone there is none."""
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
