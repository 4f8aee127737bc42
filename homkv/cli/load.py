"""What ``homkv bench serve`` prints."""

from typing import TYPE_CHECKING

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from homkv.bench.load import LoadResult


def render(result: "LoadResult") -> Group:
    """Latencies as a table; above it what was sent, below it what went wrong and what grew."""
    o = result.options
    arrivals = f"{o.concurrency} streams" if o.rate is None else f"{o.rate:g} requests/s"
    title = f"{arrivals}, {o.prompt_words} words in, {o.max_tokens} tokens out, {result.wall_s:,.1f} s"
    table = Table("", "mean", "p50", "p90", "p99", box=box.SIMPLE_HEAD, title=title)
    for name, values in result.latencies().items():
        table.add_row(name.removesuffix("_s").upper(), *(f"{1e3 * v:,.0f} ms" for v in values.values()))
    errors = ", ".join(f"{count} {why}" for why, count in result.errors.items()) or "none"
    speed = f"{result.tokens_per_s:,.1f} tokens/s"
    lines = [f"{len(result.done)} done, up to {result.max_open} at a time, {speed}, errors: {errors}"]
    for name, value in result.after.items():
        if name in result.before:
            lines.append(f"{name}: {result.before[name]:,.0f} -> {value:,.0f}")
    return Group(table, Text("\n".join(lines)))
