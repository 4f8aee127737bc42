"""``homkv chaos``: faults, and what became of the requests."""

import logging
import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from homkv.eval.chaos.record import Outcome, Plan
    from homkv.eval.chaos.service import Service
    from homkv.testing.faults import Kind

Names = list[str] | None


def chaos(
    faults: Annotated[int, typer.Option(help="How many to inject.", min=1)] = 100,
    seed: Annotated[int, typer.Option(help="From which they follow.")] = 0,
    kinds: Annotated[Names, typer.Option("--kind", help="Kind of fault; repeat the option. Default: all.")] = None,
    services: Annotated[
        Names,
        typer.Option(
            "--service", help="threads, keys or processes; repeat the option. Default: all, see docs/chaos.md."
        ),
    ] = None,
    model: Annotated[str, typer.Option(help="tiny, smollm2, a folder or a hub name.")] = "tiny",
    record: Annotated[Path, typer.Option("--json", help="Record; a run of the same plan goes on.")] = Path(
        "runs/chaos.jsonl"
    ),
) -> None:
    """Inject faults into a running service, compare every answer with an undisturbed one, and count what is left over.

    Exit code 1 if any promise of docs/chaos.md was broken. Ctrl-C keeps what was judged so far.
    """
    from homkv.eval.chaos.cases import SERVICES
    from homkv.eval.chaos.record import Plan
    from homkv.eval.chaos.report import render

    chosen = cast("list[Service]", services or list(SERVICES))
    plan = Plan(model, seed, faults, cast("list[Kind]", kinds or []), chosen)
    console = Console()
    outcomes = inject(plan, record, console)
    console.print(render(outcomes))
    console.print(f"record: {record}", highlight=False)
    if any(outcome.broken for outcome in outcomes):
        raise typer.Exit(1)
    if len(outcomes) < faults:
        raise typer.Exit(130)


def inject(plan: "Plan", record: Path, console: Console) -> "list[Outcome]":
    """Run what of a plan is not in its record yet. Returns everything that was judged, also if interrupted."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    from homkv.bench.jct.run import machine
    from homkv.bench.rows import command_line
    from homkv.eval.chaos.cases import make_cases
    from homkv.eval.chaos.record import Start, read_outcomes
    from homkv.eval.chaos.report import summarize
    from homkv.eval.chaos.run import Workers
    from homkv.eval.chaos.service import open_subject
    from homkv.eval.jsonl import append_jsonl
    from homkv.serve import logs

    logs.configure("chaos", as_json=False, level=logging.CRITICAL)  # what fails here fails on purpose
    disable_progress_bar()  # of a model that is saved
    torch.set_num_threads(1)  # as instances have: logits must not depend on how sums are split
    cases = make_cases(plan.seed, plan.faults, plan.kinds, plan.services)
    outcomes = read_outcomes(record, plan)
    known = {outcome.number for outcome in outcomes}
    load = " ".join(f"{x:.1f}" for x in os.getloadavg())
    append_jsonl(record, Start(plan, command_line(), machine(), load, int(time.time())))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `timeout` ends a run as Ctrl-C does
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        with (
            open_subject(plan.model) as subject,
            Progress(*columns, TimeRemainingColumn(), console=console) as progress,
        ):
            bar = progress.add_task("faults", total=plan.faults, completed=len(known))
            for outcome in Workers([case for case in cases if case.number not in known], subject):
                outcomes.append(outcome)
                append_jsonl(record, outcome)
                progress.update(bar, advance=1, description=outcome.place)
    except KeyboardInterrupt:
        console.print("interrupted; the same command goes on", style="yellow")
    for totals in summarize(outcomes).values():
        for each in totals:
            append_jsonl(record, each)
    return outcomes
