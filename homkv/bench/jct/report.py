"""The tables: job completion time beside its parts, ratios to the 16-bit and to the fp8 baseline."""

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from homkv.bench.jct.summary import BASELINES, RateAtP99, Summary, baseline_of, ratio_interval
from homkv.sim.record import PHASES

GIB, MIB = 2**30, 2**20
UP = 1.005  # a ratio from here on is a change


def print_report(summaries: Sequence[Summary], console: Console) -> None:
    """Times and bytes, ratios, decomposition, case by case."""
    if not summaries:
        console.print("nothing was measured", style="yellow")
    for case in dict.fromkeys(s.case for s in summaries):
        members = [s for s in summaries if s.case == case]
        console.print(times_table(case, members))
        console.print(phases_table(members))
        console.print(intervals_table(members))


def times_table(case: str, members: Sequence[Summary]) -> Table:
    """Seconds (TPOT in milliseconds) and bytes per format. ``x bf16``: mean JCT relative to that format's.

    ``link``: what nothing hid. ``MB``: sent per request. ``KV MiB``: the most held at once; ``GiB``: all memory.
    """
    baselines = [name for name in BASELINES if any(s.name == name for s in members)]
    title = f"{case}: {min(len(s.requests) for s in members)} requests"
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("format", no_wrap=True)
    columns = ("JCT", "P50", "P99", "TTFT", "TPOT", "link", "MB", "KV MiB", "GiB", "req/s")
    for column in (*columns, *(f"x {name}" for name in baselines)):
        table.add_column(column, justify="right", no_wrap=True)
    for s in members:
        table.add_row(s.name, *numbers_of(s), *(ratio_text(s, baseline_of(s, members, name)) for name in baselines))
    return table


def numbers_of(s: Summary) -> list[str]:
    """A row's numbers, as text."""
    return [
        f"{s.mean('jct_s'):.2f}",
        f"{s.percentile('jct_s', 50):.2f}",
        f"{s.percentile('jct_s', 99):.2f}",
        f"{s.mean('ttft_s'):.2f}",
        f"{s.mean('tpot_s') * 1e3:.1f}",
        f"{s.mean('transfer_s'):.3f}",
        f"{s.mean('wire_bytes') / 1e6:.1f}",
        f"{s.peak_kv_bytes / MIB:.0f}" if s.peak_kv_bytes > 100 * MIB else f"{s.peak_kv_bytes / MIB:.1f}",
        f"{s.peak_memory_bytes / GIB:.1f}",
        f"{s.throughput_rps:.2f}",
    ]


def ratio_text(s: Summary, baseline: Summary | None) -> str:
    """Mean job completion time relative to a baseline's; slower is coloured."""
    if baseline is None:
        return ""
    ratio = s.mean("jct_s") / baseline.mean("jct_s")
    return f"[red]{ratio:.2f}[/red]" if ratio > UP else f"{ratio:.2f}"


def phases_table(members: Sequence[Summary]) -> Table:
    """Where the time went: mean seconds per request of every phase; how much of decoding restored or corrected."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("of it", no_wrap=True)
    for phase in PHASES:
        table.add_column(phase.removesuffix("_s"), justify="right", no_wrap=True)
    table.add_column("deq.", justify="right", no_wrap=True)
    for s in members:
        extra = "" if s.dequantize_s is None else f"{s.dequantize_s:.3f}"
        table.add_row(s.name, *(f"{seconds:.3f}" for seconds in s.shares().values()), extra)
    return table


def intervals_table(members: Sequence[Summary]) -> Table:
    """How far the ratios can be trusted: 95 % of mean JCT relative to each baseline's (see ratio_interval)."""
    baselines = [s for name in BASELINES for s in members if s.name == name]
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("95 % of", "turns", *(f"x {s.name}" for s in baselines)):
        table.add_column(column, no_wrap=True)
    for s in members:
        cells = [ratio_interval(s, baseline) if s is not baseline else None for baseline in baselines]
        shown = ["" if cell is None else f"{cell[0]:.2f} to {cell[1]:.2f}" for cell in cells]
        table.add_row(s.name, str(len(s.runs)), *shown)
    return table


def rates_table(rates: Sequence[tuple[str, RateAtP99]], target: str) -> Table:
    """Requests per second at equal P99, by case."""
    table = Table(title=f"Requests per second at equal P99: {target}", box=box.SIMPLE_HEAD)
    for column in ("case", "format"):
        table.add_column(column, no_wrap=True)
    for column in ("P99 s", "req/s"):
        table.add_column(column, justify="right", no_wrap=True)
    for case, rate in rates:
        sign = ">= " if rate.is_bound else ""
        table.add_row(case, rate.name, f"{rate.target_s:.2f}", f"{sign}{rate.rate_rps:.2f}")
    return table
