"""``homkv``: one command per file. Heavy imports happen inside the commands, so that ``--help`` is quick."""

import importlib.metadata
import sys
from typing import Annotated

import typer
from rich.console import Console

from homkv.cli import (
    basis,
    bench,
    calibrate,
    chaos,
    demo,
    doctor,
    eval,
    formats,
    keys,
    models,
    serve,
    serve_vllm,
    sim,
    trace,
)
from homkv.errors import HomkvError

app = typer.Typer(
    help="Attention computed directly on a 2-bit KV cache, so that prefill and decode can run on different machines.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("demo")(demo.demo)
app.command("eval")(eval.evaluate)
app.command("basis")(basis.basis)
app.command("calibrate")(calibrate.calibrate)
app.command("chaos")(chaos.chaos)
app.command("formats")(formats.formats)
app.command("doctor")(doctor.doctor)
app.command("trace")(trace.trace)
app.command(
    "serve", context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False
)(serve.serve)
app.command(serve_vllm.COMMAND, hidden=True, context_settings={"allow_extra_args": True})(serve_vllm.serve)
app.add_typer(keys.app, name="keys")
app.add_typer(models.app, name="models")
app.add_typer(bench.app, name="bench")
app.add_typer(sim.app, name="sim")


def say_version(wanted: bool) -> None:
    """Print the installed version, and nothing else."""
    if wanted:
        print(f"homkv {importlib.metadata.version('homkv')}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=say_version, is_eager=True)
    ] = False,
) -> None:
    """Read the options that stand before the command."""


def main() -> None:
    """Run the command line. Exit codes: 0 fine, 1 a check failed, 2 an error with a message, 130 interrupted."""
    args = sorted(sys.argv[1:], key=lambda arg: arg != "--debug")  # --debug may stand anywhere: it goes first
    try:
        app(serve_vllm.routed(args))
    except HomkvError as error:
        if "--debug" in args:
            raise
        message = f"{type(error).__name__}: {error}"
        Console(stderr=True, soft_wrap=True).print(message, style="bold red", markup=False, highlight=False)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
