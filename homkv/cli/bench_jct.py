"""``homkv bench jct``: job completion time of replayed requests."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from homkv.cli.bench_pd import overlaps_of
from homkv.errors import ShapeError, UnsupportedError


def jct(
    real: Annotated[bool, typer.Option("--real", help="Replay on this machine; `homkv sim` simulates.")] = False,
    model: Annotated[str, typer.Option(help="smollm2, qwen2.5-coder-0.5b, a folder or a hub name.")] = "smollm2",
    kv_cache_dtype: Annotated[list[str] | None, typer.Option(help="Format; repeat the option.")] = None,
    ablations: Annotated[bool, typer.Option(help="HACK without its eliminations and with other Pi as well.")] = False,
    link_gbps: Annotated[list[float] | None, typer.Option(help="Rate of the link; repeat the option.")] = None,
    trace: Annotated[Path | None, typer.Option(help="Requests from a trace file, instead of --prompt-tokens.")] = None,
    token_scale: Annotated[float, typer.Option(help="Lengths of the trace times this.")] = 1.0,
    requests: Annotated[int, typer.Option(help="Requests per run; the first ones of a trace.")] = 10,
    rate: Annotated[float, typer.Option(help="Arrivals per second, a Poisson process.")] = 0.25,
    prompt_tokens: Annotated[str, typer.Option(help="Range of prompt lengths.")] = "256-768",
    max_new_tokens: Annotated[str, typer.Option(help="Range of answer lengths.")] = "16-48",
    overlap: Annotated[str, typer.Option(help="Layers travel while the next compute: on, off or both.")] = "on",
    repetitions: Annotated[int, typer.Option(help="Turns of every format.")] = 2,
    num_threads: Annotated[int, typer.Option(help="Compute threads of each instance.")] = 1,
    steps: Annotated[bool, typer.Option(help="Time single steps too, for `homkv sim validate`.")] = True,
    budget_s: Annotated[float, typer.Option(help="Seconds for everything; runs beyond it are left out.")] = 3600.0,
    seed: Annotated[int, typer.Option(help="Of lengths and arrivals.")] = 0,
    json_file: Annotated[Path, typer.Option("--json", help="Record to write, JSON Lines.")] = Path("runs/jct.jsonl"),
    plots: Annotated[Path | None, typer.Option(help="Folder for plots.")] = None,
) -> None:
    """Send the same requests at the same times through two processes and a shaped link, once for every format."""
    if not real:
        raise UnsupportedError("expected --real, found none; `homkv sim` predicts job completion times")
    from homkv.bench.jct.run import ABLATIONS, FORMATS, JctOptions, trace_requests, uniform_requests

    chosen = (
        uniform_requests(requests, parse_range(prompt_tokens), parse_range(max_new_tokens), rate, seed)
        if trace is None
        else trace_requests(trace, requests, rate, token_scale, seed)
    )
    formats = tuple(kv_cache_dtype or FORMATS) + (ABLATIONS if ablations else ())
    options = JctOptions(
        tuple(chosen),
        json_file,
        model=model,
        formats=tuple(dict.fromkeys(formats)),
        links=tuple(link_gbps or (0.1, 1.0, 10.0)),
        overlaps=overlaps_of(overlap),
        repetitions=repetitions,
        num_threads=num_threads,
        steps=steps,
        budget_s=budget_s,
        seed=seed,
    )
    from homkv.bench.jct.plots import plot
    from homkv.bench.jct.report import print_report
    from homkv.bench.jct.run import JctBench
    from homkv.bench.jct.summary import summarize

    console = Console()
    bench = JctBench(options, console)
    summaries = summarize(bench.run())
    print_report(summaries, console)
    for line in bench.skipped:
        console.print(f"left out: {line}", style="yellow", highlight=False, markup=False)
    console.print(f"record: {options.record}")
    if plots is not None:
        for path in plot(summaries, plots, "jct", f"{model}, two processes on one machine: job completion time"):
            console.print(str(path))


def parse_range(text: str) -> tuple[int, int]:
    """``LOW-HIGH`` or one number. Raises ShapeError."""
    low, _, high = text.partition("-")
    if not low.strip().isdecimal() or (high and not high.strip().isdecimal()):
        raise ShapeError(f"expected a range like 256-768 or one number, found {text!r}")
    return int(low), int(high or low)
