"""Numbers of a measured run, and runs compared: what tables and plots show."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from homkv.bootstrap import estimate
from homkv.sim.record import PHASES, RequestRecord, Run

BASELINES = ("bf16", "fp16", "fp8")  # what others are compared with, if they ran


@dataclass(frozen=True)
class Summary:
    """Runs of one configuration; their requests are pooled. Times in seconds."""

    case: str  # what was asked of the system: the same for runs that are compared
    name: str  # of the format, and what else sets it apart
    runs: tuple[Run, ...]

    @property
    def requests(self) -> list[RequestRecord]:
        """Finished ones."""
        return [request for run in self.runs for request in run.requests]

    @property
    def options(self) -> dict[str, str]:
        """Of the first run."""
        return self.runs[0].info.options

    @property
    def peak_kv_bytes(self) -> int:
        """The most KV that a decode instance held at once."""
        return max(run.info.peak_kv_bytes or 0 for run in self.runs)

    @property
    def peak_memory_bytes(self) -> int:
        """The most memory of an instance: of its device, or resident."""
        return max(run.info.peak_memory_bytes or 0 for run in self.runs)

    def mean(self, field: str) -> float:
        """Mean of a field over requests."""
        return fmean(getattr(r, field) for r in self.requests)

    def percentile(self, field: str, percent: float) -> float:
        """Percentile of a field over requests, interpolated between neighbours."""
        return float(np.percentile([getattr(r, field) for r in self.requests], percent))

    def shares(self) -> dict[str, float]:
        """Mean seconds of every phase; they sum to the mean job completion time."""
        return {phase: self.mean(phase) for phase in PHASES}

    def mean_by_request(self) -> dict[str, float]:
        """Completion time of each request, by id: the mean over turns."""
        times: dict[str, list[float]] = {}
        for r in self.requests:
            times.setdefault(r.request_id, []).append(r.jct_s)
        return {name: fmean(values) for name, values in times.items()}

    @property
    def dequantize_s(self) -> float | None:
        """Mean seconds of decoding spent on restoring or correcting; None where that was not told apart."""
        known = [r.dequantize_s for r in self.requests if r.dequantize_s is not None]
        return fmean(known) if len(known) == len(self.requests) else None

    @property
    def throughput_rps(self) -> float:
        """Finished requests per second between the first arrival and the last token, over all runs."""
        spans = []
        for run in self.runs:
            first, last = min(r.arrival_s for r in run.requests), max(r.arrival_s + r.jct_s for r in run.requests)
            spans.append(last - first)
        return len(self.requests) / sum(spans)


def summarize(runs: Iterable[Run]) -> list[Summary]:
    """Runs that have requests, in order, by case and name. Their options ``case`` and ``variant`` say what they are."""
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        options = run.info.options
        name = f"{run.info.kv_cache_dtype} {options.get('variant', '')}".strip()
        if run.requests:
            groups.setdefault((options.get("case", run.info.run_id), name), []).append(run)
    return [Summary(case, name, tuple(members)) for (case, name), members in groups.items()]


def measured(runs: Iterable[Run]) -> list[Summary]:
    """What tables show: all runs but calibrations, case by case."""
    out = [s for s in summarize(runs) if s.options.get("load") != "calibration"]
    order = list(dict.fromkeys(s.case for s in out))
    return sorted(out, key=lambda s: order.index(s.case))


def baseline_of(summary: Summary, all_of: Sequence[Summary], name: str) -> Summary | None:
    """The run of format ``name`` in the same case, without a variant of its own."""
    return next((s for s in all_of if s.case == summary.case and s.name == name), None)


def ratio_interval(summary: Summary, baseline: Summary) -> tuple[float, float] | None:
    """Interval of 95 % of the ratio of mean completion times; None with fewer than three requests that both finished.

    Paired bootstrap: requests are drawn again, each with its mean time over turns in either format. It says what other
    requests would give, not what another turn would.
    """
    ours, theirs = (s.mean_by_request() for s in (summary, baseline))
    both = [key for key in ours if key in theirs]
    if not both:
        return None
    slowness, base = [ours[key] / theirs[key] for key in both], [theirs[key] for key in both]
    found = estimate(slowness, weights=base)  # the mean of a / b, weighted by b, is the ratio of means
    return None if found.low is None or found.high is None else (found.low, found.high)


@dataclass(frozen=True)
class RateAtP99:
    """What a format serves while its P99 stays at ``target_s``. ``is_bound``: the highest rate measured, maybe more."""

    name: str
    target_s: float
    rate_rps: float
    is_bound: bool


def rate_at_p99(points: Sequence[tuple[float, float]], target_s: float, name: str) -> RateAtP99 | None:
    """The rate at which P99 reaches ``target_s``, interpolated in ``(rate, P99)``; None if it is above everywhere."""
    points = sorted(points)
    if not points or points[0][1] > target_s:
        return None
    for (low, below), (high, above) in itertools.pairwise(points):
        if above > target_s:
            share = (target_s - below) / (above - below) if above > below else 0.0
            return RateAtP99(name, target_s, low + share * (high - low), False)
    return RateAtP99(name, target_s, points[-1][0], True)


@dataclass(frozen=True)
class Tail:
    """A format's P99 at one rate of arrivals. ``place``: workload and link; ``load``: the rate's share, as named."""

    place: str
    name: str
    load: str
    rate_rps: float
    p99_s: float


def tails(summaries: Iterable[Summary]) -> list[Tail]:
    """Of records of `homkv bench pd`, whose options have loads and rates; of others nothing."""
    return [
        Tail(place_of(s), s.name, s.options["load"], float(s.options["rate_rps"]), s.percentile("jct_s", 99))
        for s in summaries
        if "rate_rps" in s.options
    ]


def rates_at_p99(tails: Sequence[Tail], load: str) -> list[tuple[str, RateAtP99]]:
    """What every format serves while its P99 is at most 16 bits' at ``load``, by place.

    Nothing where only one load was measured.
    """
    out = []
    for place in dict.fromkeys(t.place for t in tails):
        here = [t for t in tails if t.place == place]
        target = next((t for t in here if (t.name, t.load) == (BASELINES[0], load)), None)
        if target is None or len({t.load for t in here}) < 2:
            continue
        for name in dict.fromkeys(t.name for t in here):
            rate = rate_at_p99([(t.rate_rps, t.p99_s) for t in here if t.name == name], target.p99_s, name)
            if rate is not None:
                out.append((place, rate))
    return out


def place_of(s: Summary) -> str:
    """Workload and link."""
    return s.case.rsplit(", ", 1)[0]
