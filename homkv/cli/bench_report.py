"""``homkv bench report``: tables and plots of records that were written before."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def report(
    records: Annotated[list[Path], typer.Argument(help="JSONL of `homkv bench jct`, `homkv bench pd` or `homkv sim`.")],
    plots: Annotated[Path | None, typer.Option(help="Folder for plots.")] = None,
) -> None:
    """Print job completion times that were recorded; what several records say about one case is pooled."""
    from homkv.bench.jct.report import print_report
    from homkv.bench.jct.summary import measured
    from homkv.sim.record import read_record

    summaries = measured(run for path in records for run in read_record(path).values())
    print_report(summaries, Console())
    if plots is not None:
        from homkv.bench.jct.plots import plot

        for file in plot(summaries, plots, records[0].stem, f"{records[0].stem}: job completion time"):
            print(file)
