"""A run as tables."""

from collections.abc import Callable, Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from homkv.eval.chaos.record import Outcome, Totals
from homkv.testing.faults import KINDS, MESSAGES

COLUMNS = ("hit", "seen", "done", "failed", "cancelled", "wrong", "leaked", "freed s", "back s")
EXPLANATION = (
    "hit: faults injected; seen: of these, those that the service counted or a client was told of. done, failed, "
    "cancelled: requests. wrong: answers with other KV bytes, attention, logits or tokens than without faults. leaked: "
    "page blocks. freed: longest time until nothing was held; back: until a new request was answered."
)


def summarize(outcomes: Sequence[Outcome]) -> dict[str, list[Totals]]:
    """Totals by service, by kind, by message, and of everything."""
    messages = [f"{where}: {message}" for where, names in MESSAGES.items() for message in names]
    services = dict.fromkeys(o.service for o in outcomes)
    return {
        "service": _by(outcomes, list(services), lambda o: o.service),
        "fault": _by(outcomes, KINDS, lambda o: o.fault.kind),
        "message": _by(outcomes, messages, lambda o: f"{o.fault.where}: {o.fault.message}"),
        "": [Totals.of("all", outcomes)],
    }


def _by(outcomes: Sequence[Outcome], names: Sequence[str], name_of: Callable[[Outcome], str]) -> list[Totals]:
    groups: dict[str, list[Outcome]] = {name: [] for name in names}
    for outcome in outcomes:
        groups[name_of(outcome)].append(outcome)
    return [Totals.of(name, group) for name, group in groups.items() if group]


def render(outcomes: Sequence[Outcome]) -> Group:
    """The tables, and below them every fault under which a promise was broken."""
    totals = summarize(outcomes)
    (everything,) = totals.pop("")
    parts: list[RenderableType] = [_table(by, rows) for by, rows in totals.items()]
    lines = [
        EXPLANATION,
        f"{everything.injected} faults injected, {everything.passed_by} passed by; "
        f"{everything.tokens} tokens compared, {everything.wrong} answers wrong, "
        f"{everything.leaked_blocks} blocks leaked, {everything.broken} faults broke a promise",
    ]
    for o in outcomes:
        if o.broken:
            lines.append(f"number {o.number}, {o.service}, {o.policy}, {o.place}: {', '.join(o.broken)}")
    return Group(*parts, Text("\n".join(lines)))


def _table(by: str, rows: Sequence[Totals]) -> Table:
    table = Table(Column(by, no_wrap=True), box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in COLUMNS:
        table.add_column(name, justify="right")
    for t in rows:
        counts = (t.injected, t.detected, t.done, t.failed, t.cancelled, t.wrong, t.leaked_blocks)
        table.add_row(t.name, *map(str, counts), f"{t.longest_free_s:.2f}", f"{t.longest_recovery_s:.1f}")
    return table
