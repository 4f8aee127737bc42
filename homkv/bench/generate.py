"""End to end: decode tokens/s and KV memory of a model, the same loop on pages, on 16-bit and on fp8 KV.

Weights are random and so is the KV of long contexts: neither changes the time of a step. Every repetition runs every
format once, in turn, and ratios are taken inside a repetition. A step is timed on the GPU over ``steps`` replays; in 64
every sequence seals one page. All formats run the same model code, with RMS norms, RoPE and gated activations as one
kernel each.
"""

import gc
import itertools
import math
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from homkv.attention import api
from homkv.bench.rows import append_rows, command_line
from homkv.bench.static_kv import StaticKV
from homkv.errors import CapacityError, UnsupportedError
from homkv.formats import PageCodec, make_codec
from homkv.generate import Decoder, PagesKV, StepKV
from homkv.generate.fuse import fused_steps
from homkv.generate.loop import attention_of
from homkv.rope import RopeSpec
from homkv.seal import LayerContent

GIB = 2**30
DISTINCT_PAGES = 64  # random pages, repeated
BASE = "bf16"  # what the others are compared with
STATIC = {BASE: torch.bfloat16, "fp8": torch.float8_e4m3fn}  # KV side by side; others are formats of pages
WARM_UP_STEPS = 4  # two plain, the capture, one replay


@dataclass(frozen=True)
class ModelShape:
    """A Llama by its sizes."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    rope_theta: float

    def config(self) -> LlamaConfig:
        """transformers' config."""
        return LlamaConfig(
            num_hidden_layers=self.num_layers,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_attention_heads=self.num_q_heads,
            num_key_value_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            vocab_size=self.vocab_size,
            rope_parameters={"rope_type": "default", "rope_theta": self.rope_theta},
            max_position_embeddings=1 << 18,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )


MODELS = {
    "llama-3.1-8b": ModelShape(32, 4096, 14336, 32, 8, 128, 128256, 5e5),
    # So many layers that 16-bit KV of 8 x 65,536 tokens fits an 80 GB GPU beside the weights, which 32 do not.
    "llama-3.1-8b-28-layers": ModelShape(28, 4096, 14336, 32, 8, 128, 128256, 5e5),
    "llama-3.1-8b-layer": ModelShape(1, 4096, 14336, 32, 8, 128, 128256, 5e5),  # one layer of it: the same kernels
    "tiny": ModelShape(2, 256, 512, 4, 2, 64, 512, 1e4),
}


@dataclass(frozen=True)
class GenerateBenchOptions:
    """What to measure. Formats: rows formats and presets, ``bf16``, ``fp8``."""

    model: str = "llama-3.1-8b"
    formats: tuple[str, ...] = (BASE, "fp8", "balanced", "small")
    batches: tuple[int, ...] = (1, 8, 16)
    contexts: tuple[int, ...] = (32768, 65536, 131072)
    steps: int = 64
    repetitions: int = 3
    seconds: float | None = None  # after so long no repetition is begun
    check_tokens: int = 4096  # prompt of the check that a captured loop gives the plain loop's tokens; 0: none
    record: Path | None = None  # JSONL, appended


Row = dict[str, Any]


def run(options: GenerateBenchOptions, console: Console) -> list[Row]:
    """Measure, print a table, append JSONL to ``options.record``; returns one dict per format, batch and context.

    What the device's memory or ``options.seconds`` does not hold is skipped, and the row says so, with the bytes that
    its KV would take. Raises UnsupportedError without a GPU.
    """
    deadline = time.monotonic() + (options.seconds or math.inf)
    if not torch.cuda.is_available():
        raise UnsupportedError("expected a CUDA device, found none; on a CPU run `homkv bench attention`")
    if options.model not in MODELS:
        raise UnsupportedError(f"expected a model out of {', '.join(MODELS)}, found {options.model!r}")
    shape, device = MODELS[options.model], torch.device("cuda")
    model = random_model(shape, device)
    rows: list[Row] = []
    with attention_of(model), fused_steps(model), torch.no_grad():
        if options.check_tokens:
            rows += keep([check_row(model, shape, name, options) for name in options.formats], options.record)
        for batch, context in cases(options):
            console.print(f"[dim]{options.model}, batch {batch}, {context:,} tokens ...[/dim]")
            rows += keep(case_rows(model, shape, batch, context, options, deadline), options.record)
    console.print(speed_table([row for row in rows if row["kind"] == "generate"]))
    for row in rows:
        if row["kind"] == "generate-check":
            counts = f"{row['equal_tokens']} of {row['tokens']}"
            console.print(f"{row['format']}: {counts} tokens equal with and without graph")
    return rows


def cases(options: GenerateBenchOptions) -> list[tuple[int, int]]:
    """All batches with all contexts, those of fewest tokens first: a run that is cut off lacks the slowest."""
    return sorted(itertools.product(options.batches, options.contexts), key=lambda case: (math.prod(case), case))


def keep(rows: list[Row], record: Path | None) -> list[Row]:
    """Append rows to the record as soon as there are any: a run may be cut off. Gives them back."""
    append_rows(rows, record)
    return rows


def random_model(shape: ModelShape, device: torch.device) -> LlamaForCausalLM:
    """A Llama with random bfloat16 weights, made on the device."""
    with torch.device(device), default_dtype(torch.bfloat16):
        return LlamaForCausalLM(shape.config()).eval()


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make new floating point tensors of this dtype inside the block."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def case_rows(
    model: PreTrainedModel,
    shape: ModelShape,
    batch: int,
    context: int,
    options: GenerateBenchOptions,
    deadline: float,
) -> list[Row]:
    """One batch and context: every format in every repetition, in turn; none is begun behind the deadline."""
    rows = {
        name: base_row("generate", name, options) | {"batch": batch, "context": context} for name in options.formats
    }
    samples: dict[str, list[float]] = {name: [] for name in options.formats}
    for _ in range(options.repetitions):
        if time.monotonic() > deadline:
            break
        for name, row in rows.items():
            if "skipped" in row:
                continue
            with freed_memory():
                try:
                    samples[name].append(time_steps(model, shape, name, batch, context, options.steps, row))
                except (CapacityError, torch.OutOfMemoryError) as error:
                    row["skipped"] = str(error).splitlines()[0][:120]
    for name, row in rows.items():
        if not samples[name]:
            row.setdefault("skipped", f"no time left of {options.seconds} s")
        if "skipped" not in row:
            row["step_ms"] = statistics.median(samples[name])
            row["step_ms_all"] = samples[name]
            row["tokens_per_s"] = batch / row["step_ms"] * 1e3
            if "skipped" not in rows.get(BASE, {"skipped": ""}):
                row["speedup"] = statistics.median(
                    base / own for base, own in zip(samples[BASE], samples[name], strict=True)
                )
    return list(rows.values())


def time_steps(
    model: PreTrainedModel, shape: ModelShape, name: str, batch: int, context: int, steps: int, row: Row
) -> float:
    """Milliseconds per step behind ``context`` tokens; enters memory into the row. Raises CapacityError."""
    torch.cuda.reset_peak_memory_stats()
    room = steps + WARM_UP_STEPS
    row["kv_bytes"], free = kv_bytes(shape, name, batch, context + room), torch.cuda.mem_get_info()[0]
    if row["kv_bytes"] > free:
        raise CapacityError(f"its KV takes {row['kv_bytes'] / GIB:.1f} GiB, {free / GIB:.1f} GiB are free")
    kv = filled_kv(shape, name, batch, context, room, model.device)
    decoder = Decoder(model, kv, max_new_tokens=room)
    first = torch.randint(shape.vocab_size, (batch,), device=kv.device)
    decoder.begin(first, torch.full((batch,), context, device=kv.device))
    for _ in range(WARM_UP_STEPS):
        decoder.step()
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(steps):
        decoder.step()
    stop.record()
    stop.synchronize()
    kv.check()
    row["peak_bytes"] = torch.cuda.max_memory_allocated()
    row["captured"] = decoder.is_captured
    return float(start.elapsed_time(stop)) / steps


def kv_bytes(shape: ModelShape, name: str, batch: int, max_tokens: int) -> int:
    """What :func:`empty_kv` takes for ``batch`` sequences, without taking it."""
    heads = batch * shape.num_kv_heads
    if name in STATIC:
        return heads * shape.num_layers * 2 * max_tokens * shape.head_dim * STATIC[name].itemsize
    codec = codec_of(shape, name)
    exact = 2 * (codec.num_sinks + codec.max_window) * codec.head_dim * torch.bfloat16.itemsize
    page_bytes = sum(codec.at_layer(n, shape.num_layers).page_bytes for n in range(shape.num_layers))
    return heads * (codec.num_pages(max_tokens) * page_bytes + shape.num_layers * exact)


def filled_kv(shape: ModelShape, name: str, batch: int, context: int, room: int, device: torch.device) -> StepKV:
    """KV of ``batch`` sequences that hold ``context`` random tokens, with room for more. Raises CapacityError."""
    kv = empty_kv(shape, name, [context + room] * batch, device)
    if isinstance(kv, StaticKV):
        kv.fill(context)
    else:
        assert isinstance(kv, PagesKV)
        fill_pages(kv, context)
    return kv


def empty_kv(shape: ModelShape, name: str, max_tokens: list[int], device: torch.device) -> StepKV:
    """KV of a format with room for ``max_tokens`` per sequence."""
    common: dict[str, Any] = {"num_layers": shape.num_layers, "num_kv_heads": shape.num_kv_heads, "device": device}
    if name in STATIC:
        from homkv.bench.peers import fp8, fp16
        from homkv.bench.peers.store import store_token

        attend = fp8.attend if name == "fp8" else lambda q, k, v, n, scale, *_: fp16.attend(q, k, v, n, scale)
        return StaticKV(
            len(max_tokens),
            max(max_tokens),
            head_dim=shape.head_dim,
            dtype=STATIC[name],
            attend=attend,
            store=store_token,
            **common,
        )
    codec = codec_of(shape, name)
    return PagesKV.reserve(codec, max_tokens, exact_dtype=torch.bfloat16, impl="triton", **common)


def codec_of(shape: ModelShape, name: str) -> PageCodec:
    """A rows format in the order of the model's RoPE."""
    inv_freq = tuple(shape.rope_theta ** (-2 * p / shape.head_dim) for p in range(shape.head_dim // 2))
    return make_codec(name, shape.head_dim, RopeSpec(shape.head_dim, shape.head_dim, "half", inv_freq))


def fill_pages(kv: PagesKV, num_tokens: int) -> None:
    """Let every sequence hold ``num_tokens`` standard normal keys and values, some pages repeated."""
    cache = kv.cache
    codec, heads = cache.codec, cache.num_kv_heads

    def normal(count: int) -> Tensor:
        return torch.randn(heads, count, codec.head_dim, device=cache.device).to(cache.exact_dtype)

    count = DISTINCT_PAGES * codec.page_tokens
    some = api.encode(codec, normal(count), normal(count), impl=cache.impl)
    pages = some[torch.arange(codec.num_pages(num_tokens), device=cache.device) % DISTINCT_PAGES]
    exact = codec.num_exact(num_tokens)
    content = LayerContent(num_tokens, pages, normal(exact), normal(exact))
    for seq_id in kv.seq_ids:
        for layer in range(cache.num_layers):
            cache.load_layer(layer, seq_id, content)


def check_row(model: PreTrainedModel, shape: ModelShape, name: str, options: GenerateBenchOptions) -> Row:
    """Tokens of a captured and of a plain loop behind the same real prompts."""
    generator = torch.Generator("cuda").manual_seed(0)
    lengths = [options.check_tokens, options.check_tokens // 2 + 1]
    prompts = [torch.randint(shape.vocab_size, (n,), generator=generator, device="cuda") for n in lengths]

    def tokens(capture: bool) -> Tensor:
        kv = empty_kv(shape, name, [n + options.steps for n in lengths], model.device)
        decoder = Decoder(model, kv, max_new_tokens=options.steps, capture=capture)
        decoder.prefill(prompts)
        return decoder.run()

    runs = []
    for capture in (True, False):
        with freed_memory():
            runs.append(tokens(capture))
    equal = int((runs[0] == runs[1]).sum())
    return base_row("generate-check", name, options) | {"equal_tokens": equal, "tokens": runs[0].numel()}


@contextmanager
def freed_memory() -> Iterator[None]:
    """Give the device's memory back when the block's tensors and graphs are gone."""
    try:
        yield
    finally:
        gc.collect()
        torch.cuda.empty_cache()


def base_row(kind: str, name: str, options: GenerateBenchOptions) -> Row:
    """What a reader needs to judge or repeat a number."""
    return {
        "kind": kind,
        "model": options.model,
        "format": name,
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "command": command_line(),
        "options": {key: str(value) for key, value in asdict(options).items()},
        "unix_time": int(time.time()),
    }


def speed_table(rows: list[Row]) -> Table:
    """One block of lines per batch and context."""
    table = Table(title="Decode in one process, one CUDA graph per step; random weights and KV", box=box.SIMPLE_HEAD)
    for column in ("batch x context", "KV"):
        table.add_column(column)
    for column in ("KV GiB", "peak GiB", "ms / step", "tokens / s", f"x {BASE}"):
        table.add_column(column, justify="right")
    before = None
    for row in rows:
        case = f"{row['batch']} x {row['context']:,}"
        if case != before and before is not None:
            table.add_section()
        if "skipped" in row:
            table.add_row("" if case == before else case, row["format"], "skipped: " + row["skipped"])
        else:
            numbers = [f"{row['kv_bytes'] / GIB:.2f}", f"{row['peak_bytes'] / GIB:.1f}", f"{row['step_ms']:.2f}"]
            numbers += [f"{row['tokens_per_s']:.0f}", f"{row['speedup']:.2f}" if "speedup" in row else ""]
            table.add_row("" if case == before else case, row["format"], *numbers)
        before = case
    return table
