"""``homkv bench pd``: prefill and decode on devices of their own."""

import signal
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from homkv.cli.bench_report import TARGET_LOAD
from homkv.errors import ShapeError

if TYPE_CHECKING:
    from homkv.bench.pd.options import PdOptions
    from homkv.bench.pd.run import PdBench


Names = list[str] | None


def pd(
    context: typer.Context,
    devices: Annotated[
        str | None, typer.Option(help="Devices; the first half computes prompts, the rest decode.")
    ] = None,
    prefill_devices: Annotated[Names, typer.Option("--prefill", help="Device that computes prompts; repeat.")] = None,
    decode_devices: Annotated[Names, typer.Option("--decode", help="Device that decodes; repeat.")] = None,
    model: Annotated[str, typer.Option(help="Shape (llama-3.1-8b, tiny); weights are random.")] = "llama-3.1-8b",
    workloads: Annotated[Names, typer.Option("--workload", help="short 4-6K, long 12-16K, 64k, tiny; repeat.")] = None,
    formats: Annotated[Names, typer.Option("--kv-cache-dtype", help="Format, bf16 or fp8; repeat.")] = None,
    links: Annotated[Names, typer.Option("--link", help="Gb/s of shaped TCP, tcp, direct or nixl; repeat.")] = None,
    loads: Annotated[list[float] | None, typer.Option("--load", help="Share of bf16's capacity; repeat.")] = None,
    rate_rps: Annotated[float | None, typer.Option("--rate", help="Arrivals per second, instead of --load.")] = None,
    overlap: Annotated[str, typer.Option(help="Layers leave while the next compute: on, off or both.")] = "on",
    prefill: Annotated[str, typer.Option("--attention", help="How prompts attend: exact or int8.")] = "exact",
    requests: Annotated[int, typer.Option(help="Requests per cell.")] = 16,
    turns: Annotated[int, typer.Option(help="Turns of all formats of a point.")] = 1,
    slots: Annotated[int, typer.Option(help="Sequences that decode together.")] = 8,
    kv_budget_gib: Annotated[float, typer.Option(help="KV that a decode worker may hold; 0: what slots need.")] = 0,
    lanes: Annotated[int, typer.Option(help="TCP connections per pair of workers.")] = 4,
    chunk_mib: Annotated[float, typer.Option(help="Bytes that are hashed and paced at a time.")] = 4.0,
    budget_s: Annotated[float, typer.Option(help="Seconds for everything; cells beyond are left out.")] = 3600.0,
    cell_timeout_s: Annotated[float, typer.Option(help="Seconds for one cell.")] = 300.0,
    seed: Annotated[int, typer.Option(help="Of lengths and arrivals.")] = 0,
    record: Annotated[Path, typer.Option("--json", help="Record to write, JSON Lines.")] = Path("runs/pd.jsonl"),
    plots: Annotated[Path | None, typer.Option(help="Folder for plots.")] = None,
    plan: Annotated[Path | None, typer.Option(help=r"TOML file of [\[leg]]s, run on the same workers.")] = None,
    estimate: Annotated[str | None, typer.Option(help="Measure nothing: say what each cell takes on this GPU.")] = None,
) -> None:
    """Time requests from arrival to last token: prompts on some devices, decoding on others, KV moving between them.

    Every format gets the same requests at the same times over the same link. One GPU serves as well: name it twice.
    """
    values = given(context)
    for name in ("plan", "estimate"):
        values.pop(name, None)
    options = make_options(values)
    legs = legs_of(plan, options)
    if estimate is None:
        show(options, Console(), legs)
    else:
        show_estimates(legs or [options], estimate, Console())


def given(context: typer.Context) -> dict[str, Any]:
    """Options of a command line by the names of their fields, without those that were left out and have no default."""
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in context.params.items()}
    return {name: value for name, value in values.items() if value not in (None, ())}


def make_options(values: dict[str, Any]) -> "PdOptions":
    """From the command line's values. Raises ShapeError, UnsupportedError, FormatError."""
    from homkv.bench.pd.options import PdOptions, known_prefill

    names = ("devices", "prefill_devices", "decode_devices")
    devices = split_devices(*(values.pop(name, None) for name in names))
    values["overlaps"] = overlaps_of(values.pop("overlap"))
    values["prefill"] = known_prefill(values["prefill"])
    return PdOptions(*devices, **values)


def legs_of(plan: Path | None, options: "PdOptions") -> "list[PdOptions]":
    """What a plan measures; nothing without a plan."""
    from homkv.bench.pd.plan import read_plan

    return [] if plan is None else read_plan(plan, options)


def show(options: "PdOptions", console: Console, legs: "Sequence[PdOptions]" = ()) -> None:
    """Measure and print; what was measured is printed however the run ends."""
    from homkv.bench.pd.run import PdBench

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `timeout` ends a run as Ctrl-C does
    bench = PdBench(options, console, legs)
    try:
        bench.run()
    finally:
        print_bench(bench, console)


def show_estimates(legs: "Sequence[PdOptions]", gpu: str, console: Console) -> None:
    """Print what a run should take, and what it should find."""
    from homkv.bench.jct.report import rates_table
    from homkv.bench.jct.summary import rates_at_p99
    from homkv.bench.pd.estimate import estimates, estimates_table

    rows = list(estimates(legs, gpu))
    console.print(estimates_table(rows))
    target = target_load(legs[0])
    if rates := rates_at_p99([row.tail for row in rows], target):
        console.print(rates_table(rates, f"that of bf16 at load {target}"))


def target_load(leg: "PdOptions") -> str:
    """Whose P99 others are held to: the reports' load, or the first one where that is not measured."""
    return TARGET_LOAD if float(TARGET_LOAD) in leg.loads else f"{leg.loads[0]:g}"


def print_bench(bench: "PdBench", console: Console) -> None:
    """Tables of a bench's record, what was left out, plots."""
    from homkv.bench.jct.report import print_report, rates_table
    from homkv.bench.jct.summary import measured, rates_at_p99, tails

    options, summaries = bench.options, measured(bench.recorded())
    print_report(summaries, console)
    target = target_load(bench.legs[0])
    if rates := rates_at_p99(tails(summaries), target):
        console.print(rates_table(rates, f"that of bf16 at load {target}"))
    for line in bench.skipped:
        console.print(f"left out: {line}", style="yellow", highlight=False, markup=False)
    console.print(f"record: {options.record}")
    if options.plots is not None:
        from homkv.bench.jct.plots import plot

        for path in plot(summaries, options.plots, "pd", "Prefill and decode apart: job completion time"):
            console.print(str(path))


def split_devices(
    devices: str | None, prefill: Sequence[str] | None, decode: Sequence[str] | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Devices by role. Raises ShapeError unless they are given in exactly one way."""
    if devices is not None and not prefill and not decode:
        names = [name.strip() for name in devices.split(",") if name.strip()]
        half = (len(names) + 1) // 2
        if len(names) >= 2:
            return tuple(names[:half]), tuple(names[half:])
    elif devices is None and prefill and decode:
        return tuple(prefill), tuple(decode)
    raise ShapeError(
        "expected either --devices with two or more names (cuda:0,cuda:1 or cuda:0,cuda:0) or --prefill and --decode, "
        f"found --devices {devices}, --prefill {prefill}, --decode {decode}"
    )


def overlaps_of(text: str) -> tuple[bool, ...]:
    """Settings that ``--overlap`` names. Raises ShapeError."""
    known = {"on": (True,), "off": (False,), "both": (True, False)}
    if text not in known:
        raise ShapeError(f"expected --overlap {', '.join(known)}, found {text!r}")
    return known[text]
