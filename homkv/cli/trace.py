"""``homkv trace``: where the time of a request went."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from homkv.serve.units import duration

if TYPE_CHECKING:
    from homkv.serve.views import RequestView

# As on the gateway's page.
COLOURS = {
    "queue": "#94a0b0",
    "wait": "#b9a57c",
    "turn": "#e3b04b",
    "prefill": "#e07b2a",
    "pack": "#bb5aa0",
    "send": "#d1495b",
    "verify": "#8a6fd0",
    "first_token": "#2fa39b",
    "decode": "#2f80d8",
}
EIGHTHS = " ▏▎▍▌▋▊▉█"


def trace(
    request_id: Annotated[str | None, typer.Argument(help="The answer's id; without it: the newest requests.")] = None,
    url: Annotated[str, typer.Option(help="Where the service is, without /v1.")] = "http://127.0.0.1:8000",
    limit: Annotated[int, typer.Option(min=1, max=1000, help="Requests to show.")] = 20,
    api_key: Annotated[str | None, typer.Option(help="The service's API key.", envvar="HOMKV_API_KEY")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of the chart.")] = False,
) -> None:
    """Draw the waterfall of a request that a service has answered or is answering, or of the newest ones."""
    import msgspec

    from homkv.serve.lookup import Lookup

    lookup, console = Lookup(url, api_key), Console()
    found = lookup.requests(limit) if request_id is None else lookup.request(request_id)
    if as_json:
        print(msgspec.json.format(msgspec.json.encode(found), indent=1).decode())
    elif isinstance(found, list):
        console.print(render_many(found, console.width))
    else:
        console.print(render_one(found, console.width))


def render_one(request: "RequestView", width: int) -> Group:
    """One line per phase, from its beginning to its end, and what happened below."""
    total_s, at_s = max(request.elapsed_s, 1e-9), 0.0
    bar_width = max(width - 52, 10)
    table = Table(box=box.SIMPLE_HEAD, title=_title(request), title_justify="left")
    table.add_column("phase", no_wrap=True)
    table.add_column("", width=bar_width, no_wrap=True)
    for name in ("time", "share", "own time"):
        table.add_column(name, justify="right", no_wrap=True)
    for phase, took_s in request.phases_s.items():
        begin, end = at_s / total_s, (at_s + took_s) / total_s
        own = _time(request.busy_s[phase]) if phase in request.busy_s else ""
        share = f"{100 * took_s / total_s:.1f} %"
        table.add_row(phase.replace("_", " "), _bar(begin, end, bar_width, phase), _time(took_s), share, own)
        at_s += took_s
    return Group(table, Text("\n".join(_lines(request))))


def render_many(requests: "list[RequestView]", width: int) -> Group:
    """One line per request, all on one scale."""
    longest_s = max((r.elapsed_s for r in requests), default=1.0)
    name_width = max((len(r.request_id) for r in requests), default=0)
    bar_width = max(width - min(name_width, 40) - 46, 8)
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("request", no_wrap=True, max_width=40)
    table.add_column("", no_wrap=True)
    for name in ("tokens", "TTFT", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", width=bar_width, no_wrap=True)
    for r in requests:
        style = "red" if r.state in ("failed", "cancelled") else ""
        numbers = (f"{r.num_prompt_tokens}+{r.num_tokens}", _time(r.ttft_s), _time(r.elapsed_s))
        bar = _stacked(r.phases_s, bar_width / max(longest_s, 1e-9))
        table.add_row(Text(printable(r.request_id)), Text(printable(r.state), style), *numbers, bar)
    legend = Text("  ").join(Text.assemble(("█ ", colour), name.replace("_", " ")) for name, colour in COLOURS.items())
    return Group(table, legend)


def printable(text: str) -> str:
    """Text of others, without what could steer a terminal."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def _title(request: "RequestView") -> Text:
    counts = f"{request.num_prompt_tokens} prompt tokens, {request.num_tokens} new"
    times = f"first token {_time(request.ttft_s)}, in all {_time(request.elapsed_s)}"
    return Text(printable(f"{request.request_id} · {request.state} · {counts} · {times}"))


def _lines(request: "RequestView") -> Iterator[str]:
    """What the bars do not say."""
    if request.wire_bytes:
        sizes = f"{request.raw_bytes / 1e6:,.2f} MB in 16 bits, {request.wire_bytes / 1e6:,.2f} MB on the wire"
        ratio = request.raw_bytes / request.wire_bytes
        yield f"KV: {sizes}, {ratio:.2f}x; held at the end {request.kv_bytes / 1e6:,.2f} MB"
    if request.num_cached_tokens or request.num_shared_pages:
        yield f"prefix: {request.num_cached_tokens} tokens not computed, {request.num_shared_pages} pages not sent"
    if request.reconstruction_error is not None:
        yield f"reconstruction error of a sampled layer: {request.reconstruction_error:.3g}"
    for event in request.events:
        details = " ".join(f"{name}={value}" for name, value in event.detail.items() if value is not None)
        yield printable(f"{_time(event.at_s):>10}  {event.name}  {details}")
    if request.error is not None:
        yield printable(request.error)


def _time(seconds: float | None) -> str:
    return "-" if seconds is None else duration(seconds)


def _bar(begin: float, end: float, width: int, phase: str) -> Text:
    """A bar from one fraction of the width to another, to an eighth of a character; at least that."""
    first, last = round(begin * width * 8), max(round(end * width * 8), round(begin * width * 8) + 1)
    cell, colour = first // 8, COLOURS.get(phase, "white")
    text = Text(" " * cell)
    if first % 8:  # characters fill from the left: the first one is drawn inverted
        text.append(EIGHTHS[first % 8], f"{colour} reverse")
        cell += 1
    text.append("█" * (last // 8 - cell), colour)
    if last // 8 >= cell and last % 8:
        text.append(EIGHTHS[last % 8], colour)
    text.truncate(width)
    return text


def _stacked(phases_s: dict[str, float], per_second: float) -> Text:
    """Phases side by side; edges are rounded to characters, so that their sum is."""
    text, at_s, cell = Text(), 0.0, 0
    for phase, took_s in phases_s.items():
        at_s += took_s
        end = round(at_s * per_second)
        text.append("█" * (end - cell), COLOURS.get(phase, "white"))
        cell = end
    return text
