"""Decode attention on packed pages against torch on unpacked keys and values, one thread against one thread.

Every repetition times each candidate once, in turn, and ratios are taken inside a repetition. The clock is the CPU time
of the calling thread, on which all candidates run: other processes on the machine then cost cache and bandwidth, not
time slices. Peers get their keys and values for free: no unpacking, contiguous ``[B, G, T, D]``.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from homkv.attention import cpu
from homkv.attention.view import LayerView
from homkv.bench.rows import append_rows, command_line
from homkv.errors import UnsupportedError
from homkv.formats.rows import RowsCodec
from homkv.spec import MIN_WINDOW, NUM_SINKS, PAGE_TOKENS, RowsSpec

GIB = 2**30
EXACT_TOKENS = NUM_SINKS + MIN_WINDOW
PREFILL_TOKENS = 2048
PEER_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class HeadShape:
    """Heads of one layer."""

    head_dim: int
    num_q_heads: int
    num_kv_heads: int

    def __str__(self) -> str:
        return f"D={self.head_dim} {self.num_q_heads}/{self.num_kv_heads}"


SMALL_MODEL = HeadShape(64, 9, 3)  # SmolLM2-135M
LARGE_MODEL = HeadShape(128, 32, 8)  # Llama-3-8B, Qwen3-8B


@dataclass(frozen=True)
class CpuBenchOptions:
    """What to measure. Contexts are tokens in pages; sinks and window come on top for homkv."""

    shapes: tuple[HeadShape, ...] = (SMALL_MODEL, LARGE_MODEL)
    batches: tuple[int, ...] = (1, 8)
    contexts: tuple[int, ...] = (2048, 32768)
    formats: tuple[str, ...] = ("balanced",)
    isa: str | None = None  # default: the best
    pack: bool = True  # measure quantize-and-pack too
    repetitions: int = 5  # at least; short calls are repeated for `seconds`
    seconds: float = 2.0  # per row and peer dtype
    max_gib: float = 10.0  # keys and values of one peer; longer rows run that peer with a smaller batch
    record: Path | None = None  # JSONL, appended


Candidates = dict[str, Callable[[], object]]


def run(options: CpuBenchOptions, console: Console) -> list[dict[str, Any]]:
    """Measure, print tables, append JSONL to ``options.record``; returns one dict per row.

    Raises UnsupportedError if the native library is not built.
    """
    cpu.require()
    rows: list[dict[str, Any]] = []
    with one_thread():
        for shape in options.shapes:
            for name in options.formats:
                for batch in options.batches:
                    for context in options.contexts:
                        console.print(f"[dim]{shape}, {name}, batch {batch}, {context} tokens ...[/dim]")
                        rows.append(attention_row(shape, name, batch, context, options))
        if options.pack:
            for shape in options.shapes:
                rows += [
                    pack_row(shape, options.formats[0], tokens, options) for tokens in (PAGE_TOKENS, PREFILL_TOKENS)
                ]
    console.print(attention_table([row for row in rows if row["kind"] == "attention"]))
    if options.pack:
        console.print(pack_table([row for row in rows if row["kind"] == "pack"]))
    append_rows(rows, options.record)
    return rows


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread, and put the setting back."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def measure(candidates: Candidates, repetitions: int, seconds: float) -> dict[str, list[float]]:
    """CPU seconds of every candidate in every repetition. One unmeasured round first."""
    for call in candidates.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    stop = time.perf_counter() + seconds
    while len(next(iter(times.values()))) < repetitions or time.perf_counter() < stop:
        for name, call in candidates.items():
            start = time.thread_time()
            call()
            times[name].append(time.thread_time() - start)
    return times


def paired_ratio(times: list[float], base: list[float]) -> float:
    """Median of the ratios inside a repetition."""
    return statistics.median(a / b for a, b in zip(times, base, strict=True))


def attention_row(shape: HeadShape, name: str, batch: int, context: int, options: CpuBenchOptions) -> dict[str, Any]:
    """One line of the attention table: homkv, torch's four ways, and a read of as many bytes as the pages have."""
    codec = RowsCodec(shape.head_dim, RowsSpec.parse(name))
    row: dict[str, Any] = {
        "kind": "attention",
        **{"shape": str(shape), "format": name, "batch": batch, "context": context},
        "page_bytes_per_token": codec.page_bytes / PAGE_TOKENS,
        "peers": {},
        "ratios": {},
        **machine(options),
    }
    scale = shape.head_dim**-0.5
    for dtype_name, dtype in PEER_DTYPES.items():
        rows = peer_batch(shape, batch, context, dtype, options.max_gib)
        view = make_view(codec, shape, rows, context)
        q = torch.randn(rows, shape.num_q_heads, 1, shape.head_dim)
        words = view.pool.view(torch.int64)

        def attend(q: Tensor = q, view: LayerView = view) -> object:
            return cpu.attend(q, view, codec.layout, codec.order, scale, num_threads=1, isa=options.isa)

        def read(words: Tensor = words) -> object:
            return words.sum()

        candidates: Candidates = {"homkv": attend, "read": read}
        candidates |= peers(q, shape, context, dtype, dtype_name, scale)
        times = measure(candidates, options.repetitions, options.seconds)
        take(row, times, rows)
    best = min(row["ratios"], key=row["ratios"].__getitem__)
    beside = {key: row["peers"][best][key] for key in ("homkv_ms", "read_fraction")}
    return row | {"best_peer": best, "best_ratio": row["ratios"][best], **beside}


def take(row: dict[str, Any], times: dict[str, list[float]], batch: int) -> None:
    """Enter one measurement into the row: every peer with homkv's time beside it, both at ``batch``."""
    base, read = times.pop("homkv"), times.pop("read")
    for name, samples in times.items():
        row["ratios"][name] = paired_ratio(samples, base)
        row["peers"][name] = {
            "ms": statistics.median(samples) * 1e3,
            "homkv_ms": statistics.median(base) * 1e3,
            "read_fraction": paired_ratio(read, base),
            "batch": batch,
            "n": len(samples),
        }


def peer_batch(shape: HeadShape, batch: int, context: int, dtype: torch.dtype, max_gib: float) -> int:
    """Largest batch whose unpacked keys and values stay within ``max_gib`` and half of the free memory."""
    each = 2 * shape.num_kv_heads * context * shape.head_dim * dtype.itemsize
    limit = min(max_gib * GIB, free_bytes() * 0.5)
    if each > limit:
        raise UnsupportedError(
            f"expected room for {each / GIB:.1f} GiB of unpacked keys and values, found {limit / GIB:.1f} GiB; "
            "choose a shorter context or raise --max-gib"
        )
    return min(batch, int(limit // each))


def free_bytes(path: Path = Path("/proc/meminfo")) -> float:
    """Memory that can be taken without swapping; unlimited where the system does not tell."""
    if path.exists():
        for line in path.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return float("inf")


def make_view(codec: RowsCodec, shape: HeadShape, batch: int, context: int) -> LayerView:
    """Random sequences of ``context`` tokens in pages, in random places of the pool, plus sinks and window."""
    pages, distinct = context // PAGE_TOKENS, 8
    k, v = (torch.randn(shape.num_kv_heads, distinct * PAGE_TOKENS, shape.head_dim) for _ in "kv")
    some = cpu.encode(k, v, codec.layout, codec.order)
    pool = some.repeat(-(-batch * pages // distinct), 1, 1)
    exact = torch.randn(batch, shape.num_kv_heads, EXACT_TOKENS, shape.head_dim).to(torch.bfloat16)
    return LayerView(
        pool=pool,
        page_table=torch.randperm(pool.shape[0])[: batch * pages].to(torch.int32).view(batch, pages).contiguous(),
        num_pages=torch.full((batch,), pages, dtype=torch.int32),
        exact_k=exact,
        exact_v=exact.clone(),
        exact_len=torch.full((batch,), EXACT_TOKENS, dtype=torch.int32),
        slots=torch.arange(batch, dtype=torch.int32),
    )


def peers(q: Tensor, shape: HeadShape, context: int, dtype: torch.dtype, name: str, scale: float) -> Candidates:
    """Torch on contiguous unpacked keys and values: SDPA, and matmuls that read them once per kv head."""
    one = torch.randn(1, shape.num_kv_heads, context, shape.head_dim).to(dtype)
    k, v = (one.repeat(q.shape[0], 1, 1, 1) for _ in "kv")
    q = q.to(dtype)
    rows = q.view(q.shape[0], shape.num_kv_heads, -1, shape.head_dim)

    def sdpa() -> object:
        return scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True)

    def matmul() -> object:
        return torch.softmax((rows @ k.transpose(-1, -2)) * scale, -1) @ v

    return {f"sdpa {name}": sdpa, f"matmul {name}": matmul}


def pack_row(shape: HeadShape, name: str, tokens: int, options: CpuBenchOptions) -> dict[str, Any]:
    """Quantize-and-pack of one sequence's tokens against the same arithmetic in eager torch."""
    codec = RowsCodec(shape.head_dim, RowsSpec.parse(name))
    k, v = (torch.randn(shape.num_kv_heads, tokens, shape.head_dim).to(torch.bfloat16) for _ in "kv")
    candidates: Candidates = {
        "homkv": lambda: cpu.encode(k, v, codec.layout, codec.order, num_threads=1, isa=options.isa),
        "torch": lambda: codec.encode(k, v),
    }
    times = measure(candidates, options.repetitions, options.seconds)
    return {
        "kind": "pack",
        **{"shape": str(shape), "format": name, "tokens": tokens},
        "homkv_ms": statistics.median(times["homkv"]) * 1e3,
        "torch_ms": statistics.median(times["torch"]) * 1e3,
        "best_ratio": paired_ratio(times["torch"], times["homkv"]),
        **machine(options),
    }


def machine(options: CpuBenchOptions) -> dict[str, Any]:
    """What a reader needs to judge or repeat the numbers."""
    return {
        "cpu": cpu_model(),
        "isa": options.isa or cpu.best_isa(),
        "torch": torch.__version__,
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "threads": 1,
        "clock": "cpu time of the calling thread",
        "command": command_line(),
        "options": {key: str(value) for key, value in asdict(options).items()},
        "unix_time": int(time.time()),
    }


def cpu_model(path: Path = Path("/proc/cpuinfo")) -> str:
    """Name and family of the processor."""
    fields: dict[str, str] = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    return (
        f"{fields.get('model name', 'unknown')} family {fields.get('cpu family', '?')} model {fields.get('model', '?')}"
    )


def attention_table(rows: list[dict[str, Any]]) -> Table:
    """One block of lines per measurement: homkv, a read of as many bytes, torch's ways from fastest to slowest."""
    table = Table(title="Decode attention, one thread; torch on unpacked keys and values", box=box.SIMPLE_HEAD)
    table.add_column("heads, format, batch x context")
    table.add_column("")
    table.add_column("ms", justify="right")
    table.add_column("times slower", justify="right")
    for row in rows:
        case = f"{row['shape']}, {row['format']}, {row['batch']} x {row['context']:,}"
        table.add_row(case, "homkv", f"{row['homkv_ms']:.2f}", "1.0", style="bold")
        table.add_row("", "read of the pages", "", f"{row['read_fraction']:.2f}")
        for name in sorted(row["ratios"], key=row["ratios"].__getitem__):
            peer = row["peers"][name]
            table.add_row("", f"torch {name}", at_batch(f"{peer['ms']:.2f}", peer, row), f"{row['ratios'][name]:.1f}")
        table.add_section()
    return table


def at_batch(text: str, peer: dict[str, Any], row: dict[str, Any]) -> str:
    """Say so if memory allowed only a smaller batch (for both sides of the ratio)."""
    return text if peer["batch"] == row["batch"] else f"{text} (batch {peer['batch']})"


def pack_table(rows: list[dict[str, Any]]) -> Table:
    """Times of quantize-and-pack."""
    table = Table(title="Quantize and pack, one thread, against the same arithmetic in eager torch")
    for column in ("heads", "format", "tokens", "homkv ms", "torch ms", "times slower"):
        table.add_column(column)
    for row in rows:
        table.add_row(
            *(row["shape"], row["format"], f"{row['tokens']:,}", f"{row['homkv_ms']:.3f}", f"{row['torch_ms']:.1f}"),
            f"[bold]{row['best_ratio']:.0f}[/bold]",
        )
    return table
