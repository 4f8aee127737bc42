"""``homkv calibrate``: a plan that gives each layer of a model its own format."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from homkv.eval.calibrate import Calibration


def calibrate(
    output: Annotated[Path, typer.Option("--output", "-o", help="The plan file to write.")],
    model: Annotated[str, typer.Option(help="smollm2, qwen2.5-coder-0.5b, a folder, a .gguf file or a hub name.")] = (
        "smollm2"
    ),
    budget_bits: Annotated[float, typer.Option(help="Bits per element, everything stored counted.")] = 2.5,
    candidate: Annotated[list[str] | None, typer.Option(help="Rows format to choose from; repeat the option.")] = None,
    texts: Annotated[int, typer.Option(min=1, help="Texts to measure on.")] = 4,
    prefix_pages: Annotated[int, typer.Option(min=1, help="Pages of 64 tokens before the scored tokens.")] = 16,
    scored: Annotated[int, typer.Option(min=1, help="Scored tokens of each text.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Decides which texts.")] = 0,
    context: Annotated[int, typer.Option(min=1, help="Tokens at which bits are counted.")] = 32_768,
    num_threads: Annotated[int | None, typer.Option(min=1, help="Compute threads.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Append the verification to this file.")] = None,
) -> None:
    """Search the format of every layer within a budget of bits; use the plan as --kv-cache-dtype FILE.json."""
    from homkv.eval.calibrate import CANDIDATES, CalibrationOptions
    from homkv.eval.calibrate import calibrate as search
    from homkv.models import load_model

    options = CalibrationOptions(
        budget_bits, tuple(candidate or CANDIDATES), texts, prefix_pages, scored, seed, context
    )
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
        task = progress.add_task("loading", total=None)
        loaded = load_model(
            model, num_threads=num_threads, progress=lambda text: progress.update(task, description=text)
        )

        def begin(what: str, steps: int) -> Callable[[], None]:
            progress.reset(task, total=steps, description=what)
            return lambda: progress.advance(task)

        found = search(loaded, options, begin)
    found.plan.save(output)
    console.print(render(found, texts * scored))
    console.print(f"wrote {output}: use it as --kv-cache-dtype {output}", highlight=False)
    if json_file is not None:
        append(json_file, {"plan": found.plan.title, "options": asdict(options), "verified": found.verified})


def append(file: Path, line: dict[str, object]) -> None:
    """Append one JSON line."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as lines:
        lines.write(json.dumps(line) + "\n")


def render(found: "Calibration", num_tokens: int) -> Table:
    """Draw the verification."""
    table = Table(
        box=box.SIMPLE_HEAD,
        title=f"{found.plan.name}: candidates in all layers, and the plan",
        caption=f"KL(exact || compressed) in nats over {num_tokens} tokens of texts that the plan was not chosen on.",
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("format", style="bold")
    for heading in ("bits", "KL"):
        table.add_column(heading, justify="right")
    for name, bits, kl in found.verified:
        table.add_row(name, f"{bits:.3f}", f"{kl:.4f}", style="green" if name == found.plan.title else "")
    return table
