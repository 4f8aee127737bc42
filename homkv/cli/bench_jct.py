"""``homkv bench jct``: job completion time of replayed requests."""

import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from homkv.cli.bench_pd import given, overlaps_of
from homkv.errors import ShapeError, UnsupportedError

if TYPE_CHECKING:
    from homkv.bench.jct.run import JctOptions


Names = list[str] | None


def jct(
    context: typer.Context,
    real: Annotated[bool, typer.Option("--real", help="Replay on this machine; `homkv sim` simulates.")] = False,
    model: Annotated[str, typer.Option(help="smollm2, qwen2.5-coder-0.5b, a folder or a hub name.")] = "smollm2",
    formats: Annotated[Names, typer.Option("--kv-cache-dtype", help="Format; repeat the option.")] = None,
    ablations: Annotated[bool, typer.Option(help="HACK without its eliminations, with other Pi, as well.")] = False,
    links: Annotated[list[float] | None, typer.Option("--link-gbps", help="Rate of the link; repeat.")] = None,
    trace: Annotated[Path | None, typer.Option(help="Requests of a trace file, instead of --prompt-tokens.")] = None,
    token_scale: Annotated[float, typer.Option(help="Lengths of the trace times this.")] = 1.0,
    answer_scale: Annotated[
        float | None, typer.Option(help="Answers of the trace times this. Default: as prompts.")
    ] = None,
    requests: Annotated[int, typer.Option(help="Requests per run; the first ones of a trace.")] = 10,
    rate: Annotated[float, typer.Option(help="Arrivals per second, a Poisson process.")] = 0.25,
    prompt_tokens: Annotated[str, typer.Option(help="Range of prompt lengths.")] = "256-768",
    max_new_tokens: Annotated[str, typer.Option(help="Range of answer lengths.")] = "16-48",
    overlap: Annotated[str, typer.Option(help="Layers travel while the next compute: on, off or both.")] = "on",
    repetitions: Annotated[int, typer.Option(help="Turns of every format.")] = 2,
    num_threads: Annotated[int, typer.Option(help="Compute threads of each instance.")] = 1,
    steps: Annotated[bool, typer.Option(help="Time single steps too, for `homkv sim validate`.")] = True,
    budget_s: Annotated[float, typer.Option(help="Seconds for everything; runs beyond are left out.")] = 3600.0,
    seed: Annotated[int, typer.Option(help="Of lengths and arrivals.")] = 0,
    record: Annotated[Path, typer.Option("--json", help="Record to write, JSON Lines.")] = Path("runs/jct.jsonl"),
    plots: Annotated[Path | None, typer.Option(help="Folder for plots.")] = None,
) -> None:
    """Send the same requests at the same times through two processes and a shaped link, once for every format."""
    if not real:
        raise UnsupportedError("expected --real, found none; `homkv sim` predicts job completion times")
    show(make_options(given(context)), plots, Console())


def make_options(values: dict[str, Any]) -> "JctOptions":
    """From the command line's values. Raises ShapeError, FormatError, TraceError."""
    from homkv.bench.jct.run import ABLATIONS, FORMATS, JctOptions, trace_requests, uniform_requests

    for name in ("real", "plots"):
        values.pop(name, None)
    trace, tokens, answers = values.pop("trace", None), values.pop("token_scale"), values.pop("answer_scale", None)
    count, rate, seed = values.pop("requests"), values.pop("rate"), values["seed"]
    prompt, output = (parse_range(values.pop(name)) for name in ("prompt_tokens", "max_new_tokens"))
    requests = (
        uniform_requests(count, prompt, output, rate, seed)
        if trace is None
        else trace_requests(trace, count, rate, tokens, seed, answers)
    )
    formats = values.pop("formats", FORMATS) + (ABLATIONS if values.pop("ablations") else ())
    overlaps = overlaps_of(values.pop("overlap"))
    return JctOptions(tuple(requests), formats=tuple(dict.fromkeys(formats)), overlaps=overlaps, **values)


def show(options: "JctOptions", plots: Path | None, console: Console) -> None:
    """Replay and print; what was measured is printed however the run ends."""
    from homkv.bench.jct.report import print_report
    from homkv.bench.jct.run import JctBench
    from homkv.bench.jct.summary import summarize

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `timeout` ends a run as Ctrl-C does
    bench = JctBench(options, console)
    try:
        bench.run()
    finally:
        summaries = summarize(bench.recorded())
        print_report(summaries, console)
        for line in bench.skipped:
            console.print(f"left out: {line}", style="yellow", highlight=False, markup=False)
        console.print(f"record: {options.record}")
    if plots is not None:
        from homkv.bench.jct.plots import plot

        for path in plot(summaries, plots, "jct", f"{options.model}, two processes: job completion time"):
            console.print(str(path))


def parse_range(text: str) -> tuple[int, int]:
    """``LOW-HIGH`` or one number. Raises ShapeError."""
    low, _, high = text.partition("-")
    if not low.strip().isdecimal() or (high and not high.strip().isdecimal()):
        raise ShapeError(f"expected a range like 256-768 or one number, found {text!r}")
    return int(low), int(high or low)
