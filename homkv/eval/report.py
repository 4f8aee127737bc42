"""The report: quality, bytes and speed of every format in one table, as a rich table, Markdown and JSON."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.table import Table

from homkv.eval.bootstrap import Estimate
from homkv.eval.record import Case, Record, Size, Speed
from homkv.eval.summary import Summary, summarize, unresolved

HEADINGS = ("format", "KL [95 %]", "ppl", "top-1", "drift", "pass-key", "copy", "bits", "sent", "32k", "x 16-bit")


@dataclass(frozen=True)
class Report:
    """Everything about one model, best KL first; ``sizes speeds`` by format."""

    model: str
    summaries: tuple[Summary, ...]
    sizes: Mapping[str, Size]
    speeds: Mapping[str, Speed]
    unresolved: tuple[tuple[str, str], ...]

    def as_json(self) -> dict[str, Any]:
        """Plain values, for a file."""
        return {
            "model": self.model,
            "formats": [asdict(summary) for summary in self.summaries],
            "unresolved": [list(pair) for pair in self.unresolved],
        }


def make_report(records: Sequence[Record]) -> Report:
    """Put the newest results together. Records of several models: the last one's."""
    cases = [r for r in records if isinstance(r, Case)]
    model = cases[-1].model if cases else ""
    cases = list({c.key: c for c in cases if c.model == model}.values())
    summaries = sorted(summarize(cases), key=lambda s: (s.kl is None, s.kl.mean if s.kl else 0.0))
    return Report(
        model=model,
        summaries=tuple(summaries),
        sizes={r.format: r for r in records if isinstance(r, Size) and r.model == model},
        speeds={r.format: r for r in records if isinstance(r, Speed) and r.model == model},
        unresolved=tuple(unresolved(cases)),
    )


def interval(found: Estimate | None, digits: int = 4) -> str:
    """``.0134 [.0120, .0150]``, or the mean alone where there are too few texts."""
    if found is None:
        return "–"
    text = f"{found.mean:.{digits}f}"
    return text if found.low is None else f"{text} [{found.low:.{digits}f}, {found.high:.{digits}f}]"


def cells(report: Report, row: Summary) -> tuple[str, ...]:
    """One line of the table, under HEADINGS."""
    size, speed = report.sizes.get(row.format), report.speeds.get(row.format)
    return (
        row.format,
        interval(row.kl),
        "–" if row.perplexity is None else f"{row.perplexity:.2f}",
        "–" if row.top1 is None else f"{row.top1.mean:.3f}",
        "–" if not row.drift else f"{row.drift[0]:.4f} → {row.drift[-1]:.4f}",
        str(row.passkey),
        str(row.copy),
        "–" if size is None else f"{size.stored:.2f}",
        "–" if size is None else f"{size.sent:.2f}",
        "–" if size is None else f"{size.stored_32k:.2f}",
        "–" if speed is None else f"{statistics.median(speed.ratios):.2f}",
    )


def written_table(report: Report) -> Table | None:
    """What formats wrote by themselves: greedy continuations and code; None if nothing was."""
    rows = [s for s in report.summaries if s.diverges is not None or s.similarity is not None]
    if not rows:
        return None
    table = Table(box=box.SIMPLE_HEAD, title="written greedily", title_justify="left")
    for heading in ("format", "tokens before it leaves the exact model", "edit similarity of code", "passes"):
        table.add_column(heading, justify="left" if heading == "format" else "right")
    for row in rows:
        table.add_row(row.format, interval(row.diverges, 1), interval(row.similarity, 3), str(row.passed))
    return table


def quality_table(report: Report) -> Table:
    """The table on a terminal."""
    table = Table(
        box=box.SIMPLE_HEAD,
        title=f"{report.model}: formats against the unquantized model",
        caption="KL(exact || format) in nats with its bootstrap interval over texts; drift: KL in the first and the "
        "last quarter of the scored tokens; bits per element at this context, sent on the wire, and at 32k tokens with "
        "head_dim 128, everything counted; x 16-bit: attention step against the faster of torch's matrix products on "
        "unpacked 16- and 32-bit KV, in turns, each format by its own best implementation here.",
        title_justify="left",
        caption_justify="left",
    )
    for i, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="right" if i else "left", no_wrap=not i)
    for row in report.summaries:
        table.add_row(*cells(report, row))
    return table


def markdown(report: Report, command: str, plots: Sequence[str]) -> str:
    """The report as a page."""
    lines = [
        f"# Formats on {report.model}",
        "",
        f"`{command}`",
        "",
        "| " + " | ".join(HEADINGS) + " |",
        "|" + "---|" * len(HEADINGS),
        *("| " + " | ".join(cells(report, row)) + " |" for row in report.summaries),
        "",
        "KL(exact || format) in nats per token with its 95 % bootstrap interval over texts. Drift: KL in the first and",
        "the last quarter of the scored tokens. Bits per element count everything: at this context, as sent, and at",
        "32,768 tokens of head_dim 128. `x 16-bit`: an attention step of one layer, in turns with the faster of",
        "torch's matrix products on unpacked bfloat16 and float32 KV; rivals and HACK have no fused kernel on a CPU.",
        "",
    ]
    if report.unresolved:
        lines += ["**Not resolved** (the paired interval of the difference in KL holds zero):", ""]
        lines += [f"* {a} and {b}" for a, b in report.unresolved] + [""]
    lines += [f"![{name}]({name})" for name in plots]
    return "\n".join(lines) + "\n"
