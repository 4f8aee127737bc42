"""``homkv calibrate``: a plan that gives each layer of a model its own format."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from homkv.cli.progress import steps

if TYPE_CHECKING:
    from homkv.eval.calibrate import Calibration


def calibrate(
    output: Annotated[Path, typer.Option("--output", "-o", help="The plan file to write.")],
    model: Annotated[str, typer.Option(help="A name of homkv models, a folder, a .gguf file or a hub name.")] = (
        "smollm2"
    ),
    budget_bits: Annotated[float, typer.Option(help="Bits per element, everything stored counted.")] = 2.5,
    candidate: Annotated[list[str] | None, typer.Option(help="Rows format to choose from; repeat the option.")] = None,
    window: Annotated[int | None, typer.Option(help="Shortest exact window of the plan: 64, 128, 192 or 256.")] = None,
    texts: Annotated[int, typer.Option(min=1, help="Texts to measure on.")] = 4,
    prefix_pages: Annotated[int, typer.Option(min=1, help="Pages of 64 tokens before the scored tokens.")] = 16,
    scored: Annotated[int, typer.Option(min=1, help="Scored tokens of each text.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Decides which texts.")] = 0,
    context: Annotated[int, typer.Option(min=1, help="Tokens at which bits are counted.")] = 32_768,
    head_dim: Annotated[
        int | None, typer.Option(help="Channels at which bits are counted; default: the model's.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    impl: Annotated[str | None, typer.Option(help="cpu, triton or reference; default: the device's first.")] = None,
    num_threads: Annotated[int | None, typer.Option(min=1, help="Compute threads.")] = None,
    json_file: Annotated[
        Path, typer.Option("--json", help="Measurements; a search goes on where this file ends.")
    ] = Path("runs/calibrate.jsonl"),
) -> None:
    """Search the format of every layer within a budget of bits; use the plan as --kv-cache-dtype FILE.json."""
    from homkv.eval.calibrate import CANDIDATES, CalibrationOptions, num_cases
    from homkv.eval.calibrate import calibrate as search
    from homkv.models import load_model

    options = CalibrationOptions(
        budget_bits, tuple(candidate or CANDIDATES), window, texts, prefix_pages, scored, seed, context, head_dim
    )
    options.names()  # names that are wrong are said before a model is loaded
    console = Console()
    with steps(console) as progress:
        loaded = load_model(model, device=device, num_threads=num_threads, progress=progress.note)
        progress.start(num_cases(loaded, options))
        found = search(loaded, options, json_file, progress.next, impl)
    found.plan.save(output)
    console.print(render(found, texts * scored))
    console.print(f"wrote {output}: use it as --kv-cache-dtype {output}", highlight=False)


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
