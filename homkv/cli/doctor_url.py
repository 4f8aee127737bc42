"""``homkv doctor --url``: what bounds a running service, and whether compressing KV helps it."""

import json
import time
from dataclasses import asdict
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from homkv.cli.trace import COLOURS, printable
from homkv.serve.units import duration

if TYPE_CHECKING:
    from homkv.serve.diagnose import Compression, Diagnosis

BAR = 24


def examine(url: str, api_key: str | None, over_s: float | None, link_gbps: float | None, as_json: bool) -> None:
    """Read a service's metrics, once or ``over_s`` apart, and print the verdict."""
    from homkv.errors import ShapeError
    from homkv.serve.diagnose import Readings, diagnose
    from homkv.serve.lookup import Lookup

    for name, value in (("--over-s", over_s), ("--link-gbps", link_gbps)):
        if value is not None and not 0 < value < float("inf"):
            raise ShapeError(f"expected a positive and finite {name}, found {value}; leave it out")
    lookup, console = Lookup(url, api_key), Console()
    found = Readings(lookup.metrics())
    if over_s is not None:
        with console.status(f"watching for {over_s:g} s"):
            time.sleep(over_s)
        found = Readings(lookup.metrics()).since(found)
    diagnosis = diagnose(found, link_gbps)
    if as_json:
        print(json.dumps(asdict(diagnosis), indent=1))
    else:
        console.print(render(diagnosis))


def render(found: "Diagnosis") -> Group:
    """The verdicts, the numbers behind them, and what should not be."""
    head = Text()
    head.append(f"bound by: {found.bound or 'nothing'}", "bold")
    head.append(f"\n  {printable(found.why)}\n  remedy: {found.remedy}\n")
    phases = [_phases(found)] if found.num_done else []
    warnings = [Text(f"! {printable(line)}", "yellow") for line in found.warnings]
    return Group(head, *phases, _compression(found.compression, found.jct_s), *warnings)


def _phases(found: "Diagnosis") -> Table:
    """Mean seconds of every phase, grouped by what it belongs to."""
    from homkv.serve.diagnose import GROUPS

    times = f"TTFT {duration(found.ttft_s)}, TPOT {duration(found.tpot_s)}, JCT {duration(found.jct_s)}"
    table = Table(box=box.SIMPLE_HEAD, title=f"{found.num_done:,} requests done, means: {times}", title_justify="left")
    for name, justify in (("", "left"), ("time", "right"), ("share", "right"), ("", "left"), ("phases", "left")):
        table.add_column(name, justify=justify, no_wrap=name != "phases")  # type: ignore[arg-type]  # a literal
    for group, seconds in found.groups_s.items():
        share = seconds / found.jct_s if found.jct_s else 0.0
        phases = ", ".join(f"{name.replace('_', ' ')} {duration(found.phases_s[name])}" for name in GROUPS[group])
        bar = Text("█" * round(BAR * share), COLOURS.get(group, COLOURS["send"]))
        style = "bold" if group == found.bound else ""
        table.add_row(group, duration(seconds), f"{100 * share:.1f} %", bar, phases, style=style)
    return table


def _compression(found: "Compression | None", jct_s: float) -> Text:
    """Whether it helps here, with the sum that says so."""
    if found is None:
        return Text("compression helps: unknown, no transfer was seen", "bold")
    parts = [100 * seconds / jct_s if jct_s else 0.0 for seconds in (found.gain_least_s, found.gain_most_s)]
    why = {
        "yes": f"with KV in 16 bits requests would take at least {parts[0]:.1f} % longer",
        "no": f"with KV in 16 bits requests would take at most {max(parts[1], 0.0):.1f} % longer",
        "unclear": f"with KV in 16 bits requests would take {max(parts[0], 0.0):.1f} % longer if as much as can be hid "
        f"behind the prefill, {parts[1]:.1f} % if nothing did",
    }
    source = "given" if not found.is_measured else "the best that was seen, it may be faster: give --link-gbps"
    lines = [
        f"  {why[found.helps]}",
        f"  link {found.link_bytes_per_s * 8 / 1e9:,.2f} Gb/s ({source})",
        f"  in 16 bits {_transfer(found.raw_bytes, found.raw_link_s, jct_s)}",
        f"  on the wire {_transfer(found.wire_bytes, found.wire_link_s, jct_s)}",
        f"  work for it: packing {duration(found.pack_s)}, verifying {duration(found.verify_s)}; "
        "what was waited for is counted",
        "  not counted: decode reads fewer bytes and its memory holds more sequences; `homkv bench jct` measures that",
    ]
    text = Text()
    text.append(f"compression helps: {found.helps}\n", "bold")
    return text.append("\n".join(lines))


def _transfer(num_bytes: float, seconds: float, jct_s: float) -> str:
    share = f", {100 * seconds / jct_s:.1f} % of JCT" if jct_s else ""
    return f"{num_bytes / 1e6:,.2f} MB, {duration(seconds)} on the link{share}"
