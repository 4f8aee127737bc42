"""``homkv bench pd``: prefill and decode on devices of their own."""

import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from homkv.errors import ShapeError

if TYPE_CHECKING:
    from homkv.bench.pd.options import PdOptions
    from homkv.bench.pd.run import PdBench


def pd(
    devices: Annotated[
        str | None, typer.Option(help="Devices; the first half computes prompts, the second decodes.")
    ] = None,
    prefill: Annotated[list[str] | None, typer.Option(help="Device of a prefill worker; repeat the option.")] = None,
    decode: Annotated[list[str] | None, typer.Option(help="Device of a decode worker; repeat the option.")] = None,
    model: Annotated[str, typer.Option(help="Shape of the model (llama-3.1-8b, tiny); weights are random.")] = (
        "llama-3.1-8b"
    ),
    workload: Annotated[
        list[str] | None, typer.Option(help="Prompts: short 4-6K, long 12-16K, 64k, tiny; repeat the option.")
    ] = None,
    kv_cache_dtype: Annotated[list[str] | None, typer.Option(help="Format, bf16 or fp8; repeat the option.")] = None,
    link: Annotated[
        list[str] | None, typer.Option(help="Gb/s of a shaped TCP link, tcp, or direct (NCCL, gloo); repeat.")
    ] = None,
    load: Annotated[
        list[float] | None, typer.Option(help="Arrivals, as a share of the bf16 baseline's capacity; repeat.")
    ] = None,
    rate: Annotated[float | None, typer.Option(help="Arrivals per second, instead of --load.")] = None,
    overlap: Annotated[str, typer.Option(help="Layers leave while the next compute: on, off or both.")] = "on",
    attention: Annotated[str, typer.Option(help="How prompts attend: exact or int8.")] = "exact",
    requests: Annotated[int, typer.Option(help="Requests per cell.")] = 16,
    slots: Annotated[int, typer.Option(help="Sequences that decode together.")] = 8,
    kv_budget_gib: Annotated[float, typer.Option(help="KV that a decode worker may hold; 0: what the slots need.")] = 0,
    lanes: Annotated[int, typer.Option(help="TCP connections per pair of workers.")] = 4,
    chunk_mib: Annotated[float, typer.Option(help="Bytes that are hashed and paced at a time.")] = 4.0,
    budget_s: Annotated[float, typer.Option(help="Seconds for everything; cells beyond it are left out.")] = 3600.0,
    cell_timeout_s: Annotated[float, typer.Option(help="Seconds for one cell.")] = 300.0,
    calibration_requests: Annotated[int, typer.Option(help="That arrive at once, to see bf16's capacity.")] = 5,
    seed: Annotated[int, typer.Option(help="Of lengths and arrivals.")] = 0,
    json_file: Annotated[Path, typer.Option("--json", help="Record to write, JSON Lines.")] = Path("runs/pd.jsonl"),
    plots: Annotated[Path | None, typer.Option(help="Folder for plots.")] = None,
) -> None:
    """Time requests from arrival to last token: prompts on some devices, decoding on others, KV moving between them.

    Every format gets the same requests at the same times over the same link. One GPU serves as well: name it twice.
    """
    from homkv.bench.pd.options import PdOptions, known_prefill

    prefill_devices, decode_devices = split_devices(devices, prefill, decode)
    usual = PdOptions(prefill_devices, decode_devices, json_file)
    options = PdOptions(
        prefill_devices,
        decode_devices,
        json_file,
        model=model,
        workloads=tuple(workload or usual.workloads),
        formats=tuple(kv_cache_dtype or usual.formats),
        links=tuple(link or usual.links),
        loads=tuple(load or usual.loads),
        overlaps=overlaps_of(overlap),
        prefill=known_prefill(attention),
        requests=requests,
        slots=slots,
        kv_budget_gib=kv_budget_gib,
        rate_rps=rate,
        lanes=lanes,
        chunk_mib=chunk_mib,
        budget_s=budget_s,
        cell_timeout_s=cell_timeout_s,
        calibration_requests=calibration_requests,
        seed=seed,
        plots=plots,
    )
    show(options, Console())


def show(options: "PdOptions", console: Console) -> None:
    """Measure and print; what was measured is printed however the run ends."""
    from homkv.bench.pd.run import PdBench

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `timeout` ends a run as Ctrl-C does
    bench = PdBench(options, console)
    try:
        bench.run()
    finally:
        print_bench(bench, console)


def print_bench(bench: "PdBench", console: Console) -> None:
    """Tables of a bench's record, what was left out, plots."""
    from homkv.bench.jct.report import print_report, rates_table
    from homkv.bench.jct.summary import measured
    from homkv.bench.pd.run import rates_at_p99

    options, summaries = bench.options, measured(bench.recorded())
    print_report(summaries, console)
    target = "0.8" if 0.8 in options.loads else f"{options.loads[0]:g}"
    rates = rates_at_p99(summaries, target)
    if rates:
        console.print(rates_table(rates, f"that of bf16 at load {target}"))
    for line in bench.skipped:
        console.print(f"left out: {line}", style="yellow", highlight=False, markup=False)
    console.print(f"record: {options.record}")
    if options.plots is not None:
        from homkv.bench.jct.plots import plot

        for path in plot(summaries, options.plots, "pd", "Prefill and decode apart: job completion time"):
            console.print(str(path))


def split_devices(
    devices: str | None, prefill: list[str] | None, decode: list[str] | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Devices by role. Raises ShapeError unless they are given in exactly one way."""
    if devices is not None and not prefill and not decode:
        names = [name.strip() for name in devices.split(",") if name.strip()]
        half = (len(names) + 1) // 2
        if len(names) >= 2:
            return tuple(names[:half]), tuple(names[half:])
    elif devices is None and prefill and decode:
        return tuple(prefill), tuple(decode)
    raise ShapeError(
        "expected either --devices with two or more names (cuda:0,cuda:1 or cuda:0,cuda:0) or --prefill and --decode, "
        f"found --devices {devices}, --prefill {prefill}, --decode {decode}"
    )


def overlaps_of(text: str) -> tuple[bool, ...]:
    """Settings that ``--overlap`` names. Raises ShapeError."""
    known = {"on": (True,), "off": (False,), "both": (True, False)}
    if text not in known:
        raise ShapeError(f"expected --overlap {', '.join(known)}, found {text!r}")
    return known[text]
