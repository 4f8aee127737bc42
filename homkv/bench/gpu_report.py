"""Tables of the GPU benchmark, readable at 80 columns."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

Row = Mapping[str, Any]


def print_report(rows: list[dict[str, Any]], console: Console) -> None:
    """Everything that was measured, then what was not and why."""
    console.print(decode_table([row for row in rows if row["kind"] == "decode" and row["status"] == "ok"]))
    fits = [row for row in rows if row["kind"] == "fit"]
    if fits:
        console.print(fit_table(fits))
    rates = [row for row in rows if row["kind"] in ("pack", "prefill", "extend") and row["status"] == "ok"]
    if rates:
        console.print(rate_table(rates))
    for line in problems(rows):
        console.print(line, style="yellow", highlight=False)


def grouped(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows by case, in order."""
    out: dict[str, list[Row]] = {}
    for row in rows:
        out.setdefault(f"{row['shape']}, {row['batch']} x {row['context']:,}", []).append(row)
    return out


def decode_table(rows: Sequence[Row]) -> Table:
    """One block per case, fastest first.

    ``x fp16``: times faster than the fastest 16-bit peer. ``slower``: times slower than the fastest format of ours.
    """
    stream = max((row.get("stream_tbps", 0.0) for row in rows), default=0.0)
    title = f"Decode attention, us per layer; the fastest read stream was {stream:.2f} TB/s"
    table = Table(title=title, box=box.SIMPLE_HEAD)
    table.add_column("heads, batch x context", no_wrap=True)
    for column in ("us", "±", "TB/s", "of floor", "x fp16", "slower"):
        table.add_column(column, justify="right", no_wrap=True)
    for case, members in grouped(rows).items():
        table.add_row(case, style="bold")
        ours = min((row for row in members if is_ours(row)), key=lambda row: float(row["us"]), default=None)
        for row in sorted(members, key=lambda row: float(row["us"])):
            ratio = row["ratio_to_fp16"]
            table.add_row(
                f"  {row['candidate']}",
                *(f"{row['us']:.1f}", f"{row['spread']:.1%}", f"{row['tbps']:.2f}", f"{row['floor_fraction']:.0%}"),
                "" if ratio is None else f"{ratio:.2f}",
                "" if ours is None or is_ours(row) else f"{ours['ratios'][row['candidate']]:.2f}",
                style="green" if is_ours(row) else None,
            )
        table.add_section()
    return table


def is_ours(row: Row) -> bool:
    """Whether the row is a format of ours, computed on by our kernels."""
    return str(row["candidate"]).startswith("homkv")


def fit_table(rows: Sequence[Row]) -> Table:
    """Fixed cost and marginal rate over contexts."""
    table = Table(title="us = fixed + bytes / rate, over contexts", box=box.SIMPLE_HEAD)
    for column in ("heads", "batch", "candidate"):
        table.add_column(column, no_wrap=True)
    table.add_column("fixed us", justify="right")
    table.add_column("TB/s", justify="right")
    for row in rows:
        table.add_row(
            row["shape"], str(row["batch"]), row["candidate"], f"{row['fixed_us']:.1f}", f"{row['marginal_tbps']:.2f}"
        )
    return table


def rate_table(rows: Sequence[Row]) -> Table:
    """Packing in TB/s, prefill and extension in TOP/s, with the times beside."""
    table = Table(title="Packing (bytes read and written), prefill and extension", box=box.SIMPLE_HEAD)
    for column in ("what", "size", "candidate"):
        table.add_column(column, no_wrap=True)
    for column in ("us", "±", "rate"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        unit = "TB/s" if row["kind"] == "pack" else "TOP/s"
        rate = f"{row['rate']:.2f}" if row["kind"] == "pack" else f"{row['rate']:.0f}"
        table.add_row(
            row["kind"], row["size"], row["candidate"], f"{row['us']:.1f}", f"{row['spread']:.1%}", f"{rate} {unit}"
        )
    return table


def problems(rows: Sequence[Row]) -> list[str]:
    """One line for everything that failed or was skipped."""
    lines = []
    for row in rows:
        if row.get("status", "ok") != "ok":
            where = f"{row['kind']} {row['shape']}"
            if row["kind"] == "decode":
                where += f", {row['batch']} x {row['context']:,}"
            lines.append(f"{row['status']}: {row['candidate']} ({where}): {row['reason']}")
    return lines
