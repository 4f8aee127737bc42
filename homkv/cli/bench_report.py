"""``homkv bench report``: tables and plots of records that were written before."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

if TYPE_CHECKING:
    from homkv.sim.record import Run
    from homkv.sim.validate import CostsOf

TARGET_LOAD = "0.8"  # whose P99 others are held to


def report(
    records: Annotated[list[Path], typer.Argument(help="JSONL of `homkv bench jct`, `homkv bench pd` or `homkv sim`.")],
    markdown: Annotated[bool, typer.Option(help="One table for a page instead.")] = False,
    simulate: Annotated[
        str | None, typer.Option(help="In that table, simulate each run too: from its own `steps`, or a GPU's tables.")
    ] = None,
    plots: Annotated[Path | None, typer.Option(help="Folder for plots.")] = None,
) -> None:
    """Print job completion times that were recorded; what several records say about one case is pooled."""
    from homkv.bench.jct.report import print_report, rates_table
    from homkv.bench.jct.summary import measured, rates_at_p99, tails
    from homkv.sim.record import read_left_out, read_record

    console = Console()
    runs = [run for path in records for run in read_record(path).values()]
    summaries = measured(runs)
    if markdown:
        from homkv.bench.jct.markdown import markdown as lines

        for line in lines(summaries, runs, costs_by(simulate, runs)):
            print(line)
    else:
        print_report(summaries, console)
    if rates := rates_at_p99(tails(summaries), TARGET_LOAD):
        console.print(rates_table(rates, f"that of bf16 at load {TARGET_LOAD}"))
    for left in (left for path in records for left in read_left_out(path)):
        console.print(f"left out: {left.run_id}: {left.reason}", style="yellow", highlight=False, markup=False)
    if plots is not None:
        from homkv.bench.jct.plots import plot

        for file in plot(summaries, plots, records[0].stem, f"{records[0].stem}: job completion time"):
            print(file)


def costs_by(name: str | None, runs: "Sequence[Run]") -> "CostsOf | None":
    """Step times to simulate with. Raises UnsupportedError for an unknown GPU or model."""
    from homkv.sim.fitted import fit
    from homkv.sim.validate import tables

    if name is None or name == "steps" or not runs:
        return fit if name == "steps" else None
    return tables(name, runs[0].info.model.split()[0])  # "llama-3.1-8b (8.03 B random weights)"
