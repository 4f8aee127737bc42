"""``homkv demo``: prefill and decode as two processes, with 16-bit KV and with pages, side by side."""

import json
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console, Group
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from homkv.errors import ShapeError, UnsupportedError
from homkv.plan import spelled
from homkv.spec import DEFAULT_FORMAT

if TYPE_CHECKING:
    from homkv.eval.demo import Comparison, Listener, Run
    from homkv.serve.spawn import InstanceOptions


def demo(
    model: Annotated[str, typer.Option(help="smollm2, qwen2.5-coder-0.5b, a folder or a hub name.")] = "smollm2",
    kv_cache_dtype: Annotated[str, typer.Option(help="Format of the pages; `homkv formats`.")] = DEFAULT_FORMAT,
    link_gbps: Annotated[float, typer.Option(help="Speed of the link between the two processes, Gb/s.")] = 1.0,
    prompt_tokens: Annotated[int, typer.Option(help="Length of the essay in the prompt, tokens.")] = 3000,
    max_new_tokens: Annotated[int, typer.Option(help="Length of the answer, tokens.")] = 64,
    document: Annotated[Path | None, typer.Option(help="A text file instead of the essay.")] = None,
    question: Annotated[str | None, typer.Option(help="A question instead of the demo's.")] = None,
    num_threads: Annotated[int | None, typer.Option(min=1, help="Compute threads of each process.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything measured to this file.")] = None,
) -> None:
    """Answer a question about an essay: prefill in one process, decode in another, pages over the wire."""
    kv_cache_dtype = spelled(kv_cache_dtype)
    _check(kv_cache_dtype, link_gbps, prompt_tokens, max_new_tokens)
    if question is not None and not question.strip():
        raise ShapeError("expected a question, found an empty one; leave --question out for the demo's own")
    text = None if document is None else _read(document)
    if json_file is not None:
        _write(json_file, "")  # a path that cannot be written is an error now, not after the measurement
    from homkv.eval.demo import EXACT
    from homkv.serve.spawn import InstanceOptions

    console = Console()
    tokenizer = _tokenizer(console, model)
    prompt_ids = _prompt(tokenizer, prompt_tokens, text, question)
    options = InstanceOptions(
        model,
        tuple(dict.fromkeys((EXACT, kv_cache_dtype))),
        link_gbps=link_gbps,
        num_threads=num_threads,
        max_tokens=len(prompt_ids) + max_new_tokens + 1024,
        # one chunk, so that transfers hide behind the computation; nothing kept, so that every run computes all of it
        prefill={"chunk_tokens": len(prompt_ids), "prefix_bytes": 0},
        decode={"share_prefixes": False},
    )
    result = _measure(console, options, tokenizer, prompt_ids, kv_cache_dtype, max_new_tokens)
    console.print(render(result))
    if json_file is not None:
        _write(json_file, json.dumps(result.to_dict(), indent=1) + "\n")


def _measure(
    console: Console,
    options: "InstanceOptions",
    tokenizer: Any,
    prompt_ids: list[int],
    kv_cache_dtype: str,
    max_new_tokens: int,
) -> "Comparison":
    """Start both processes, run the comparison and stop them, showing what happens."""
    from homkv.eval.demo import compare
    from homkv.serve.client import Client
    from homkv.serve.spawn import LocalCluster

    with ExitStack() as stack:
        display = Display(stack.enter_context(_progress(console)), max_new_tokens)
        cluster = stack.enter_context(LocalCluster(options, display.report))
        (prefill,), (decode,) = cluster.addresses("prefill"), cluster.addresses("decode")
        client = stack.enter_context(Client(prefill, decode, cluster.security))
        return compare(
            client,
            lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True)),
            prompt_ids,
            model=options.model,
            kv_cache_dtype=kv_cache_dtype,
            max_new_tokens=max_new_tokens,
            link_gbps=options.link_gbps,
            listener=display.listener(),
        )


def _check(kv_cache_dtype: str, link_gbps: float, prompt_tokens: int, max_new_tokens: int) -> None:
    """Raise for what would only fail after both processes had started."""
    if not link_gbps > 0:
        raise ShapeError(f"expected a positive --link-gbps, found {link_gbps}; 1 is the default")
    if prompt_tokens < 1:
        raise ShapeError(f"expected at least one prompt token, found {prompt_tokens}; 3000 takes the whole essay")
    if max_new_tokens < 2:
        raise ShapeError(
            f"expected at least two new tokens, found {max_new_tokens}; the first is computed by the prefill instance "
            "and says nothing about the pages"
        )
    from homkv.serve.engine import serving_codec

    serving_codec(kv_cache_dtype, head_dim=128)  # every format covers it; the model's own is not known yet


def _read(document: Path) -> str:
    try:
        text = document.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UnsupportedError(f"expected a UTF-8 text file, found {document}: {error}; name another") from error
    if not text.strip():
        raise ShapeError(f"expected text in {document}, found none; name another file")
    return text


def _tokenizer(console: Console, model: str) -> Any:
    from homkv.models import load_tokenizer

    with console.status(f"reading {escape(model)}") as status:
        return load_tokenizer(model, progress=status.update)


def _write(file: Path, text: str) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UnsupportedError(f"expected to write {file}, found {error.strerror}; choose another --json") from error


def _prompt(tokenizer: Any, num_tokens: int, document: str | None, question: str | None) -> list[int]:
    from homkv.texts import DEMO_QUESTION, demo_document

    text = demo_document(tokenizer, num_tokens)[0] if document is None else document
    content = f"{text}\n\n{question or DEMO_QUESTION}"
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


def render(result: "Comparison") -> Group:
    """Draw the two answers, and the one table below them."""
    answers = Table.grid(expand=True, padding=(0, 1))
    for _ in range(2):
        answers.add_column(ratio=1)
    answers.add_row(
        *(
            Panel(Text(run.text.strip() or "(no text)"), title=title)
            for title, run in (("16-bit KV", result.exact), (result.compressed.kv_cache_dtype, result.compressed))
        )
    )
    link = "" if result.link_gbps is None else f", {result.link_gbps:g} Gb/s link"
    table = Table(
        box=box.SIMPLE_HEAD,
        title=f"{escape(result.model)}, {result.exact.num_prompt_tokens:,} prompt tokens, two processes{link}",
        caption="TTFT phases: what each added to the critical path; in brackets, its own time, mostly hidden behind "
        "the prefill. KL and top-1: over the exact text, tokens computed by the decode instance.",
        caption_justify="left",
    )
    table.add_column("", no_wrap=True)
    table.add_column("16-bit KV", justify="right", no_wrap=True)
    table.add_column(result.compressed.kv_cache_dtype, justify="right", style="bold", overflow="fold")
    table.add_column("ratio", justify="right", no_wrap=True)
    for row in _rows(result):
        table.add_row(*row)
    return Group(answers, table)


def _rows(result: "Comparison") -> list[tuple[str, str, str, str]]:
    exact, ours, score = result.exact, result.compressed, result.agreement
    rows = [
        ("tokens that agree", f"{len(exact.tokens)}", f"{score.num_equal} of {score.num_tokens}", ""),
        ("KL(exact || ours), nats", "0", f"{score.kl:.4f}", ""),
        ("top-1 agreement", "1", f"{score.top1:.3f} of {score.num_scored}", ""),
        _bytes("KV of the prompt, raw", exact.raw_kv_bytes, ours.raw_kv_bytes),
        _bytes("KV on the wire", exact.wire_bytes, ours.wire_bytes),
        _bytes("KV held at the end", exact.kv_bytes, ours.kv_bytes),
        ("bits per element", f"{exact.bits_per_element:.2f}", f"{ours.bits_per_element:.2f}", ""),
        _seconds("TTFT", exact.ttft_s, ours.ttft_s),
    ]
    rows += [(f"  {phase}", _phase(exact, phase), _phase(ours, phase), "") for phase in exact.phases_s]
    return [*rows, _seconds("TPOT", exact.tpot_s, ours.tpot_s)]


def _phase(run: "Run", phase: str) -> str:
    busy = f"({1e3 * run.busy_s[phase]:,.0f}) " if phase in run.busy_s else ""
    return f"{busy}{1e3 * run.phases_s[phase]:,.1f} ms"


def _bytes(name: str, exact: int, ours: int) -> tuple[str, str, str, str]:
    return name, f"{exact / 1e6:,.2f} MB", f"{ours / 1e6:,.2f} MB", f"{exact / ours:.2f}x"


def _seconds(name: str, exact: float, ours: float) -> tuple[str, str, str, str]:
    return name, f"{1e3 * exact:,.1f} ms", f"{1e3 * ours:,.1f} ms", f"{exact / ours:.2f}x"
