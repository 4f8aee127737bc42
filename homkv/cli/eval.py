"""``homkv eval``: what formats do to a model, beside their bytes and their speed; and the gate that keeps it so."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from homkv.cli.progress import steps
from homkv.errors import FormatError
from homkv.plan import spelled

if TYPE_CHECKING:
    from homkv.eval.gate import Check
    from homkv.eval.items import Options
    from homkv.eval.record import Record
    from homkv.models import LoadedModel

DEFAULT_FORMATS = ("fp16", "fp8", "int8", "near-lossless", "quality", "balanced", "small", "hack-2026", "hack", "kivi")
SPEED_CONTEXT = 8192  # tokens
RECORD = Path("runs/eval.jsonl")
JSON_HELP = "Results; a run goes on where they end. Repeat: earlier results to report beside the last file's."


Names = list[str] | None


def evaluate(
    context: typer.Context,
    model: Annotated[str, typer.Option(help="A name of homkv models, folder, .gguf file or hub name.")] = "smollm2",
    kv_cache_dtype: Annotated[Names, typer.Option(help="Formats or plan files; repeat the option.")] = None,
    task: Annotated[Names, typer.Option(help="text, passkey, copy, greedy, code; repeat.")] = None,
    text: Annotated[Path | None, typer.Option(help="Measure on this UTF-8 file instead of the essays.")] = None,
    texts: Annotated[int, typer.Option(help="Texts whose tails are scored.")] = 5,
    prefix: Annotated[int, typer.Option(help="Tokens of each text computed exactly.")] = 1792,
    scored: Annotated[int, typer.Option(help="Tokens of each text computed on the stored KV and scored.")] = 256,
    passkeys: Annotated[int, typer.Option(help="Pass-key prompts of each length.")] = 8,
    passkey_length: Annotated[list[int] | None, typer.Option(help="Tokens of a pass-key prompt; repeat.")] = None,
    copies: Annotated[int, typer.Option(help="Lines to copy of each kind.")] = 2,
    greedy: Annotated[int, typer.Option(help="Texts that the exact model continues greedily.")] = 4,
    greedy_tokens: Annotated[int, typer.Option(help="Tokens of each such continuation.")] = 128,
    code: Annotated[int, typer.Option("--problems", help="Problems of HumanEval.")] = 8,
    code_tokens: Annotated[int, typer.Option(help="Tokens written for each problem.")] = 96,
    prefill: Annotated[str, typer.Option(help="exact, or quantized: prompts attend to their own pages.")] = "exact",
    run_code: Annotated[bool, typer.Option("--run-code", help="Run what models write for HumanEval, limited.")] = False,
    bf16: Annotated[bool, typer.Option(help="A row for the whole model in bfloat16.")] = True,
    speed: Annotated[bool, typer.Option(help="Time an attention step of each format.")] = True,
    batch: Annotated[int, typer.Option(help="Texts of one length computed side by side; fewer need less memory.")] = 4,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    impl: Annotated[str | None, typer.Option(help="cpu, triton or reference; default: the format's first.")] = None,
    num_threads: Annotated[int | None, typer.Option(help="Compute threads.")] = None,
    record: Annotated[list[Path] | None, typer.Option("--json", help=JSON_HELP)] = None,
    report: Annotated[Path | None, typer.Option(help="Write a Markdown page here, plots beside it.")] = None,
    only_report: Annotated[bool, typer.Option("--only-report", help="Only report what --json holds.")] = False,
    gate: Annotated[Path | None, typer.Option(help="Measure what this file asks for; exit 1 if it fails.")] = None,
) -> None:
    """Measure formats against the unquantized model: KL, perplexity, top-1, drift, retrieval, copying, code, bytes."""
    console, place, records = Console(), Place(device, impl, num_threads), record or [RECORD]
    if gate is not None:
        _gate(gate, console, place, batch)
        return
    if not only_report:
        names = tuple(dict.fromkeys(map(spelled, kv_cache_dtype or DEFAULT_FORMATS)))
        _measure(model, names, context.params, records[-1], console, place)
    _report(records, report, console)


def _options(given: Mapping[str, Any]) -> "Options":
    """What to measure. Prompts with something to find are about as long as the texts."""
    from homkv.eval.items import Options, read_text

    length = given["prefix"] + min(108, given["scored"])
    amounts = {name: given[name] for name in Options.__dataclass_fields__ if name in given and name != "text"}
    return Options(
        **amounts,
        tasks=tuple(given["task"] or ("text", "passkey", "copy")),
        passkey_lengths=tuple(given["passkey_length"] or (length,)),
        copy_length=length,
        text=None if given["text"] is None else read_text(given["text"]),
    )


@dataclass(frozen=True)
class Place:
    """Where and how models compute."""

    device: str
    impl: str | None
    num_threads: int | None


def _measure(
    model: str, names: tuple[str, ...], given: Mapping[str, Any], path: Path, console: Console, place: Place
) -> None:
    """Measure everything and append it to the record."""
    import torch

    from homkv.eval.items import make_items
    from homkv.eval.jsonl import append_jsonl
    from homkv.eval.record import newest, read_records
    from homkv.eval.run import Conditions, measure_cases
    from homkv.eval.sizes import measure_sizes
    from homkv.models import load_model

    options = _options(given)
    conditions = Conditions(names, given["prefill"], place.impl, given["run_code"], given["bf16"], given["batch"])
    with steps(console) as progress:
        loaded = load_model(model, device=place.device, num_threads=place.num_threads, progress=progress.note)
        items = make_items(loaded.tokenizer, options)
        progress.start(len(items) * len(conditions.rows))
        append_jsonl(path, _run_record(loaded))
        measure_cases(loaded, items, conditions, path, progress.next)
        progress.note("bytes and speed")
        known = newest(read_records(path)).keys()
        ids = torch.tensor(items[0].ids[: items[0].prefix + 1])
        context = min(SPEED_CONTEXT, loaded.context_length) if given["speed"] else None
        for record in measure_sizes(loaded, ids, names, known, impl=place.impl, speed_context=context):
            append_jsonl(path, record)


def _run_record(loaded: "LoadedModel") -> "Record":
    import torch
    import transformers

    from homkv.bench.rows import command_line
    from homkv.eval.record import Run
    from homkv.eval.sizes import machine

    return Run(
        model=loaded.name,
        fingerprint=loaded.fingerprint,
        command=command_line(),
        machine=machine(loaded),
        dtype=str(loaded.model.dtype),
        device=str(loaded.model.device),
        versions=f"torch {torch.__version__}, transformers {transformers.__version__}",
        unix_time=int(time.time()),
        sliding_windows=loaded.sliding_windows,
    )


def _report(paths: Sequence[Path], page: Path | None, console: Console) -> None:
    """Show what the files hold, the last one's where several say something about one case; write the page, its plots
    and the numbers as JSON if asked for."""
    import msgspec

    from homkv.eval.plots import save_plots
    from homkv.eval.record import read_records
    from homkv.eval.report import make_report, markdown, notes, quality_table, rich_table, tables

    records = [record for path in paths for record in read_records(path)]
    found, files = make_report(records), " ".join(f"--json {path}" for path in paths)
    if not found.summaries:
        raise FormatError(f"expected results in {files}, found none; run homkv eval without --only-report first")
    console.print(quality_table(found))
    for table in tables(found):
        console.print(rich_table(*table))
    for note in notes(found):
        console.print(note, style="yellow", highlight=False, markup=False)
    if page is not None:
        plots = save_plots(found, page.parent)
        page.write_text(markdown(found, f"homkv eval --only-report {files} --report {page}", plots), encoding="utf-8")
        page.with_suffix(".json").write_bytes(msgspec.json.format(msgspec.json.encode(found.as_json())))
        console.print(f"wrote {page}", highlight=False)


def _gate(path: Path, console: Console, place: Place, batch: int) -> None:
    """Measure what the gate asks for in a file of its own, and exit with 1 if a threshold is missed."""
    import tempfile

    from homkv.eval.gate import check, load_gate
    from homkv.eval.items import Options, make_items
    from homkv.eval.run import Conditions, measure_cases
    from homkv.eval.summary import summarize
    from homkv.models import load_model

    gate = load_gate(path)
    length = gate.prefix + gate.scored
    options = Options(
        gate.tasks, gate.texts, gate.prefix, gate.scored, gate.passkeys, (length,), gate.copies, copy_length=length
    )
    conditions = Conditions(tuple(gate.formats), impl=place.impl, bf16=False, batch=batch)
    with steps(console) as progress, tempfile.TemporaryDirectory() as folder:
        loaded = load_model(gate.model, device=place.device, num_threads=place.num_threads, progress=progress.note)
        items = make_items(loaded.tokenizer, options)
        progress.start(len(items) * len(conditions.rows))
        cases = measure_cases(loaded, items, conditions, Path(folder) / "gate.jsonl", progress.next)
        checks = check(gate, summarize(cases))
    console.print(gate_table(checks))
    if not all(c.kept for c in checks):
        raise typer.Exit(1)


def gate_table(checks: "Sequence[Check]") -> Table:
    """What was asked for and what was found."""
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("format", "what", "asked", "found", ""):
        table.add_column(heading, justify="left" if heading in ("format", "what") else "right")
    for c in checks:
        style = "green" if c.kept else "bold red"
        table.add_row(c.format, c.what, f"{c.wanted:g}", f"{c.found:.4g}", "kept" if c.kept else "MISSED", style=style)
    return table
