"""``homkv bench attention``: attention on pages against the fastest torch call on unpacked keys and values."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from homkv.spec import DEFAULT_FORMAT

app = typer.Typer(help="Measure speed, always beside the best alternative.", no_args_is_help=True)


@app.callback()
def bench() -> None:
    """Keep the commands below as subcommands, however few there are."""


@app.command()
def attention(
    kv_cache_dtype: Annotated[list[str] | None, typer.Option(help="Rows format; repeat the option.")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Sequences; repeat the option.")] = None,
    context: Annotated[list[int] | None, typer.Option(help="Tokens per sequence; repeat the option.")] = None,
    isa: Annotated[str | None, typer.Option(help="Instruction set; default: the best of this machine.")] = None,
    pack: Annotated[bool, typer.Option(help="Measure quantize-and-pack too.")] = True,
    repetitions: Annotated[int, typer.Option(help="At least this many per row.")] = 5,
    max_gib: Annotated[float, typer.Option(help="Largest KV of a peer; beyond it, a smaller batch.")] = 10.0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Append one line per row to this file.")] = None,
) -> None:
    """Time decode attention and packing on the CPU, one thread against one thread."""
    from homkv.bench.cpu import CpuBenchOptions, run

    options = CpuBenchOptions(
        batches=tuple(batch or (1, 8)),
        contexts=tuple(context or (2048, 32768)),
        formats=tuple(kv_cache_dtype or (DEFAULT_FORMAT,)),
        isa=isa,
        pack=pack,
        repetitions=repetitions,
        max_gib=max_gib,
        record=json_file,
    )
    run(options, Console())
