"""Plots of stored benchmark rows: time over context, and fraction of the bandwidth floor over context."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, PercentFormatter

from homkv.errors import FormatError

Row = Mapping[str, Any]
# Ours in one family of colours, 16-bit peers in grey, what dequantizes or multiplies homomorphically in others.
COLOURS = {
    "homkv": ("#0b5fa5", "#2a9df4", "#07a398", "#6f58c9"),
    "16 bit": ("#222222", "#777777", "#b0b0b0"),
    "other": ("#d1495b", "#edae49", "#8d5a2b", "#c77dba", "#6a994e", "#e07a1f"),
}
SIXTEEN_BIT = ("sdpa flash", "sdpa cudnn", "fp16")
FORMATS = ("png", "svg")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSONL file. Raises FormatError if there is no decode measurement with a time in it."""
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise FormatError(f"expected a JSONL file of `homkv bench attention`, found {path}: {error}") from error
    if not any(is_decode(row) for row in rows):
        raise FormatError(
            f"expected decode rows in {path}, found none; write some with `homkv bench attention --device cuda --json`"
        )
    return rows


def is_decode(row: Any) -> bool:
    """Whether a record is a measured decode row of the GPU benchmark."""
    return isinstance(row, dict) and row.get("kind") == "decode" and row.get("status") == "ok"


def plot(rows: Iterable[Row], folder: Path) -> list[Path]:
    """Draw two figures per head shape into ``folder``, as PNG and SVG; returns the files.

    One panel per batch; of rows measured more than once the last counts.
    """
    folder.mkdir(parents=True, exist_ok=True)
    decode = [row for row in rows if is_decode(row)]
    colours = colours_of(list(dict.fromkeys(row["candidate"] for row in decode)))
    files = []
    for shape in dict.fromkeys(row["shape"] for row in decode):
        members = [row for row in decode if row["shape"] == shape]
        slug = shape.replace("D=", "d").replace(" ", "-").replace("/", "x")
        for key, name in (("us", "time"), ("floor_fraction", "floor")):
            figure = draw(members, key, colours)
            for extension in FORMATS:
                path = folder / f"attention-{name}-{slug}.{extension}"
                figure.savefig(path, dpi=150, bbox_inches="tight")
                files.append(path)
    return files


def colours_of(names: Sequence[str]) -> dict[str, str]:
    """The same colour for a candidate in every figure."""
    used = dict.fromkeys(COLOURS, 0)
    out = {}
    for name in names:
        family = "homkv" if name.startswith("homkv") else "16 bit" if name in SIXTEEN_BIT else "other"
        palette = COLOURS[family]
        out[name] = palette[used[family] % len(palette)]
        used[family] += 1
    return out


def draw(rows: Sequence[Row], key: str, colours: Mapping[str, str]) -> Figure:
    """One figure: a panel per batch, a line per candidate."""
    batches = sorted({row["batch"] for row in rows})
    figure = Figure(figsize=(4.2 * len(batches) + 0.6, 4.0), layout="constrained")
    axes = figure.subplots(1, len(batches), squeeze=False, sharey=True)[0]
    contexts = sorted({row["context"] for row in rows})
    for axis, batch in zip(axes, batches, strict=True):
        for name, colour in colours.items():
            points = {row["context"]: row[key] for row in rows if row["batch"] == batch and row["candidate"] == name}
            if points:
                at = sorted(points)
                width = 2.2 if name.startswith("homkv") else 1.2
                axis.plot(at, [points[x] for x in at], "o-", color=colour, linewidth=width, markersize=4, label=name)
        decorate(axis, key, batch, contexts)
    axes[0].set_ylabel("us" if key == "us" else "of the time to read the cache once")
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside right center", frameon=False, fontsize=8)
    title = "Decode attention, time per layer" if key == "us" else "Decode attention, fraction of the bandwidth floor"
    figure.suptitle(f"{title}: {rows[0]['shape']} heads, {rows[0].get('gpu', 'GPU')}", fontsize=10)
    return figure


def decorate(axis: Axes, key: str, batch: int, contexts: Sequence[int]) -> None:
    """Scales, ticks and labels of one panel."""
    axis.set_xscale("log", base=2)
    axis.set_xticks(contexts, [f"{x // 1024}k" if x >= 1024 else str(x) for x in contexts])
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_title(f"batch {batch}", fontsize=9)
    axis.set_xlabel("context, tokens")
    axis.grid(True, which="major", color="#dddddd", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    if key == "us":
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    else:
        axis.set_ylim(0, 1.05)
        axis.yaxis.set_major_formatter(PercentFormatter(1.0))
