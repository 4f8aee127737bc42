"""Plots of simulations: decomposition, sweeps, and simulated against measured times."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from homkv.sim.record import PHASES

COLOURS = {
    "fp16": "#222222", "fp8": "#777777", "balanced": "#0b5fa5", "small": "#2a9df4", "quality": "#07a398",
    "hack": "#d1495b", "hack-2026": "#edae49", "kivi": "#8d5a2b", "cachegen": "#c77dba", "kvquant": "#6a994e",
}  # fmt: skip
PHASE_COLOURS = ("#dddddd", "#edae49", "#c77dba", "#d1495b", "#8d5a2b", "#bbbbbb", "#0b5fa5")
LABELS = {
    "link_gbps": "link, Gb/s",
    "requests_per_s": "requests per second",
    "prompt_tokens": "prompt, tokens",
    "jct_s": "mean JCT, s",
    "cost": "cost per million tokens",
}


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write PNG and SVG; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.{extension}" for extension in ("png", "svg")]
    for path in paths:
        figure.savefig(path, dpi=150, bbox_inches="tight", metadata={"Date": None} if path.suffix == ".svg" else None)
    return paths


def lines(series: Mapping[str, Sequence[tuple[float, float]]], axis: str, value: str, title: str) -> Figure:
    """One line per format over a swept quantity, both axes logarithmic."""
    figure = Figure(figsize=(5.6, 3.8), layout="constrained")
    axes = figure.subplots()
    for name, points in series.items():
        x, y = zip(*sorted(points), strict=True)
        axes.plot(x, y, "o-", markersize=4, linewidth=1.6, color=COLOURS.get(name), label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = sorted({x for points in series.values() for x, _ in points})
    axes.set_xticks(ticks, [f"{x:g}" for x in ticks], fontsize=8)
    axes.set_xlabel(LABELS[axis])
    axes.set_ylabel(LABELS[value])
    axes.set_title(title, fontsize=10)
    _plain(axes)
    axes.legend(frameon=False, fontsize=8)
    return figure


def decomposition(bars: Mapping[str, Mapping[str, float]], title: str) -> Figure:
    """One bar per format: mean seconds of every phase; the dequantizing share of decode is hatched."""
    figure = Figure(figsize=(7.2, 0.42 * len(bars) + 1.3), layout="constrained")
    axes = figure.subplots()
    names = list(bars)[::-1]
    left = [0.0] * len(names)
    for phase, colour in zip(PHASES, PHASE_COLOURS, strict=True):
        widths = [bars[name][phase] for name in names]
        axes.barh(names, widths, left=left, color=colour, label=phase.removesuffix("_s"))
        left = [a + b for a, b in zip(left, widths, strict=True)]
    shares = [bars[name].get("dequantize_s", 0.0) for name in names]
    start = [end - share for end, share in zip(left, shares, strict=True)]
    axes.barh(names, shares, left=start, color="none", edgecolor="white", hatch="////", label="dequantize or correct")
    axes.set_xlabel(LABELS["jct_s"])
    axes.set_title(title, fontsize=10)
    _plain(axes)
    axes.legend(frameon=False, fontsize=7)
    return figure


def agreement(points: Mapping[str, Sequence[tuple[float, float]]], title: str) -> Figure:
    """Simulated over measured JCT, a point per request, a colour per run."""
    figure = Figure(figsize=(4.6, 4.4), layout="constrained")
    axes = figure.subplots()
    largest = max(max(pair) for pairs in points.values() for pair in pairs)
    for name, pairs in points.items():
        measured, simulated = zip(*pairs, strict=True)
        axes.plot(measured, simulated, "o", markersize=3, alpha=0.6, label=name)
    axes.plot([0, largest], [0, largest], color="#222222", linewidth=1)
    axes.fill_between([0, largest], [0, 0.9 * largest], [0, 1.1 * largest], color="#222222", alpha=0.08, linewidth=0)
    axes.set_xlabel("measured JCT, s")
    axes.set_ylabel("simulated JCT, s")
    axes.set_title(title, fontsize=10)
    _plain(axes)
    axes.legend(frameon=False, fontsize=7)
    return figure


def _plain(axes: Axes) -> None:
    axes.grid(True, which="major", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
