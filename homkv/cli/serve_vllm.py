"""``homkv serve --engine vllm``: stock vLLM with pages as its KV cache, prefill and decode apart, by one command."""

import importlib.util
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from homkv.cores import num_cores
from homkv.errors import UnsupportedError
from homkv.plan import BASE
from homkv.spec import ALL_PRESETS, DEFAULT_FORMAT, RowsSpec
from homkv.vllm.blocks import BlockPlan
from homkv.vllm.launch import Command, Device, Router, ServeOptions, commands

COMMAND = "serve --engine vllm"  # as typed, so that usage and errors name it so
DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
console = Console(soft_wrap=True)


def serve(
    ctx: typer.Context,
    model: Annotated[str, typer.Option(help="smollm2, qwen2.5-coder-0.5b, a folder, a .gguf file or a hub name.")],
    kv_cache_dtype: Annotated[str, typer.Option(help="A rows format; `homkv formats`.")] = DEFAULT_FORMAT,
    dtype: Annotated[str, typer.Option(help="Of weights and exact tokens: bfloat16, float16 or float32.")] = "bfloat16",
    prefill: Annotated[int, typer.Option(min=1, help="Prefill servers.")] = 1,
    decode: Annotated[int, typer.Option(min=0, help="Decode servers; 0: one server that does both.")] = 1,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: cuda if torch finds a GPU.")] = "auto",
    host: Annotated[str, typer.Option(help="Where everything listens.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The router's; servers take the ones behind it.")] = 8000,
    router: Annotated[str, typer.Option(help="vllm-router, proxy (ours), or auto: vllm-router if installed.")] = "auto",
    max_model_len: Annotated[int | None, typer.Option(min=1, help="Longest sequence; default: the model's.")] = None,
    kv_gib: Annotated[int, typer.Option(min=1, help="KV memory of each server on CPUs, in GiB.")] = 4,
    logs: Annotated[Path | None, typer.Option(help="Folder for the servers' output; default: a temporary one.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the commands and start nothing.")] = False,
) -> None:
    """Serve a model with vLLM: prefill and decode servers over NIXL and a router. Options behind -- go to vLLM."""
    folder, head_dim = _inspect(model)
    options = ServeOptions(
        model=folder,
        served_name=model,
        plan=_plan(kv_cache_dtype, head_dim, dtype),
        dtype=dtype,
        device=_device(device),
        router=_router(router),
        num_prefill=prefill,
        num_decode=decode,
        host=host,
        port=port,
        max_model_len=max_model_len,
        kv_gib=kv_gib,
        gpus=_gpus(prefill + decode),
        python="python" if dry_run else sys.executable,
        extra=tuple(ctx.args),
    )
    wanted = commands(options, num_cores())
    if dry_run:
        typer.echo("\n\n".join(f"# {command.name}: {command.url}\n{command.shell()}" for command in wanted))
    else:
        _run(wanted, options, logs)


def routed(args: list[str]) -> list[str]:
    """``serve ... --engine vllm ...`` as the command above, whose options have nothing in common with our engine's."""
    ours = args[: args.index("--")] if "--" in args else args
    if "serve" not in ours[:2] or "--engine" not in ours:
        return args
    at = ours.index("--engine")
    engine = ours[at + 1] if at + 1 < len(ours) else "nothing"
    if engine not in ("homkv", "vllm"):
        raise UnsupportedError(f"expected --engine homkv or vllm, found {engine}")
    rest = args[:at] + args[at + 2 :]
    return [COMMAND if arg == "serve" and engine == "vllm" else arg for arg in rest]


def _run(wanted: list[Command], options: ServeOptions, logs: Path | None) -> None:
    """Start, show where everything listens, and stop in order at a signal."""
    from homkv.vllm.fleet import Fleet

    _require_packages(options)
    _require_gpus(options)
    for number in (signal.SIGINT, signal.SIGTERM):  # shells start background jobs with SIGINT ignored
        signal.signal(number, signal.default_int_handler)
    try:
        with Fleet(wanted, lambda name, text: console.print(f"{name}: {text}", markup=False), logs) as fleet:
            console.print(_endpoints(wanted, options, fleet.logs))
            fleet.wait()
    except KeyboardInterrupt:
        console.print("all servers stopped")


def _endpoints(wanted: list[Command], options: ServeOptions, logs: Path) -> Table:
    table = Table(title=f"{options.served_name} on {options.plan.name}; logs in {logs}")
    for column in ("process", "endpoint", "for"):
        table.add_column(column)
    for command in wanted:
        table.add_row(command.name, command.url, "clients: OpenAI API" if command is wanted[-1] else "the router")
    return table


def _device(name: str) -> Device:
    if name == "auto":
        import torch

        return "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise UnsupportedError(f"expected --device cpu, cuda or auto, found {name!r}")
    return "cuda" if name == "cuda" else "cpu"


def _router(name: str) -> Router:
    if name not in ("auto", "vllm-router", "proxy"):
        raise UnsupportedError(f"expected --router vllm-router, proxy or auto, found {name!r}")
    return "vllm-router" if name == "vllm-router" or (name == "auto" and shutil.which("vllm-router")) else "proxy"


def _plan(kv_cache_dtype: str, head_dim: int, dtype: str) -> BlockPlan:
    if dtype not in DTYPE_BYTES:
        raise UnsupportedError(f"expected --dtype {', '.join(DTYPE_BYTES)}, found {dtype!r}")
    return BlockPlan.of(_rows_format(kv_cache_dtype), head_dim, DTYPE_BYTES[dtype])


def _rows_format(name: str) -> RowsSpec:
    """A format that vLLM's blocks can hold. Raises UnsupportedError for homkv's others, FormatError for no format."""
    from homkv.formats import format_names

    base = name.partition(":")[0]
    if base == BASE or name.endswith(".json"):
        raise UnsupportedError(
            f"expected one format for all layers inside vLLM, whose blocks are equally large, found the per-layer plan "
            f"{name}; name a format, or serve the plan with --engine homkv"
        )
    if base != name or (name in format_names() and name not in ALL_PRESETS):
        raise UnsupportedError(
            f"expected a rows format ({', '.join(ALL_PRESETS)} or kABCDvEFGH[wN]) inside vLLM, found {name}; serve it "
            "with --engine homkv"
        )
    return RowsSpec.parse(name)


def _inspect(model: str) -> tuple[str, int]:
    """Folder or hub name of a model, and its head_dim. Raises UnsupportedError if pages cannot hold its KV."""
    from transformers import AutoConfig

    from homkv.models import find_model
    from homkv.models.describe import refuse_sliding_windows, refuse_unsupported, sliding_windows_of

    source = find_model(model, lambda text: typer.echo(text, err=True))
    config = AutoConfig.from_pretrained(source).get_text_config()
    refuse_unsupported(config, model)
    refuse_sliding_windows(sliding_windows_of(config), model, "vLLM")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return source, int(head_dim)


def _gpus(count: int) -> tuple[str, ...]:
    """The first of the GPUs that this process may use; empty if it may use all, or fewer."""
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return tuple(named[:count]) if len(named) >= count else ()


def _require_gpus(options: ServeOptions) -> None:
    import torch

    needed = options.num_prefill + options.num_decode if options.is_pair else 1
    if options.device == "cuda" and torch.cuda.device_count() < needed:
        raise UnsupportedError(
            f"expected a GPU for each of {needed} servers on this machine, found {torch.cuda.device_count()}; start "
            "fewer, or run the commands that --dry-run prints on several machines"
        )


def _require_packages(options: ServeOptions) -> None:
    missing = [name for name in ("vllm", *(["nixl"] if options.is_pair else [])) if not importlib.util.find_spec(name)]
    if missing:
        raise UnsupportedError(
            f"expected {' and '.join(missing)} in this environment, found nothing; docs/vllm.md says how to install "
            "them, and --dry-run prints the commands for another machine"
        )
