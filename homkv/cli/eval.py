"""``homkv eval``: what a format does to a model, beside its bytes."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from homkv.plan import spelled

if TYPE_CHECKING:
    from homkv.eval.report import QualityRow

DEFAULT_FORMATS = ["fp16", "near-lossless", "quality", "balanced", "small", "hack-2026", "hack"]


def evaluate(
    model: Annotated[str, typer.Option(help="smollm2, qwen2.5-coder-0.5b, a folder or a hub name.")] = "smollm2",
    kv_cache_dtype: Annotated[list[str] | None, typer.Option(help="Formats to compare; repeat the option.")] = None,
    chunks: Annotated[int, typer.Option(help="Texts.")] = 5,
    prefix: Annotated[int, typer.Option(help="Tokens of each text computed exactly.")] = 1792,
    scored: Annotated[int, typer.Option(help="Tokens of each text computed on the pages and scored.")] = 256,
    passkeys: Annotated[int, typer.Option(help="Pass-key prompts; 0 leaves them out.")] = 8,
    impl: Annotated[str | None, typer.Option(help="cpu or reference; default: the format's first.")] = None,
    num_threads: Annotated[int | None, typer.Option(help="Compute threads.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Append one line per format to this file.")] = None,
) -> None:
    """Measure KL, top-1 and pass-key retrieval of formats against the unquantized model."""
    from homkv.eval.report import QualityOptions, measure
    from homkv.models import load_model

    console = Console()
    formats = tuple(dict.fromkeys(map(spelled, kv_cache_dtype or DEFAULT_FORMATS)))
    options = QualityOptions(formats, chunks, prefix, scored, passkeys, impl=impl)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("loading", total=None)
        loaded = load_model(
            model, num_threads=num_threads, progress=lambda text: progress.update(task, description=text)
        )

        def begin(what: str, steps: int) -> Callable[[], None]:
            progress.reset(task, total=steps, description=what)
            return lambda: progress.advance(task)

        rows = measure(loaded, options, begin)
    console.print(render(rows, options.prefix, options.scored))
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        with json_file.open("a") as file:
            file.writelines(json.dumps(asdict(row)) + "\n" for row in rows)


def render(rows: "list[QualityRow]", prefix: int, scored: int) -> Table:
    """Draw the table."""
    table = Table(
        box=box.SIMPLE_HEAD,
        title=f"{rows[0].model}: exact prefix of {prefix} tokens, then {scored} teacher-forced ones on the stored KV",
        caption=f"KL(exact || compressed) in nats and top-1 agreement over {rows[0].num_tokens} tokens; bits with "
        "sinks, window, scales and centre counted.",
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("format", style="bold")
    for heading in ("KL", "top-1", "pass-key", f"bits, {prefix + scored}", "bits, 32k"):
        table.add_column(heading, justify="right")
    for r in rows:
        table.add_row(
            r.kv_cache_dtype,
            f"{r.kl:.4f}",
            f"{r.top1:.3f}",
            f"{r.passkey_found}/{r.passkey_prompts}" if r.passkey_prompts else "–",
            f"{r.bits_per_element:.2f}",
            f"{r.bits_per_element_32k:.2f}",
        )
    return table
