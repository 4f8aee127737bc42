"""``homkv bench``: speed, always beside the best alternative measured in the same run."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from homkv.cli.bench_jct import jct
from homkv.cli.bench_pd import pd
from homkv.cli.bench_report import report
from homkv.cli.bench_serve import serve
from homkv.errors import ShapeError, UnsupportedError
from homkv.spec import DEFAULT_FORMAT

app = typer.Typer(help="Measure speed, always beside the best alternative.", no_args_is_help=True)
app.command()(jct)
app.command()(pd)
app.command()(report)
app.command()(serve)

DEVICES = ("auto", "cpu", "cuda")
CPU, GPU = "On the CPU", "On a GPU"


@app.command()
def attention(
    device: Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu or cuda.")] = "auto",
    kv_cache_dtype: Annotated[list[str] | None, typer.Option(help="Rows format; on a GPU also a plan; repeat.")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Sequences; repeat the option.")] = None,
    context: Annotated[list[int] | None, typer.Option(help="Tokens per sequence; repeat the option.")] = None,
    pack: Annotated[bool, typer.Option(help="Measure packing too; on a GPU also prefill and extension.")] = True,
    json_file: Annotated[Path | None, typer.Option("--json", help="Append one line per row to this file.")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer sizes, formats and peers.", rich_help_panel=GPU)
    ] = False,
    peers: Annotated[bool, typer.Option(help="Compressed peers as well as 16-bit ones.", rich_help_panel=GPU)] = True,
    rounds: Annotated[int | None, typer.Option(help="Turns of every candidate.", rich_help_panel=GPU)] = None,
    plots: Annotated[Path | None, typer.Option(help="Folder for plots.", rich_help_panel=GPU)] = None,
    isa: Annotated[str | None, typer.Option(help="Instruction set; default: the best.", rich_help_panel=CPU)] = None,
    repetitions: Annotated[int | None, typer.Option(help="At least this many per row.", rich_help_panel=CPU)] = None,
    max_gib: Annotated[float | None, typer.Option(help="Largest KV of a peer.", rich_help_panel=CPU)] = None,
) -> None:
    """Time decode attention on pages against attention on unpacked keys and values, and packing.

    On a GPU: every 16-bit peer, fp8, two dequantizing kernels, HACK and our formats take turns; times stand beside the
    time it takes to read the cache once. On the CPU: one thread against PyTorch on one thread.
    """
    refuse_empty({"--batch": batch, "--context": context})
    chosen = choose_device(device)
    of_cpu = {"--isa": isa, "--repetitions": repetitions, "--max-gib": max_gib}
    of_gpu = {"--quick": quick, "--no-peers": not peers, "--rounds": rounds, "--plots": plots}
    refuse_foreign(chosen, of_gpu if chosen == "cpu" else of_cpu)
    if chosen == "cpu":
        run_cpu(kv_cache_dtype, batch, context, isa, pack, repetitions or 5, max_gib or 10.0, json_file)
        return
    from dataclasses import replace

    from homkv.bench import gpu

    formats, plans = read_plans(kv_cache_dtype or ())
    options = gpu.make_options(quick=quick, batches=batch, contexts=context, formats=formats, rounds=rounds)
    full = options.full if peers else frozenset()
    gpu.run(replace(options, full=full, plans=plans, rates=pack, record=json_file, plots=plots), Console())


def read_plans(names: Iterable[str]) -> tuple[tuple[str, ...], dict[str, tuple[str, ...]]]:
    """The formats named and those of the layers of plan files, each once; and the layers of each plan."""
    from homkv.plan import LayerPlan

    formats, plans = list[str](), dict[str, tuple[str, ...]]()
    for name in names:
        if name.endswith(".json"):
            plan = LayerPlan.load(name)
            plans[f"homkv plan {plan.name}"] = plan.layers
            formats += plan.layers
        else:
            formats.append(name)
    return tuple(dict.fromkeys(formats)), plans


def refuse_foreign(chosen: str, foreign: Mapping[str, object]) -> None:
    """Raise UnsupportedError if an option of the other device was given."""
    for name, value in foreign.items():
        if value:
            raise UnsupportedError(f"expected options for --device {chosen}, found {name}; leave it out")


def refuse_empty(sizes: Mapping[str, Iterable[int] | None]) -> None:
    """Raise ShapeError for a size below 1."""
    for name, values in sizes.items():
        if any(value < 1 for value in values or ()):
            raise ShapeError(f"expected {name} of at least 1, found {min(values or ())}; choose a larger one")


def choose_device(device: str) -> str:
    """``cpu`` or ``cuda``. Raises UnsupportedError for another name, or for a GPU that is not there."""
    import torch

    if device not in DEVICES:
        raise UnsupportedError(f"expected --device in {DEVICES}, found {device!r}")
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UnsupportedError("expected a CUDA device, found none; use --device cpu")
    return device


def run_cpu(
    formats: list[str] | None,
    batches: list[int] | None,
    contexts: list[int] | None,
    isa: str | None,
    pack: bool,
    repetitions: int,
    max_gib: float,
    record: Path | None,
) -> None:
    """One thread against one thread."""
    from homkv.bench.cpu import CpuBenchOptions, run

    options = CpuBenchOptions(
        batches=tuple(batches or (1, 8)),
        contexts=tuple(contexts or (2048, 32768)),
        formats=tuple(formats or (DEFAULT_FORMAT,)),
        isa=isa,
        pack=pack,
        repetitions=repetitions,
        max_gib=max_gib,
        record=record,
    )
    run(options, Console())


@app.command()
def generate(
    model: Annotated[str, typer.Option(help="Shape of the model; weights are random.")] = "llama-3.1-8b",
    kv_cache_dtype: Annotated[list[str] | None, typer.Option(help="Format, bf16 or fp8; repeat the option.")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Sequences; repeat the option.")] = None,
    context: Annotated[list[int] | None, typer.Option(help="Tokens per sequence; repeat the option.")] = None,
    steps: Annotated[int, typer.Option(help="Tokens that are timed.")] = 64,
    repetitions: Annotated[int, typer.Option(help="Turns of every format.")] = 3,
    seconds: Annotated[float | None, typer.Option(help="After so long no turn is begun.")] = None,
    check_tokens: Annotated[int, typer.Option(help="Prompt of the check with and without graph; 0: none.")] = 4096,
    json_file: Annotated[Path | None, typer.Option("--json", help="Append one line per row to this file.")] = None,
) -> None:
    """Time a whole model's decode steps on a GPU: tokens/s and KV memory against 16-bit and fp8 caches."""
    from homkv.bench.generate import GenerateBenchOptions, run

    refuse_empty({"--batch": batch, "--context": context, "--steps": [steps], "--repetitions": [repetitions]})
    usual = GenerateBenchOptions()
    options = GenerateBenchOptions(
        model=model,
        formats=tuple(kv_cache_dtype or usual.formats),
        batches=tuple(batch or usual.batches),
        contexts=tuple(context or usual.contexts),
        steps=steps,
        repetitions=repetitions,
        seconds=seconds,
        check_tokens=check_tokens,
        record=json_file,
    )
    run(options, Console())


@app.command()
def plot(
    file: Annotated[Path, typer.Argument(help="JSONL of `homkv bench attention --device cuda --json`.")],
    folder: Annotated[Path, typer.Option("--out", help="Folder for PNG and SVG.")] = Path("plots"),
) -> None:
    """Draw stored measurements: time, and fraction of the bandwidth floor, over context."""
    from homkv.bench.plots import plot as draw
    from homkv.bench.plots import read_rows

    for path in draw(read_rows(file), folder):
        print(path)
