"""The report: quality, bytes and speed of every format in one table, as a rich table, Markdown and JSON."""

import statistics
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from msgspec import to_builtins
from msgspec.structs import replace
from rich import box
from rich.table import Table

from homkv.bootstrap import Estimate, resolved
from homkv.eval.names import shown
from homkv.eval.record import CALIBRATION, EXACT, Case, Record, Run, Size, Speed
from homkv.eval.summary import (
    QUARTERS,
    Choices,
    Setting,
    Summary,
    by_setting,
    other_choices,
    summarize,
    unresolved,
)
from homkv.spec import ALL_PRESETS

HEADINGS = ("format", "KL [95 %]", "ppl", "top-1", "drift", "pass-key", "copy", "bits", "sent", "32k", "x 16-bit")

PRESET_OF = {spelling: name for name, spelling in ALL_PRESETS.items()}


@dataclass(frozen=True)
class Report:
    """Everything about one model, best KL first; ``sizes speeds`` by format.

    ``summaries``: texts of the setting ``main``, of which there are most, and everything that is no text; ``others``:
    KL by setting and format; ``choices``: over all settings; ``failed``: what a format could not hold;
    ``sliding_windows``: of the model's layers, as its last run has them; ``cases``: what it was all computed from.
    """

    model: str
    main: Setting | None
    summaries: tuple[Summary, ...]
    others: Mapping[Setting, Mapping[str, Summary]]
    choices: Mapping[str, Choices]
    sizes: Mapping[str, Size]
    speeds: Mapping[str, Speed]
    unresolved: tuple[tuple[str, str], ...]
    failed: tuple[str, ...]
    sliding_windows: tuple[int | None, ...]
    cases: tuple[Case, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain values, for a file."""
        return {
            "model": self.model,
            "setting": None if self.main is None else asdict(self.main),
            "formats": [asdict(summary) for summary in self.summaries],
            "others": [
                asdict(setting) | {"formats": [asdict(row) for row in rows.values()]}
                for setting, rows in self.others.items()
            ],
            "choices": {name: asdict(row) for name, row in self.choices.items()},
            "sizes": {name: to_builtins(size) for name, size in self.sizes.items()},
            "speeds": {name: to_builtins(speed) for name, speed in self.speeds.items()},
            "unresolved": [list(pair) for pair in self.unresolved],
            "failed": list(self.failed),
            "sliding_windows": list(self.sliding_windows),
        }


def by_preset(records: Sequence[Record]) -> list[Record]:
    """Records in which a format that is a preset has the preset's name, however it was spelled."""
    return [r if isinstance(r, Run) else replace(r, format=PRESET_OF.get(r.format, r.format)) for r in records]


def make_report(records: Sequence[Record]) -> Report:
    """Put the newest results together. Records of several models: the last one's."""
    records = by_preset(records)
    cases = _counted(records)
    model = cases[-1].model if cases else ""
    settings = by_setting(cases)
    main = next(iter(settings), None)
    texts = settings.get(main, []) if main else []
    rest = [c for c in cases if c.task not in ("text", CALIBRATION) and c.prefill == "exact"]
    summaries = sorted(summarize([*texts, *rest]), key=lambda s: (s.kl is None, s.kl.mean if s.kl else 0.0))
    runs = [r for r in records if isinstance(r, Run) and r.model == model]
    sizes = sorted((r for r in records if isinstance(r, Size) and r.model == model), key=lambda r: _is_main(r, main))
    return Report(
        model=model,
        main=main,
        summaries=tuple(summaries),
        others={s: {x.format: x for x in summarize(settings[s])} for s in sorted(settings) if s != main},
        choices=other_choices(cases),
        sizes={r.format: r for r in sizes},
        speeds={r.format: r for r in records if isinstance(r, Speed) and r.model == model},
        unresolved=tuple(unresolved(texts)),
        failed=tuple(f"{shown(c.format)} on {c.task} {c.item}: {c.error}" for c in cases if c.error),
        sliding_windows=runs[-1].sliding_windows if runs else (),
        cases=tuple(cases),
    )


def _counted(records: Sequence[Record]) -> list[Case]:
    """The cases that a report counts: the last model's, and of several about one subject the last."""
    cases = [r for r in records if isinstance(r, Case)]
    newest = {c.key: c for c in cases if c.model == cases[-1].model}
    return list({_subject(c): c for c in newest.values()}.values())


def _subject(case: Case) -> tuple[object, ...]:
    """What a case is about. Of two, by another implementation, prompt or name, the last one counts."""
    if case.error:
        return (case.key,)
    length = (case.prefix, len(case.kl)) if case.task != "code" else ()
    return case.format, case.task, case.item, case.prefill, *length


def _is_main(size: Size, main: Setting | None) -> bool:
    return main is not None and size.context == main.prefix


def interval(found: Estimate | None, digits: int = 4) -> str:
    """``.0134 [.0120, .0150]``, or the mean alone where there are too few texts."""
    if found is None:
        return "–"
    text = f"{found.mean:.{digits}f}"
    return text if found.low is None else f"{text} [{found.low:.{digits}f}, {found.high:.{digits}f}]"


def cells(report: Report, row: Summary) -> tuple[str, ...]:
    """One line of the table, under HEADINGS."""
    size, speed = report.sizes.get(row.format), report.speeds.get(row.format)
    wide = None if size is None else size.stored_32k
    return (
        shown(row.format),
        interval(row.kl),
        "–" if row.perplexity is None else f"{row.perplexity:.2f}",
        "–" if row.top1 is None else f"{row.top1.mean:.3f}",
        "–" if not row.drift else f"{row.drift[0]:.4f} → {row.drift[-1]:.4f}",
        str(row.passkey),
        str(row.copy),
        "–" if size is None else f"{size.stored:.2f}",
        "–" if size is None else f"{size.sent:.2f}",
        "–" if wide is None else f"{wide:.2f}",
        "–" if speed is None else f"{statistics.median(speed.ratios):.2f}",
    )


WRITTEN = (
    *("format", "tokens before it leaves the exact model", "never leaves it", "more than all in bfloat16"),
    *("edit similarity of code", "passes"),
)
INTERVALS = ("format", "perplexity / exact", "top-1", "KL, last less first quarter", "pass-keys", "copies")


def written_rows(report: Report) -> list[tuple[str, ...]]:
    """What formats wrote by themselves, under WRITTEN: greedy continuations and code."""
    return [
        (
            *(shown(s.format), interval(s.diverges, 1), str(s.stayed), interval(s.longer_than_bf16, 1)),
            *(interval(s.similarity, 3), str(s.passed)),
        )
        for s in report.summaries
        if s.diverges is not None or s.similarity is not None or s.passed.total
    ]


def interval_rows(report: Report) -> list[tuple[str, ...]]:
    """Intervals of what the main table gives without one, under INTERVALS."""
    return [
        (
            *(shown(s.format), interval(s.perplexity_ratio), interval(s.top1, 3), interval(s.drift_change)),
            *(interval(s.passkey.share, 2), interval(s.copy.share, 2)),
        )
        for s in report.summaries
    ]


CHOICES = ("format", "tokens", "per 1,000", "all in bfloat16, on the same", "more than bfloat16")


def choice_rows(report: Report) -> list[tuple[str, ...]]:
    """How often formats prefer another token than the exact model, under CHOICES: the fewest first."""

    def thousands(found: Estimate) -> str:
        low, high = (None if x is None else 1000 * x for x in (found.low, found.high))
        return interval(Estimate(1000 * found.mean, low, high), 1)

    rows = sorted(report.choices.items(), key=lambda pair: pair[1].more.mean)
    return [
        (shown(name), f"{c.tokens:,}", f"{1000 * c.share:.1f}", f"{1000 * c.bf16:.1f}", thousands(c.more))
        for name, c in rows
    ]


def other_rows(report: Report) -> list[tuple[str, ...]]:
    """KL in the other settings, one column each; with the number of texts where these are not all."""
    order = dict.fromkeys(name for rows in report.others.values() for name in rows)
    most = {setting: max(s.num_texts for s in rows.values()) for setting, rows in report.others.items()}

    def cell(name: str, setting: Setting) -> str:
        row = report.others[setting].get(name)
        if row is None:
            return "–"
        fewer = f" ({row.num_texts} of {most[setting]} texts)" if row.num_texts < most[setting] else ""
        return interval(row.kl) + fewer

    return [(shown(name), *(cell(name, setting) for setting in report.others)) for name in order]


def length_rows(report: Report, lengths: Sequence[int]) -> list[tuple[str, ...]]:
    """Pass-keys by length of the prompt; none where there is one length only."""
    rows = [s for s in report.summaries if s.passkey.total and len(lengths) > 1]
    return [(shown(s.format), *(str(s.passkey_by_length.get(n, "–")) for n in lengths)) for s in rows]


def drift_rows(report: Report) -> list[tuple[str, ...]]:
    """KL by quarters of the scored tokens, where these are most."""
    settings = ([report.main] if report.main else []) + list(report.others)
    if not settings:
        return []
    longest = max(settings, key=lambda setting: setting.scored)
    rows = report.others.get(longest) or {s.format: s for s in report.summaries}
    return [(shown(n), *(f"{x:.4f}" for x in s.drift)) for n, s in rows.items() if s.drift]


def tables(report: Report) -> list[tuple[str, tuple[str, ...], list[tuple[str, ...]]]]:
    """Everything but the main table: title, headings, rows."""
    settings = tuple(map(str, report.others))
    lengths = sorted({n for s in report.summaries for n in s.passkey_by_length})
    quarters = ("format", *(f"quarter {i}" for i in range(1, QUARTERS + 1)))
    found = [
        ("95 % intervals of the rest", INTERVALS, interval_rows(report)),
        ("Written greedily", WRITTEN, written_rows(report)),
        ("Another most likely token than the exact model's, texts of all lengths", CHOICES, choice_rows(report)),
        ("Pass-keys by tokens of the prompt", ("format", *(f"{n:,}" for n in lengths)), length_rows(report, lengths)),
        ("KL at other lengths (prefix + scored tokens) and prefills", ("format", *settings), other_rows(report)),
        ("Drift: KL by quarters of the longest scored tail", quarters, drift_rows(report)),
    ]
    return [table for table in found if table[2]]


def notes(report: Report) -> list[str]:
    """What a reader of the tables must know."""
    most = max((s.num_texts for s in report.summaries), default=0)
    fewer = [f"{shown(s.format)} ({s.num_texts})" for s in report.summaries if 0 < s.num_texts < most]
    found = [f"not resolved: {shown(a)} and {shown(b)}" for a, b in report.unresolved]
    found += [
        f"not resolved: whether {shown(s.format)} follows the exact model longer or shorter than bfloat16 does"
        for s in report.summaries
        if s.longer_than_bf16 is not None and not resolved(s.longer_than_bf16) and s.format != EXACT
    ]
    if sliding := [w for w in report.sliding_windows if w is not None]:
        sizes = ", ".join(f"{w:,}" for w in sorted(set(sliding)))
        found.append(
            f"{len(sliding)} of {len(report.sliding_windows)} layers attend to a sliding window of {sizes} tokens: "
            "they stay exact under every format, and bits count the other layers only"
        )
    if blank := max((s.num_blank for s in report.summaries), default=0):
        found.append(f"the exact model completes {blank} problems with nothing: edit similarity leaves them out")
    if fewer:
        found.append(f"on fewer than {most} texts, so not on the same tokens as the rest: {', '.join(fewer)}")
    found += [f"x 16-bit at {place}" for place in dict.fromkeys(map(_place, report.speeds.values()))]
    return found + [f"failed: {what}" for what in report.failed]


def _place(speed: Speed) -> str:
    """Where a speed was measured."""
    return f"{speed.context:,} tokens, {speed.heads} query heads / kv heads x channels, {speed.machine}"


def rich_table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table on a terminal: the first column to the left, numbers to the right."""
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i else "left", no_wrap=not i)
    for row in rows:
        table.add_row(*row)
    return table


def quality_table(report: Report) -> Table:
    """The main table on a terminal."""
    title = f"{report.model}: formats against the unquantized model ({report.main or 'no texts'} tokens)"
    table = rich_table(title, HEADINGS, [cells(report, row) for row in report.summaries])
    table.caption, table.caption_justify = LEGEND, "left"
    return table


LEGEND = (
    "KL(exact || format) in nats per token with its 95 % bootstrap interval over texts. Drift: KL in the first and the "
    "last quarter of the scored tokens. Bits per element count everything: stored at this context, as sent, and at "
    "32,768 tokens of head_dim 128. x 16-bit: a decode step's attention, layer by layer, in turns with the faster of "
    "torch's matrix products on unpacked bfloat16 and float32 KV, each format by its own best implementation; rivals "
    "and HACK have no fused kernel on a CPU."
)


def markdown(report: Report, command: str, plots: Sequence[str]) -> str:
    """The report as a page."""
    lines = [f"# Formats on {report.model}", "", f"`{command}`", ""]
    if report.main:
        lines += [f"Texts of {report.main} tokens.", ""]
    lines += _markdown_table(HEADINGS, [cells(report, row) for row in report.summaries])
    lines += ["", *textwrap.wrap(LEGEND, 116), ""]
    for title, headings, rows in tables(report):
        lines += [f"## {title}", "", *_markdown_table(headings, rows), ""]
    if found := notes(report):
        lines += ["## Notes", "", "Not resolved: the paired interval of the difference in KL holds zero.", ""]
        lines += [f"* {note}" for note in found] + [""]
    lines += [f"![{name}]({name})" for name in plots]
    return "\n".join(lines) + "\n"


def _markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (headings, ["---"] * len(headings), *rows)]
