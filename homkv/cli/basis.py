"""``homkv basis``: calibrate the ``basis`` format for a model."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track

from homkv.errors import ShapeError


def basis(
    model: Annotated[str, typer.Option(help="smollm2, qwen2.5-coder-0.5b, a folder or a hub name.")] = "smollm2",
    texts: Annotated[int, typer.Option(help="Calibration texts, from the end of the essays.")] = 4,
    tokens: Annotated[int, typer.Option(help="Tokens of each text.")] = 1024,
    out: Annotated[Path | None, typer.Option(help="File to write; default: in the cache, by the model.")] = None,
    num_threads: Annotated[int | None, typer.Option(help="Compute threads.")] = None,
) -> None:
    """Calibrate the balanced basis of a model's keys and queries, and say how to use it."""
    from homkv.eval.basis import basis_file, calibrate
    from homkv.models import load_model
    from homkv.texts import essays

    console = Console()
    with console.status("loading") as status:
        loaded = load_model(model, num_threads=num_threads, progress=status.update)
    if texts < 1 or not 6 <= tokens <= loaded.context_length:
        raise ShapeError(
            f"expected at least 1 text of 6 to {loaded.context_length} tokens, found {texts} of {tokens}; 4 of 1024 do"
        )
    ids = loaded.tokenizer(essays()[-texts * tokens * 8 :])["input_ids"][-texts * tokens :]
    parts = [ids[at : at + tokens] for at in range(0, len(ids), tokens)]
    tables = calibrate(loaded, track(parts, "computing", console=console, transient=True))
    path = out or basis_file(loaded)
    path.parent.mkdir(parents=True, exist_ok=True)
    tables.save(path)
    console.print(f"--kv-cache-dtype basis:file={path}", soft_wrap=True, highlight=False)
