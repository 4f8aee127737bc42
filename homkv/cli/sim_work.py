"""What the commands of ``homkv sim`` share: deployments and requests from options, progress, files, plots."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from homkv.errors import UnsupportedError

if TYPE_CHECKING:
    from homkv.sim.engine import Outcome
    from homkv.sim.paper import PaperRow
    from homkv.sim.scenario import Scenario
    from homkv.sim.summary import Summary
    from homkv.sim.trace import Request
    from homkv.sim.validate import Validation
    from homkv.sim.whatif import Option, Point, Prices

LINKS = (1, 2.5, 5, 10, 25, 50, 100, 200, 400)  # Gb/s of a sweep
FACTORS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)  # of the rate
PROMPTS = (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)  # tokens


def make_scenario(
    model: str, gpu: str, prefill_gpu: str | None, decode_gpu: str | None, prefill_tp: int | None,
    decode_tp: int | None, link_gbps: float | None, overlap: bool,
) -> "Scenario":  # fmt: skip
    """The deployment that the options describe. Raises UnsupportedError."""
    from homkv.sim.roofline import Layout
    from homkv.sim.scenario import Scenario

    return Scenario(
        model,
        prefill_gpu or gpu,
        decode_gpu or gpu,
        prefill_layout=None if prefill_tp is None else Layout(prefill_tp),
        decode_layout=None if decode_tp is None else Layout(decode_tp),
        link_gbps=link_gbps,
        overlap=overlap,
    )


def make_requests(trace: Path | None, profile: str, rate: float | None, num: int, seed: int) -> "list[Request]":
    """Requests of a trace, or drawn from a profile. Raises TraceError, UnsupportedError."""
    from homkv.sim.trace import read_trace
    from homkv.sim.workload import draw, lengths_of

    if num < 1:
        raise UnsupportedError(f"expected at least one request, found {num}")
    if trace is not None:
        return read_trace(trace, requests_per_s=rate, seed=seed)[:num]
    return draw(*lengths_of(profile), 1.0 if rate is None else rate, num, seed)


def describe(work: "list[Request]") -> str:
    """Rate and mean lengths. Raises UnsupportedError for fewer than two requests, which have no rate."""
    from homkv.sim.whatif import lengths, rate_of

    prompt, output = lengths(work)
    return f"{rate_of(work):.2f} requests/s of {prompt:,} + {output:,} tokens"


@contextmanager
def progress(total: int | None, title: str) -> Iterator[Callable[[str], None]]:
    """A bar that advances with every call; the argument says what comes next."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda text: bar.update(task, advance=1, description=text)


def write_lines(path: Path | None, rows: Iterable[dict[str, Any]]) -> None:
    """JSON Lines, each with the command that made it."""
    from homkv.bench.rows import append_rows, command_line

    append_rows(({**row, "command": command_line()} for row in rows), path, mode="w")


def _count(advance: Callable[[str], None], name: str, every: int, done: int) -> None:
    if done % every == 0:
        advance(name)


def simulate_formats(
    base: "Scenario", work: "list[Request]", names: Sequence[str]
) -> "tuple[dict[str, Outcome], dict[str, float]]":
    """Outcome of every format, and the processor time that simulating it took."""
    from homkv.sim.engine import simulate

    outcomes, cpu_s = {}, {}
    every = max(1, len(work) // 100)
    for name in names:
        start = time.process_time()
        with progress(len(work) // every, name) as advance:
            outcomes[name] = simulate(base.with_format(name).system(), work, partial(_count, advance, name, every))
        cpu_s[name] = time.process_time() - start
    return outcomes, cpu_s


def run_lines(model: str, rows: "Mapping[str, Summary]", cpu_s: Mapping[str, float]) -> list[dict[str, Any]]:
    """A line per format: the summary, and what simulating it took."""
    common = {"kind": "sim-run", "model": model}
    return [{**common, "format": name, "cpu_s": cpu_s[name], "summary": asdict(s)} for name, s in rows.items()]


def write_runs(path: Path, base: "Scenario", outcomes: "dict[str, Outcome]", seed: int) -> None:
    """A record with one run per format."""
    from homkv.bench.rows import command_line
    from homkv.sim.record import RunInfo, write_record

    for index, (name, outcome) in enumerate(outcomes.items()):
        system = base.with_format(name).system()
        info = RunInfo(
            run_id=name,
            source="sim",
            model=base.model,
            kv_cache_dtype=name,
            command=command_line(),
            machine=f"simulated: {base.prefill_gpu} to {base.decode_gpu}",
            seed=seed,
            num_prefill=base.num_prefill,
            num_decode=base.num_decode,
            link_gbps=system.egress_gbps,
            overlap=base.overlap,
            num_layers=system.costs.num_layers,
            max_batch=system.max_batch,
            kv_capacity_bytes=system.capacity_bytes,
            peak_kv_bytes=outcome.peak_kv_bytes,
        )
        write_record(path, [info], append=index > 0)
        write_record(path, outcome.tally.records(name), append=True)


def plot_validation(rows: "Sequence[Validation]", source: str, folder: Path, record: Path) -> list[Path]:
    """Simulated over measured JCT of every request, a colour per format; returns the files, named after ``record``."""
    from homkv.sim.plots import agreement, save

    points: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        link = "device to device" if row.link_gbps is None else "TCP"
        points.setdefault(f"{row.kv_cache_dtype}, {link}", []).extend(row.pairs)
    return save(agreement(points, f"JCT, simulated from {source}"), folder, f"sim-validation-{record.stem}")


def print_paths(paths: Iterable[Path]) -> None:
    """One file per line."""
    for path in paths:
        print(path)


def plot_run(rows: "Mapping[str, Summary]", model: str, folder: Path) -> list[Path]:
    """Where the time goes, a bar per format; returns the files."""
    from homkv.sim.plots import decomposition, save

    bars = {name: {**s.phases_s, "dequantize_s": s.dequantize_s} for name, s in rows.items()}
    return save(decomposition(bars, f"{model}: where the time goes"), folder, "sim-run")


def plot_paper(rows: "Sequence[PaperRow]", folder: Path) -> list[Path]:
    """Where the time goes, in the paper's best case and where decode is what limits."""
    from homkv.sim.plots import decomposition, save

    files = []
    for gpu, profile in dict.fromkeys((r.prefill_gpu, r.profile) for r in rows):
        if (gpu, profile) not in (("v100", "cocktail"), ("v100", "long"), ("a100", "long")):
            continue
        loads = [r.load for r in rows if (r.prefill_gpu, r.profile) == (gpu, profile)]
        load = min(loads, key=lambda x: abs(x - 0.9))
        chosen = [r for r in rows if (r.prefill_gpu, r.profile, r.load) == (gpu, profile, load)]
        bars = {r.name: {**r.summary.phases_s, "dequantize_s": r.summary.dequantize_s} for r in chosen}
        title = f"{rows[0].model}, {gpu} prefill, {profile}, {load:.0%} of 16-bit capacity"
        files += save(decomposition(bars, title), folder, f"sim-{gpu}-{profile}")
    return files


def sweeps(
    base: "Scenario", work: "list[Request]", prices: "Prices", names: tuple[str, ...], option: "Option",
    utilisation: float,
) -> "Iterator[Point]":  # fmt: skip
    """Link speeds and rates with the instances of ``option``; prompt lengths with instances sized anew."""
    from homkv.sim import whatif as question

    sized = replace(base, format=option.format, num_prefill=option.num_prefill, num_decode=option.num_decode)
    with progress(None, "sweeps") as advance:
        advance("link")
        yield from question.sweep_links(sized, work, prices, LINKS, names)
        advance("rate")
        yield from question.sweep_rates(sized, work, prices, FACTORS, names)
        advance("prompts")
        yield from question.sweep_prompts(base, work, prices, PROMPTS, names, utilisation)


def plot_sweeps(points: "Sequence[Point]", title: str, folder: Path) -> list[Path]:
    """JCT over link, rate and prompt length, and cost over prompt length; returns the files."""
    from homkv.sim.plots import lines, save

    files = []
    axes = ("link_gbps", "requests_per_s", "prompt_tokens")
    for axis, value in [*((axis, "jct_s") for axis in axes), ("prompt_tokens", "cost")]:
        series: dict[str, list[tuple[float, float]]] = {}
        for point in points:
            if point.axis == axis:
                y = point.option.cost if value == "cost" else point.option.summary.jct_s
                series.setdefault(point.option.format, []).append((point.value, y))
        files += save(lines(series, axis, value, title), folder, f"sim-{value.removesuffix('_s')}-over-{axis}")
    return files
