"""Plots of measured runs: job completion time per case, and what it is made of."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from homkv.bench.jct.summary import Summary
from homkv.sim.record import PHASES

FORMATS = ("png", "svg")
COLOURS = ("#b0b0b0", "#222222", "#edae49", "#d1495b", "#8d5a2b", "#6f58c9", "#2a9df4")


def plot(summaries: Sequence[Summary], folder: Path, stem: str, title: str) -> list[Path]:
    """One panel per case, one bar per format, one colour per phase; PNG and SVG. Returns the files.

    What restoring or correcting took of decoding, where it was told apart, is hatched.
    """
    cases = list(dict.fromkeys(s.case for s in summaries))
    if not cases:
        return []
    figure = Figure(figsize=(3.2 * min(len(cases), 4) + 1.6, 3.6 * -(-len(cases) // 4)), layout="constrained")
    axes = figure.subplots(-(-len(cases) // 4), min(len(cases), 4), squeeze=False).ravel()
    for axis in axes[len(cases) :]:
        axis.set_visible(False)
    for axis, case in zip(axes, cases, strict=False):
        bars = [s for s in summaries if s.case == case]
        left = [0.0] * len(bars)
        for phase, colour in zip(PHASES, COLOURS, strict=True):
            widths = [s.shares()[phase] for s in bars]
            axis.barh([s.name for s in bars], widths, left=left, color=colour, label=phase.removesuffix("_s"))
            left = [a + b for a, b in zip(left, widths, strict=True)]
        extra = [s.dequantize_s or 0.0 for s in bars]
        start = [end - share for end, share in zip(left, extra, strict=True)]
        axis.barh(
            [s.name for s in bars], extra, left=start, color="none", edgecolor="white", hatch="////", label="restore"
        )
        axis.plot([s.percentile("jct_s", 99) for s in bars], [s.name for s in bars], "k|", markersize=9, label="P99")
        axis.invert_yaxis()
        axis.set_title(case, fontsize=8)
        axis.tick_params(labelsize=7)
        axis.set_xlabel("seconds", fontsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=7)
    figure.suptitle(title, fontsize=9)
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{stem}.{kind}" for kind in FORMATS]
    for file in files:
        figure.savefig(file, dpi=150)
    return files
