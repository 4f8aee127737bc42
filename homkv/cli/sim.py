"""``homkv sim``: prefill and decode instances simulated from measured step times."""

import json
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from homkv.errors import UnsupportedError

if TYPE_CHECKING:
    from homkv.sim.scenario import Scenario
    from homkv.sim.trace import Request

app = typer.Typer(help="Simulate prefill and decode instances from measured step times.", no_args_is_help=True)

Model = Annotated[str, typer.Option(help="Model, or an unambiguous part of its name.")]
Gpus = Annotated[str, typer.Option("--gpu", help="GPU of both sides.")]
PrefillGpu = Annotated[str | None, typer.Option(help="GPU of prefill, where it differs.")]
DecodeGpu = Annotated[str | None, typer.Option(help="GPU of decode, where it differs.")]
PrefillTp = Annotated[
    int | None, typer.Option(help="GPUs of a prefill instance. Default: fewest that hold the weights.")
]
DecodeTp = Annotated[int | None, typer.Option(help="GPUs of a decode instance. Default: fewest that hold the weights.")]
LinkGbps = Annotated[float | None, typer.Option(help="Link of every instance. Default: the usual cloud instance's.")]
Formats = Annotated[list[str] | None, typer.Option("--kv-cache-dtype", help="Format; repeat the option.")]
Trace = Annotated[Path | None, typer.Option(help="Trace of requests: homkv, Mooncake, Azure or Vidur, gzip or not.")]
Profile = Annotated[str, typer.Option(help="Lengths when there is no trace; see homkv/sim/data/profiles.json.")]
Rate = Annotated[float | None, typer.Option(help="Requests per second, Poisson. Default: the trace's times, else 1.")]
Num = Annotated[int, typer.Option("--requests", help="At most this many requests.")]
Seed = Annotated[int, typer.Option(help="Of arrivals and lengths.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write one line per result to this file.")]
Plots = Annotated[Path | None, typer.Option(help="Folder for plots.")]
Overlap = Annotated[bool, typer.Option(help="Send layers while the next ones compute.")]


def make_scenario(
    model: str, gpu: str, prefill_gpu: str | None, decode_gpu: str | None, prefill_tp: int | None,
    decode_tp: int | None, link_gbps: float | None, overlap: bool,
) -> "Scenario":  # fmt: skip
    """The deployment that the options describe. Raises UnsupportedError."""
    from homkv.sim.roofline import Layout
    from homkv.sim.scenario import Scenario

    if link_gbps is not None and not 0 < link_gbps < 1e9:
        raise UnsupportedError(f"expected a link of more than 0 Gb/s, found {link_gbps!r}")
    for name, gpus in (("--prefill-tp", prefill_tp), ("--decode-tp", decode_tp)):
        if gpus is not None and gpus < 1:
            raise UnsupportedError(f"expected {name} of at least one GPU, found {gpus}")
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


@contextmanager
def progress(total: int | None, title: str) -> Iterator[Callable[[str], None]]:
    """A bar that advances with every call; the argument says what comes next."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda text: bar.update(task, advance=1, description=text)


def write_lines(path: Path | None, rows: Iterable[dict[str, Any]]) -> None:
    """JSON Lines, each with the command that made it."""
    if path is None:
        return
    command = shlex.join(["homkv", *sys.argv[1:]])
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({**row, "command": command}) + "\n" for row in rows)


@app.command()
def run(
    model: Model = "llama-3.1-8b",
    gpu: Gpus = "h100",
    prefill_gpu: PrefillGpu = None,
    decode_gpu: DecodeGpu = None,
    prefill_tp: PrefillTp = None,
    decode_tp: DecodeTp = None,
    link_gbps: LinkGbps = None,
    kv_cache_dtype: Formats = None,
    num_prefill: Annotated[int, typer.Option(help="Prefill instances.")] = 1,
    num_decode: Annotated[int, typer.Option(help="Decode instances.")] = 1,
    trace: Trace = None,
    profile: Profile = "long",
    requests_per_s: Rate = None,
    requests: Num = 1000,
    seed: Seed = 0,
    overlap: Overlap = True,
    swap: Annotated[bool, typer.Option(help="KV without room waits in the decode host's memory.")] = False,
    prefix_gb: Annotated[float | None, typer.Option(help="Prefix cache of this size. Default: none.")] = None,
    record: Annotated[Path | None, typer.Option(help="Write a record of every request to this file.")] = None,
    plots: Plots = None,
) -> None:
    """Simulate one deployment in several formats: JCT, TTFT, TPOT and where the time goes."""
    from dataclasses import replace

    from homkv.sim.engine import simulate
    from homkv.sim.report import summary_table
    from homkv.sim.summary import summarize

    if min(num_prefill, num_decode) < 1:
        raise UnsupportedError(f"expected at least one instance of each kind, found {num_prefill} and {num_decode}")
    base = make_scenario(model, gpu, prefill_gpu, decode_gpu, prefill_tp, decode_tp, link_gbps, overlap)
    base = replace(
        base, num_prefill=num_prefill, num_decode=num_decode, when_full="swap" if swap else "wait", prefix_gb=prefix_gb
    )
    work = make_requests(trace, profile, requests_per_s, requests, seed)
    names = kv_cache_dtype or ["fp16", "fp8", "hack", "balanced", "small"]
    outcomes = {}
    for name in names:
        with progress(len(work), name) as advance:
            outcomes[name] = simulate(base.with_format(name).system(), work, partial(_count, advance, name))
    rows = [(name, summarize(outcome)) for name, outcome in outcomes.items()]
    Console().print(summary_table(rows, f"{model}, {base.prefill_gpu} to {base.decode_gpu}, {len(work):,} requests"))
    if record is not None:
        write_runs(record, base, outcomes, seed)
    if plots is not None:
        from homkv.sim.plots import decomposition, save

        bars = {name: {**s.phases_s, "dequantize_s": s.dequantize_s} for name, s in rows}
        _print_paths(save(decomposition(bars, f"{model}: where the time goes"), plots, "sim-run"))


def _count(advance: Callable[[str], None], name: str, done: int) -> None:
    advance(name)


def write_runs(path: Path, base: "Scenario", outcomes: dict[str, Any], seed: int) -> None:
    """A record with one run per format."""
    from homkv.sim.record import RunInfo, write_record

    for index, (name, outcome) in enumerate(outcomes.items()):
        system = base.with_format(name).system()
        info = RunInfo(
            run_id=name,
            source="sim",
            model=base.model,
            kv_cache_dtype=name,
            command=shlex.join(["homkv", *sys.argv[1:]]),
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


def _print_paths(paths: Iterable[Path]) -> None:
    for path in paths:
        print(path)


@app.command()
def paper(
    prefill_gpu: Annotated[list[str] | None, typer.Option(help="Repeat the option. Default: the paper's five.")] = None,
    profile: Annotated[list[str] | None, typer.Option(help="Repeat the option. Default: all.")] = None,
    load: Annotated[list[float] | None, typer.Option(help="Of 16-bit capacity; repeat the option.")] = None,
    requests: Num = 500,
    seed: Seed = 0,
    artifact: Annotated[bool, typer.Option(help="The authors' own two-GPU runs, too.")] = True,
    json_file: JsonFile = None,
    plots: Plots = None,
) -> None:
    """Simulate HACK's experiment (Llama-3.1-70B, five prefill GPUs) beside the numbers that it claims."""
    from homkv.sim import paper as setting
    from homkv.sim.report import ablation_table, artifact_table, claims_table, paper_tables

    gpus, names = prefill_gpu or setting.PREFILL_GPUS, profile or setting.PROFILES
    loads = load or setting.LOADS
    if any(not 0 < x < 100 for x in loads):
        raise UnsupportedError(f"expected loads above 0 of the 16-bit system's capacity, found {loads}")
    console = Console()
    with progress(len(gpus) * len(names) * len(loads) * len(setting.VARIANTS), "") as advance:
        rows = list(setting.run_paper(gpus, names, loads, num_requests=requests, seed=seed, on_run=advance))
    with progress(len(setting.ABLATIONS), "") as advance:
        ablations = list(setting.run_ablations(num_requests=requests, seed=seed, on_run=advance))
    published = []
    if artifact:
        with progress(None, "") as advance:
            published = list(setting.run_artifact(on_run=advance))
        console.print(artifact_table(published))
    for table in [*paper_tables(rows), claims_table(rows), ablation_table(ablations)]:
        console.print(table)
    lines = [row.to_dict() for row in [*rows, *ablations]]
    write_lines(json_file, [*lines, *(row.to_dict() for row in published)])
    if plots is not None:
        _print_paths(_plot_paper(rows, plots))


def _plot_paper(rows: list[Any], folder: Path) -> list[Path]:
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
        title = f"Llama-3.1-70B, {gpu} prefill, {profile}, {load:.0%} of 16-bit capacity"
        files += save(decomposition(bars, title), folder, f"sim-{gpu}-{profile}")
    return files


@app.command()
def whatif(
    model: Model = "llama-3.1-70b",
    gpu: Gpus = "h100",
    prefill_gpu: PrefillGpu = None,
    decode_gpu: DecodeGpu = None,
    prefill_tp: PrefillTp = None,
    decode_tp: DecodeTp = None,
    link_gbps: LinkGbps = None,
    kv_cache_dtype: Formats = None,
    trace: Trace = None,
    profile: Profile = "long",
    requests_per_s: Rate = None,
    requests: Num = 1000,
    seed: Seed = 0,
    overlap: Overlap = True,
    prefill_price: Annotated[float, typer.Option(help="Of a prefill GPU and hour.")] = 1.0,
    decode_price: Annotated[float, typer.Option(help="Of a decode GPU and hour.")] = 1.0,
    min_gain: Annotated[float, typer.Option(help="Less than this of cost or JCT is not worth compressing for.")] = 0.1,
    sweep: Annotated[bool, typer.Option(help="Also over link, rate and prompt length.")] = False,
    json_file: JsonFile = None,
    plots: Plots = None,
) -> None:
    """Say which format, how many instances of either kind, and whether compressing KV is worth it here at all."""
    from homkv.sim import whatif as question
    from homkv.sim.report import option_table

    base = make_scenario(model, gpu, prefill_gpu, decode_gpu, prefill_tp, decode_tp, link_gbps, overlap)
    work = make_requests(trace, profile, requests_per_s, requests, seed)
    if len(work) < 2:
        raise UnsupportedError(f"expected at least two requests, found {len(work)}; give --requests")
    names, prices = tuple(kv_cache_dtype or question.FORMATS), question.Prices(prefill_price, decode_price)
    with progress(len(names), "") as advance:
        options = question.options(base, work, prices, names, advance)
    found, advice = options.found, question.advise(options, min_gain)
    rate, (prompt, output) = question.rate_of(work), question.lengths(work)
    title = f"{model}, {base.prefill_gpu} to {base.decode_gpu}: {rate:.2f} requests/s of {prompt:,} + {output:,} tokens"
    console = Console()
    console.print(option_table(found, advice.best, title))
    best = advice.best
    console.print(f"[bold]{best.format}[/bold], {best.num_prefill} prefill and {best.num_decode} decode instances")
    console.print(advice.reason, highlight=False)
    for name, reason in options.impossible.items():
        console.print(f"{name} cannot serve this: {reason}", highlight=False)
    points: list[question.Point] = []
    if sweep or plots is not None:
        points = list(_sweeps(base, work, prices, names))
    write_lines(json_file, [*(option.to_dict() for option in found), *(point.to_dict() for point in points)])
    if plots is not None:
        _print_paths(_plot_sweeps(points, title, plots))


def _sweeps(base: "Scenario", work: "list[Request]", prices: Any, names: tuple[str, ...]) -> Iterator[Any]:
    """Link speeds and rates in the deployment sized for 16 bits; prompt lengths sized anew."""
    from homkv.sim import whatif as question

    sized = question.size(base.with_format("fp16"), question.rate_of(work), *question.lengths(work))
    with progress(None, "sweeps") as advance:
        advance("link")
        yield from question.sweep_links(sized, work, prices, (1, 2.5, 5, 10, 25, 50, 100, 200, 400), names)
        advance("rate")
        yield from question.sweep_rates(sized, work, prices, (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0), names)
        advance("prompts")
        yield from question.sweep_prompts(base, work, prices, (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536), names)


def _plot_sweeps(points: list[Any], title: str, folder: Path) -> list[Path]:
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


@app.command()
def validate(
    record: Annotated[Path, typer.Argument(help="Record of a real replay, written by `homkv bench jct`.")],
    check: Annotated[bool, typer.Option(help="Exit with 1 if a run misses 10 % of the mean or 20 % of P99.")] = False,
    json_file: JsonFile = None,
    plots: Plots = None,
) -> None:
    """Simulate a real record's requests with its own step times, and compare job completion times."""
    from homkv.sim.plots import agreement, save
    from homkv.sim.report import validation_table
    from homkv.sim.validate import validate as compare

    rows = compare(record)
    Console().print(validation_table(rows))
    write_lines(json_file, [row.to_dict() for row in rows])
    if plots is not None:
        figure = agreement({row.run_id: row.pairs for row in rows}, "Simulated and measured")
        _print_paths(save(figure, plots, "sim-validation"))
    if check and not all(row.holds for row in rows):
        raise typer.Exit(1)
