"""``homkv doctor``: is everything here that the demo needs, and if not, what to do; or what bounds a service."""

import importlib.metadata
import json
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from homkv.cli.doctor_url import examine

# Instruction sets that matter to integer dot products, by their names in /proc/cpuinfo (x86 and Arm).
ISA_FLAGS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "amx_int8", "asimddp", "i8mm", "sve")
LIBRARIES = ("torch", "transformers", "numpy", "pyzmq", "msgspec", "xxhash", "safetensors", "gguf", "accelerate")
COMPILERS = ("c++", "g++", "clang++")
SERVICE = "A running service"


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    name: str
    ok: bool
    detail: str
    remedy: str = ""  # a command or a sentence; empty if ok
    required: bool = True  # by `homkv demo`


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of the table.")] = False,
    url: Annotated[str | None, typer.Option(help="A running service, without /v1.", rich_help_panel=SERVICE)] = None,
    over_s: Annotated[
        float | None, typer.Option(help="Look at what ends in so many seconds only.", rich_help_panel=SERVICE)
    ] = None,
    link_gbps: Annotated[
        float | None, typer.Option(help="Rate of its link; else as it was seen.", rich_help_panel=SERVICE)
    ] = None,
    api_key: Annotated[
        str | None, typer.Option(help="Its API key.", envvar="HOMKV_API_KEY", rich_help_panel=SERVICE)
    ] = None,
) -> None:
    """Check that everything `homkv demo` needs is here. Exit code 1 if something is missing.

    With --url: say which of queue, prefill, link and decode bounds that service, and whether compression helps there.
    """
    if url is not None:
        examine(url, api_key, over_s, link_gbps, as_json)
        return
    checks = [*check_python(), *check_machine(), *check_kernel(), *check_data(), *check_wire()]
    if as_json:
        print(json.dumps([asdict(check) for check in checks], indent=1))
    else:
        Console().print(render(checks))
    if any(check.required and not check.ok for check in checks):
        raise typer.Exit(1)


def check_python() -> Iterator[Check]:
    """Python and the libraries."""
    yield Check(
        "python",
        sys.version_info >= (3, 11),
        platform.python_version(),
        "install Python 3.11 or newer, then `make demo`",
    )
    for name in LIBRARIES:
        try:
            yield Check(name, True, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            yield Check(name, False, "not installed", f"pip install {name}")


def check_machine() -> Iterator[Check]:
    """Processor, threads and compiler."""
    import torch  # seconds: not before it is needed

    model, flags = read_cpuinfo()
    yield Check("cpu", True, f"{model}; {', '.join(flag for flag in ISA_FLAGS if flag in flags) or platform.machine()}")
    yield Check("threads", True, f"{torch.get_num_threads()} of torch, {os.cpu_count()} cores")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none; not needed"
    yield Check("gpu", True, gpu, required=False)
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, COMPILERS)), "")
    remedy = "install a C++ compiler, for example: apt-get install g++"
    yield Check("compiler", bool(compiler), compiler or "not found", remedy, required=False)


def read_cpuinfo(path: Path = Path("/proc/cpuinfo")) -> tuple[str, set[str]]:
    """Model name and flags of the first processor; platform's guess where there is no such file."""
    fields: dict[str, str] = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    name = fields.get("model name") or platform.processor() or platform.machine()
    return name, set((fields.get("flags") or fields.get("Features") or "").split())


def check_kernel() -> Iterator[Check]:
    """The native attention kernel."""
    from homkv.attention import cpu

    built = cpu.is_available()
    detail = f"built for {', '.join(cpu.available_isas())}; uses {cpu.best_isa()}" if built else "not built"
    yield Check("kernel", built, detail, "install a C++ compiler, then: pip install --force-reinstall --no-deps -e .")


def check_data() -> Iterator[Check]:
    """Models and texts."""
    from homkv import texts
    from homkv.models import BUNDLES, cache_root
    from homkv.models.bundles import SMOLLM2
    from homkv.models.fetch import is_here

    for bundle in BUNDLES.values():
        missing = [] if is_here(bundle) else bundle.missing()
        detail = (
            f"not installed: {', '.join(missing)}"
            if missing
            else f"version {bundle.version}, {len(bundle.parts)} package(s)"
        )
        yield Check(f"model {bundle.name}", not missing, detail, bundle.pip_command, required=bundle is SMOLLM2)
    missing = texts.missing()
    detail = f"not installed: {', '.join(missing)}" if missing else f"{texts.PACKAGE} {texts.VERSION}"
    yield Check("essays", not missing, detail, texts.PIP_COMMAND)
    root = cache_root()
    existing = next(folder for folder in (root, *root.parents) if folder.exists())
    free_gb = shutil.disk_usage(existing).free / 1e9
    yield Check(
        "cache",
        os.access(existing, os.W_OK) and free_gb > 1,
        f"{root}, {free_gb:.0f} GB free",
        "set HOMKV_CACHE to a folder you may write to, with 1 GB free",
    )


def check_wire() -> Iterator[Check]:
    """Encryption of the wire."""
    try:
        import zmq
    except ImportError:
        return  # reported as a missing library
    remedy = "pip install --force-reinstall pyzmq (its wheels contain CURVE)"
    yield Check("curve", bool(zmq.has("curve")), f"libzmq {zmq.zmq_version()}", remedy)


def render(checks: list[Check]) -> Table:
    """Draw the report: one line per check, the remedy under what is missing."""
    table = Table(box=box.SIMPLE_HEAD, show_header=False)
    table.add_column(style="bold")
    table.add_column()
    table.add_column(overflow="fold")
    for check in checks:
        if check.ok:
            table.add_row(check.name, "[green]ok[/green]", check.detail)
        else:
            word = "[red]missing[/red]" if check.required else "[yellow]missing (optional)[/yellow]"
            table.add_row(check.name, word, f"{check.detail}\n[cyan]{check.remedy}[/cyan]")
    return table
