"""``homkv demo``: prefill and decode as two processes, with 16-bit KV and with pages, side by side."""

import json
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from homkv.spec import DEFAULT_FORMAT

if TYPE_CHECKING:
    from homkv.eval.demo import Comparison, Listener, Run


def demo(
    model: Annotated[str, typer.Option(help="smollm2, qwen2.5-coder-0.5b, a folder or a hub name.")] = "smollm2",
    kv_cache_dtype: Annotated[str, typer.Option(help="Format of the pages; `homkv formats`.")] = DEFAULT_FORMAT,
    link_gbps: Annotated[float, typer.Option(help="Speed of the link between the two processes, Gb/s.")] = 1.0,
    prompt_tokens: Annotated[int, typer.Option(help="Length of the essay in the prompt, tokens.")] = 3000,
    max_new_tokens: Annotated[int, typer.Option(help="Length of the answer, tokens.")] = 64,
    document: Annotated[Path | None, typer.Option(help="A text file instead of the essay.")] = None,
    question: Annotated[str | None, typer.Option(help="A question instead of the demo's.")] = None,
    num_threads: Annotated[int | None, typer.Option(help="Compute threads of each process.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything measured to this file.")] = None,
) -> None:
    """Answer a question about an essay: prefill in one process, decode in another, pages over the wire."""
    from homkv.eval.demo import compare
    from homkv.models import load_tokenizer
    from homkv.serve.client import Client
    from homkv.serve.spawn import InstanceOptions, LocalPair

    console = Console()
    with console.status(f"reading {model}") as status:
        tokenizer = load_tokenizer(model, progress=status.update)
    prompt_ids = _prompt(tokenizer, prompt_tokens, document, question)
    formats = tuple(dict.fromkeys(("fp16", kv_cache_dtype)))
    options = InstanceOptions(
        model, formats, link_gbps, num_threads, max_tokens=len(prompt_ids) + max_new_tokens + 1024
    )
    with ExitStack() as stack:
        progress = stack.enter_context(_progress(console))
        display = Display(progress, max_new_tokens)
        pair = stack.enter_context(LocalPair(options, display.report))
        addresses = pair.addresses
        client = stack.enter_context(Client(addresses["prefill"], addresses["decode"], pair.security))
        result = compare(
            client,
            lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True)),
            prompt_ids,
            model=model,
            kv_cache_dtype=kv_cache_dtype,
            max_new_tokens=max_new_tokens,
            link_gbps=link_gbps,
            listener=display.listener(),
        )
    console.print(render(result))
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(result.to_dict(), indent=1) + "\n")


def _prompt(tokenizer: Any, num_tokens: int, document: Path | None, question: str | None) -> list[int]:
    from homkv.texts import demo_document

    text, asked = demo_document(tokenizer, num_tokens)
    if document is not None:
        text = document.read_text(encoding="utf-8")
    content = f"{text}\n\n{question or asked}"
    if tokenizer.chat_template is None:
        return list(tokenizer.encode(content))
    messages = [{"role": "user", "content": content}]
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))


def _progress(console: Console) -> Progress:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=console, transient=True)


class Display:
    """Progress of both processes and of the three runs."""

    def __init__(self, progress: Progress, max_new_tokens: int) -> None:
        self._progress, self._max_new_tokens = progress, max_new_tokens
        self._instances: dict[str, TaskID] = {}
        self._prefill = progress.add_task("prefill", total=None, visible=False)
        self._decode = progress.add_task("decode", total=None, visible=False)
        self._num_layers = 0

    def report(self, role: str, text: str) -> None:
        """Show what an instance says while it starts."""
        if role not in self._instances:
            self._instances[role] = self._progress.add_task("", total=None)
        finished = text.startswith("ready")
        self._progress.update(
            self._instances[role], description=f"{role} instance: {text}", total=1, completed=finished
        )

    def listener(self) -> "Listener":
        """Callbacks for the runs."""
        from homkv.eval.demo import Listener

        return Listener(self._begin, self._layer, lambda token: self._progress.advance(self._decode))

    def _begin(self, title: str) -> None:
        for task, name in ((self._prefill, "prefill, layers"), (self._decode, "decode, tokens")):
            self._progress.reset(task, description=f"{title}: {name}", visible=True)
        self._progress.update(self._prefill, total=self._num_layers or None)
        self._progress.update(self._decode, total=self._max_new_tokens)

    def _layer(self, layers: int) -> None:
        self._num_layers = max(self._num_layers, layers)
        self._progress.update(self._prefill, completed=layers, total=self._num_layers)


def render(result: "Comparison") -> Columns:
    """Draw the two texts and the one table."""
    name, link = result.compressed.kv_cache_dtype, result.link_gbps
    table = Table(
        box=box.SIMPLE_HEAD,
        title=f"{result.model}, {result.exact.num_prompt_tokens:,} prompt tokens, two processes, {link:g} Gb/s link",
        caption="TTFT phases are what each added to the critical path; in brackets, its own duration, mostly hidden behind "
        "the prefill. KL and top-1: on the exact text, tokens computed by the decode instance.",
    )
    table.add_column("")
    table.add_column("16-bit KV", justify="right")
    table.add_column(name, justify="right", style="bold")
    table.add_column("ratio", justify="right")
    for row in _rows(result):
        table.add_row(*row)
    panels = [Panel(run.text.strip(), title=run.kv_cache_dtype) for run in (result.exact, result.compressed)]
    return Columns([*panels, table], expand=False)


def _rows(result: "Comparison") -> list[tuple[str, str, str, str]]:
    exact, ours, score = result.exact, result.compressed, result.agreement
    rows = [
        ("tokens that agree", f"{len(exact.tokens)}", f"{score.num_equal} of {score.num_tokens}", ""),
        ("KL(exact || compressed), nats", "0", f"{score.kl:.4f}", ""),
        ("top-1 agreement", "1", f"{score.top1:.3f} of {score.num_scored}", ""),
        _bytes("KV of the prompt, raw", exact.raw_kv_bytes, ours.raw_kv_bytes),
        _bytes("KV on the wire", exact.wire_bytes, ours.wire_bytes),
        _bytes("KV held at the end", exact.kv_bytes, ours.kv_bytes),
        ("bits per element, all counted", f"{exact.bits_per_element:.2f}", f"{ours.bits_per_element:.2f}", ""),
        _seconds("TTFT", exact.ttft_s, ours.ttft_s),
    ]
    rows += [(f"  {phase}", _phase(exact, phase), _phase(ours, phase), "") for phase in exact.phases_s]
    return [*rows, _seconds("TPOT", exact.tpot_s, ours.tpot_s)]


def _phase(run: "Run", phase: str) -> str:
    busy = f" ({1e3 * run.busy_s[phase]:,.0f})" if phase in run.busy_s else ""
    return f"{1e3 * run.phases_s[phase]:,.1f}{busy} ms"


def _bytes(name: str, exact: int, ours: int) -> tuple[str, str, str, str]:
    return name, f"{exact / 1e6:,.2f} MB", f"{ours / 1e6:,.2f} MB", f"{exact / ours:.2f}x"


def _seconds(name: str, exact: float, ours: float) -> tuple[str, str, str, str]:
    return name, f"{1e3 * exact:,.1f} ms", f"{1e3 * ours:,.1f} ms", f"{exact / ours:.2f}x"
