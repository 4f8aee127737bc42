"""Does a service grow? Samples of what it holds, and a line fitted through memory and open files."""

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
from matplotlib.figure import Figure
from prometheus_client.parser import text_string_to_metric_families

from homkv.errors import FormatError

log = logging.getLogger(__name__)

GATEWAY = {
    "process_resident_memory_bytes": "resident_memory_bytes",
    "process_open_fds": "open_fds",
    "homkv_requests_accepted": "requests_accepted",
}
INSTANCE = ("resident_memory_bytes", "open_fds", "requests_running", "requests_receiving", "prefix_pages_held")
LOAD = "gateway requests_accepted"
SLOPES = ("resident_memory_bytes", "open_fds")  # leaks show as a slope
AT_REST = (
    "requests_accepted",
    "requests_running",
    "requests_receiving",
    "pages_in_use",
)  # follow the load: 0 behind it
WARM_UP = 0.5  # of a run: pools, caches and books of limited size fill up; growth is judged behind it
MIN_SAMPLES = 10
TOLERANCE = 0.005  # of the mean: less growth than that over what was judged is none, whatever its sign is
COLOURS = ("#0b5fa5", "#d1495b", "#07a398", "#edae49", "#6f58c9", "#777777")


@dataclass(frozen=True)
class Sample:
    """What the service held ``at_s`` seconds after the start, as ``PROCESS QUANTITY``; bytes or counts."""

    at_s: float
    values: dict[str, float]


@dataclass(frozen=True)
class Growth:
    """A line fitted through one quantity behind the warm-up. ``low high``: 95 % of the slope."""

    name: str
    mean: float
    per_hour: float
    low: float
    high: float
    change: float  # along the fitted line, from the warm-up's end to the run's
    grows: bool  # the interval is above 0, and the change above the tolerance


async def take_sample(client: httpx.AsyncClient, at_s: float, ended: Mapping[str, float]) -> Sample:
    """Read /metrics. Without an answer, and of a service that is not ours, the sample holds ``ended`` alone."""
    try:
        response = await client.get("/metrics")
        text = response.text if response.status_code == 200 else ""
    except httpx.HTTPError as error:
        log.warning("no sample: %r", error)
        text = ""
    return Sample(at_s, dict(ended) | held(text))


def held(text: str) -> dict[str, float]:
    """What Prometheus' text says of resources."""
    out, blocks = {}, {}
    for family in text_string_to_metric_families(text):
        for name, labels, value, *_ in family.samples:
            quantity = labels.get("name", "")
            if name in GATEWAY:
                out[f"gateway {GATEWAY[name]}"] = value
            elif name == "homkv_instance" and quantity in INSTANCE:
                out[f"{labels['instance']} {quantity}"] = value
            elif name == "homkv_instance" and quantity in ("blocks_free", "blocks_total"):
                blocks[labels["instance"], quantity] = value
    for instance, _ in [key for key in blocks if key[1] == "blocks_total"]:
        out[f"{instance} pages_in_use"] = blocks[instance, "blocks_total"] - blocks[instance, "blocks_free"]
    return out


def growth(samples: Sequence[Sample]) -> list[Growth]:
    """Fit ``value = mean + slope * time`` to memory and open files behind the warm-up; empty with too few samples.

    Open files have one more term, ``c * load``: every request under way has sockets, so a busier end of the run would
    look like growth. Least squares; neighbouring residuals are correlated, r of them, so ``n (1 - r) / (1 + r)``
    samples count. The last sample, taken at rest, is left out.
    """
    judged = [s for s in _behind_warm_up(samples) if LOAD in s.values]
    names = dict.fromkeys(name for s in judged for name in s.values if name.split()[-1] in SLOPES)
    points = {name: [s for s in judged if name in s.values] for name in names}
    return [_fit(name, found) for name, found in points.items() if len(found) >= MIN_SAMPLES]


def _behind_warm_up(samples: Sequence[Sample]) -> list[Sample]:
    return [s for s in samples[:-1] if s.at_s >= WARM_UP * samples[-1].at_s]


def _fit(name: str, samples: Sequence[Sample]) -> Growth:
    hours = np.array([s.at_s for s in samples]) / 3600
    load = np.array([s.values[LOAD] if name.endswith("open_fds") else 0.0 for s in samples])
    values = np.array([s.values[name] for s in samples])
    terms = np.stack((np.ones_like(hours), hours - hours.mean(), load - load.mean()), 1)
    inverse = np.linalg.pinv(terms.T @ terms)
    mean, slope, per_request = map(float, inverse @ terms.T @ values)
    rest = values - terms @ (mean, slope, per_request)
    power = float(rest @ rest)
    r = max(float(rest[1:] @ rest[:-1]) / power, 0.0) if power > 0 else 0.0
    count = max(len(values) * (1 - r) / (1 + r), 4.0)
    error = 2 * float(inverse[1, 1] * power / (count - 3)) ** 0.5
    change = slope * float(hours[-1] - hours[0])
    grows = slope > error and change > max(TOLERANCE * mean, 1.0)
    return Growth(name, mean, slope, slope - error, slope + error, change, grows)


def left_behind(samples: Sequence[Sample]) -> dict[str, float]:
    """Requests, leases and pages that are still held in the last sample, taken at rest, beyond those of the first."""
    if not samples:
        return {}
    before, after = samples[0].values, samples[-1].values
    names = [name for name in after if name.split()[-1] in AT_REST]
    return {name: after[name] - before.get(name, 0.0) for name in names if after[name] > before.get(name, 0.0)}


def read_samples(path: Path) -> list[Sample]:
    """Samples of the last run in a file of `homkv bench serve --json`. Raises FormatError."""
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        samples = [Sample(float(r["at_s"]), dict(r["values"])) for r in rows if r["kind"] == "serve-sample"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FormatError(f"expected samples of `homkv bench serve --sample-s` in {path}, found {error!r}") from error
    starts = [i for i, s in enumerate(samples) if i == 0 or s.at_s < samples[i - 1].at_s]
    if not starts:
        raise FormatError(f"expected samples in {path}, found none; run `homkv bench serve --sample-s 10 --json`")
    return samples[starts[-1] :]


PANELS = (
    ("resident_memory_bytes", "resident memory, MiB", 2.0**20),
    ("pages_in_use", "pages in use", 1.0),
    ("requests_receiving", "open leases", 1.0),
    ("open_fds", "open files", 1.0),
)


def save(samples: Sequence[Sample], folder: Path) -> list[Path]:
    """Draw into ``folder``, as PNG and SVG; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    figure, paths = draw(samples), [folder / f"serve-soak.{extension}" for extension in ("png", "svg")]
    for path in paths:
        figure.savefig(path, dpi=150)
    return paths


def draw(samples: Sequence[Sample]) -> Figure:
    """One panel per quantity, one line per process; the fitted line over what it was fitted to."""
    figure = Figure(figsize=(9.6, 5.6), layout="constrained")
    fits = {g.name: g for g in growth(samples)}
    for axes, (quantity, label, unit) in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        names = [name for name in samples[0].values if name.endswith(f" {quantity}")]
        for name, colour in zip(names, COLOURS, strict=False):
            x = [s.at_s / 60 for s in samples if name in s.values]
            y = [s.values[name] / unit for s in samples if name in s.values]
            axes.plot(x, y, linewidth=1.2, color=colour, alpha=0.55, label=name.split("@")[0].split()[0])
            if name in fits:
                axes.plot(*_fitted(samples, fits[name], unit), linewidth=2, color=colour)
        axes.set_ylabel(label)
        axes.set_xlabel("minutes")
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
        if names:
            axes.legend(frameon=False, fontsize=8)
    return figure


def _fitted(samples: Sequence[Sample], fit: Growth, unit: float) -> tuple[Iterable[float], Iterable[float]]:
    """Ends of the fitted line, which passes through the mean at the middle of what was judged."""
    judged = [s.at_s for s in _behind_warm_up(samples)]
    middle = sum(judged) / len(judged)
    ends = (judged[0], judged[-1])
    return [at / 60 for at in ends], [(fit.mean + fit.per_hour * (at - middle) / 3600) / unit for at in ends]
