"""``homkv bench serve``: load on a running service."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console, Group
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from homkv.cli.bench_pd import given

if TYPE_CHECKING:
    from homkv.bench.arrivals import LoadOptions
    from homkv.bench.load import LoadResult, Stream
    from homkv.bench.soak import Sample

ARRIVALS, WATCH = "When requests come", "What is watched"
MIB = 2**20


def serve(
    context: typer.Context,
    url: Annotated[str, typer.Option(help="Where the service is, without /v1.")] = "http://127.0.0.1:8000",
    num_requests: Annotated[int, typer.Option("--requests", min=1, help="Requests in all.")] = 200,
    duration_s: Annotated[float | None, typer.Option(help="Go on for so long instead.")] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Streams at a time.", rich_help_panel=ARRIVALS)] = 200,
    rate: Annotated[
        float | None, typer.Option(help="Requests per second at random times instead.", rich_help_panel=ARRIVALS)
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(help="Trace (homkv, Mooncake, Azure, Vidur) instead.", rich_help_panel=ARRIVALS)
    ] = None,
    speed: Annotated[float, typer.Option(help="So many times faster.", rich_help_panel=ARRIVALS)] = 1.0,
    token_scale: Annotated[float, typer.Option(help="Its lengths times this.", rich_help_panel=ARRIVALS)] = 1.0,
    prompt_words: Annotated[int, typer.Option(min=1, help="Words of a prompt.")] = 60,
    shared_words: Annotated[int, typer.Option(min=0, help="Of them the same in all prompts.")] = 0,
    max_tokens: Annotated[int, typer.Option(min=1, help="New tokens of an answer.")] = 64,
    api_key: Annotated[str | None, typer.Option(help="The service's API key.", envvar="HOMKV_API_KEY")] = None,
    seed: Annotated[int, typer.Option(help="Of prompts and arrivals.")] = 0,
    sample_s: Annotated[
        float | None, typer.Option(help="Look at memory, pages, leases, files so often.", rich_help_panel=WATCH)
    ] = None,
    plots: Annotated[Path | None, typer.Option(help="Folder for a plot of them.", rich_help_panel=WATCH)] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Append samples and result to this file.")] = None,
) -> None:
    """Put a running `homkv serve` under load: TTFT, TPOT and E2EL, errors, growth.

    Exit code 1 after any error, if memory or open files grew, or if pages or leases are still held at the end.
    """
    from homkv.bench.arrivals import LoadOptions

    values = given(context)
    for name in ("plots", "json_file"):
        values.pop(name, None)
    options = LoadOptions(**values)
    result = _run(options, json_file, Console())
    if plots is not None:
        from homkv.bench.soak import save

        for path in save(result.samples, plots):
            print(path)
    if result.errors or result.left_behind() or any(g.grows for g in result.growth()):
        raise typer.Exit(1)


def _run(options: "LoadOptions", json_file: Path | None, console: Console) -> "LoadResult":
    """Send it all under a progress bar; samples are written as they come, so that a broken run leaves them."""
    from homkv.bench.load import Load
    from homkv.bench.rows import append_rows

    def on_end(_: "Stream") -> None:
        progress.advance(task)

    def on_sample(sample: "Sample") -> None:
        if options.sample_s is not None:
            progress.update(task, description=_in_short(sample))
            append_rows([{"kind": "serve-sample"} | asdict(sample)], json_file)

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("streams {task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=None if options.duration_s else options.num_requests)
        result = Load(options, on_end, on_sample).run()
    console.print(render(result))
    append_rows([result.to_dict()], json_file)
    return result


def _in_short(sample: "Sample") -> str:
    memory = sum(v for name, v in sample.values.items() if name.endswith("memory_bytes"))
    pages = sum(v for name, v in sample.values.items() if name.endswith("pages_in_use"))
    return f"· {memory / MIB:,.0f} MiB · {pages:,.0f} pages"


def render(result: "LoadResult") -> Group:
    """Latencies as a table; above it what was sent, below it what went wrong and what the service held."""
    table = Table("", "mean", "p50", "p90", "p99", box=box.SIMPLE_HEAD, title=_title(result))
    for name, values in result.latencies().items():
        table.add_row(name.removesuffix("_s").upper(), *(f"{1e3 * v:,.0f} ms" for v in values.values()))
    errors = ", ".join(f"{count} {why}" for why, count in result.errors.items()) or "none"
    speed = f"{result.tokens_per_s:,.1f} tokens/s"
    lines = [f"{len(result.done)} done, up to {result.max_open} at a time, {speed}, errors: {errors}"]
    lines += [f"still held at rest: {count:,.0f} {name}" for name, count in result.left_behind().items()]
    return Group(table, Text("\n".join(lines)), _resources(result))


def _title(result: "LoadResult") -> str:
    o = result.options
    arrivals = f"{o.concurrency} streams" if o.rate is None else f"{o.rate:g} requests/s"
    if o.trace is not None:
        return f"{o.trace.name}, {result.wall_s:,.1f} s, sent at most {result.late_s:,.2f} s late"
    return f"{arrivals}, {o.prompt_words} words in, {o.max_tokens} tokens out, {result.wall_s:,.1f} s"


def _resources(result: "LoadResult") -> Table:
    """What the service held before and after, and the slope in between where there are enough samples."""
    fits = {g.name: g for g in result.growth()}
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("", overflow="fold")
    for title in ("before", "after", "per hour, 95 %", ""):
        table.add_column(title, justify="right", no_wrap=True)
    before, after = result.samples[0].values, result.samples[-1].values
    for name in [n for n in after if n in before and not n.startswith("streams_")]:
        unit = MIB if name.endswith("_bytes") else 1
        title = name.replace("_bytes", " MiB").replace("_", " ")
        row = [title, f"{before[name] / unit:,.0f}", f"{after[name] / unit:,.0f}"]
        if name in fits:
            fit = fits[name]
            row.append(f"{fit.low / unit:+,.1f} to {fit.high / unit:+,.1f}")
            row.append("[red]grows[/red]" if fit.grows else "steady")
        table.add_row(*row)
    return table
