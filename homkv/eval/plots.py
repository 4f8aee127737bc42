"""Plots of a report: bits against KL, KL over the position behind the prompt, attention error per layer and head."""

import re
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from homkv.errors import FormatError
from homkv.eval.names import shown
from homkv.eval.record import EXACT, MODEL_BF16, Size
from homkv.eval.report import Report
from homkv.eval.summary import Summary, by_setting
from homkv.plan import BASE as PER_LAYER
from homkv.spec import RowsSpec

STRIDE = 16  # tokens that share a point over positions
FILES = ("png", "svg")


def save_plots(report: Report, folder: Path) -> list[str]:
    """Write what the results allow into ``folder``, PNG and SVG; returns the names of the PNG files."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = {"pareto": pareto(report), "drift": drift(report), "heads": heads(report)}
    names = []
    model = re.sub(r"[^\w.-]+", "-", report.model).strip("-.")  # a hub name or a folder has slashes
    for kind, figure in figures.items():
        if figure is None:
            continue
        for end in FILES:
            figure.savefig(folder / f"eval-{model}-{kind}.{end}", dpi=130)
        names.append(f"eval-{model}-{kind}.png")
    return names


def is_ours(name: str) -> bool:
    """Whether a format is one of the rows formats, or a plan of them."""
    try:
        RowsSpec.parse(name)
    except FormatError:
        return name.startswith(PER_LAYER)
    return True


def _measured(report: Report) -> list[Summary]:
    return [s for s in report.summaries if s.kl is not None and s.format not in (EXACT, MODEL_BF16)]


def bits_of(size: Size) -> float:
    """Bits that a format is compared by: held at 32k tokens, or sent if it is a format of the wire alone."""
    return size.sent if size.stored_32k is None or size.stored_32k == 16 else size.stored_32k


def pareto(report: Report) -> Figure | None:
    """Bits against KL, both axes logarithmic, and the line of those that no other beats in both."""
    rows = [s for s in _measured(report) if s.format in report.sizes and s.kl is not None and s.kl.mean > 0]
    if not rows:
        return None
    figure = Figure(figsize=(8.5, 5.4), layout="constrained")
    axes = figure.subplots()
    points = []
    for row in rows:
        assert row.kl is not None
        bits, colour = bits_of(report.sizes[row.format]), "#0b5fa5" if is_ours(row.format) else "#d1495b"
        points.append((bits, row.kl.mean))
        if row.kl.low is not None and row.kl.high is not None:
            axes.plot([bits] * 2, [max(row.kl.low, 1e-9), row.kl.high], color=colour, alpha=0.4, linewidth=1)
        axes.plot(bits, row.kl.mean, "o", color=colour)
        axes.annotate(shown(row.format), points[-1], (4, 3), textcoords="offset points", fontsize=6)
    best = [p for p in sorted(points) if p[1] == min(y for x, y in points if x <= p[0])]
    axes.plot(*zip(*best, strict=True), color="grey", linewidth=0.8, linestyle=":", drawstyle="steps-post")
    axes.set(xscale="log", yscale="log", ylabel="KL to the exact model, nats per token")
    axes.set(xlabel="bits per element at 32k tokens of head_dim 128, everything counted (formats of the wire: sent)")
    axes.set_title(f"{report.model}: bytes against loss")
    axes.set_xticks([2, 3, 4, 6, 8, 16], ["2", "3", "4", "6", "8", "16"])
    axes.grid(alpha=0.25)
    return figure


def drift(report: Report) -> Figure | None:
    """KL by position behind the exact prefix, mean over texts and STRIDE tokens, where the scored tokens are most."""
    settings = by_setting(report.cases)
    longest = settings[max(settings, key=lambda setting: setting.scored)] if settings else []
    lines = {}
    for row in _measured(report):
        texts = [c.kl for c in longest if c.format == row.format]
        count = min(map(len, texts), default=0) // STRIDE * STRIDE
        if count:
            lines[row.format] = np.mean([t[:count] for t in texts], 0).reshape(-1, STRIDE).mean(1)
    if not lines:
        return None
    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    axes = figure.subplots()
    for name, values in lines.items():
        x = (np.arange(len(values)) + 0.5) * STRIDE
        axes.plot(x, np.maximum(values, 1e-7), label=shown(name), linewidth=2 if is_ours(name) else 1)
    axes.set(yscale="log", xlabel="tokens behind the prompt", ylabel="KL, nats per token")
    axes.legend(fontsize=7, ncols=2)
    axes.grid(alpha=0.25)
    return figure


def heads(report: Report) -> Figure | None:
    """Relative error of attention outputs per layer and head of up to four formats."""
    rows = [s for s in _measured(report) if s.head_error and s.format != "fp16"][:4]
    if not rows:
        return None
    figure = Figure(figsize=(2.6 * len(rows) + 1, 5), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(rows), sharey=True))
    top = max(max(map(max, s.head_error)) for s in rows)
    for axes, row in zip(panels, rows, strict=True):
        image = axes.imshow(row.head_error, aspect="auto", cmap="viridis", vmin=0, vmax=top)
        axes.set(title=shown(row.format), xlabel="query head")
    panels[0].set_ylabel("layer")
    figure.colorbar(image, ax=list(panels), label="relative error of attention")
    return figure
