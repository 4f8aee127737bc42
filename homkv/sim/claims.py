"""The paper's numbers beside simulated ones: every prefill GPU and data set, and what it says of parts of the time."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from homkv.sim.hardware import data, find_model
from homkv.sim.paper import PaperRow, Place, place_of
from homkv.sim.record import PHASES

Range = tuple[float, float]
DATA_SETS = ("imdb", "humaneval", "arxiv", "cocktail")  # the paper's four
RIVALS = ("fp16", "cachegen", "kvquant")  # against which it gives reductions


@dataclass(frozen=True)
class GridRow:
    """HACK's reduction of mean JCT in one place, by rival; ``published``: the paper's, None where it was not seen.

    ``limit``: the 16-bit system's bottleneck. ``shares``: of a 16-bit JCT, by phase: what a smaller KV can save.
    """

    place: Place
    simulated: dict[str, float]
    published: dict[str, Range | None]
    limit: str
    shares: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"kind": "sim-paper-grid", **asdict(self)}


@dataclass(frozen=True)
class PartRow:
    """One published number and the range simulated over its places, by load. ``why``: reasons for what differs."""

    what: str
    published: Range
    simulated: dict[float, Range]
    why: str

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"kind": "sim-paper-part", **asdict(self)}


Runs = dict[Place, dict[str, PaperRow]]  # by format, without overlap, as the paper's systems are


def by_place(rows: Iterable[PaperRow]) -> Runs:
    """Runs that send when prefill is done, by place and format."""
    out: Runs = {}
    for row in rows:
        if not row.overlap:
            out.setdefault(place_of(row), {})[row.format] = row
    return out


def grid(rows: Sequence[PaperRow]) -> list[GridRow]:
    """Every prefill GPU and data set, at the highest load that the 16-bit system can serve, else at the lowest."""
    loads = {row.load for row in rows}
    load = max((x for x in loads if x <= 1), default=min(loads))
    out = []
    for place, runs in by_place(rows).items():
        if place[2] != load or not {"hack", *RIVALS} <= runs.keys():
            continue
        exact = runs["fp16"].summary
        simulated = {name: 1 - runs["hack"].summary.jct_s / runs[name].summary.jct_s for name in RIVALS}
        published = {name: _published(place[0], place[1], name) for name in RIVALS}
        shares = {phase: exact.phases_s[phase] / exact.jct_s for phase in PHASES}
        out.append(GridRow(place, simulated, published, runs["fp16"].bottleneck, shares))
    return out


def _published(gpu: str, profile: str, against: str) -> Range | None:
    """The paper's reduction; where it gives one range for its four data sets, each of them has that."""
    for claim in data("claims.json")["paper"]:
        covered = DATA_SETS if claim["profile"] == "all four" else (claim["profile"],)
        if (claim["prefill_gpu"], claim["against"]) == (gpu, against) and profile in covered:
            low, high = claim["reduction"]
            return low, high
    return None


def parts(rows: Sequence[PaperRow], ablations: Sequence[PaperRow]) -> list[PartRow]:
    """What the paper says of bytes, phases and ablations; the last are simulated at their own load only."""
    out = []
    for claim in data("claims.json")["parts"]:
        runs = by_place(ablations if claim["kind"] == "ablation" else rows)
        values: dict[float, list[float]] = {}
        for (gpu, profile, load), members in runs.items():
            if profile in claim["profiles"] and gpu == claim.get("gpu", gpu):
                values.setdefault(load, []).extend(_values(claim, members))
        low, high = claim["published"]
        simulated = {load: (max(v) if claim.get("most") else min(v), max(v)) for load, v in values.items() if v}
        out.append(PartRow(claim["what"], (low, high), simulated, claim["why"]))
    return out


def _values(claim: dict[str, Any], runs: dict[str, PaperRow]) -> list[float]:
    """A claim's quantity for every format and rival of one place; without those that did not run."""
    usual = ["hack" if claim["kind"] == "ablation" else "fp16"]
    formats, rivals = ([runs[name] for name in claim.get(key, usual) if name in runs] for key in ("of", "against"))
    return [_quantity(claim, row, rival) for row in formats for rival in rivals]


def _quantity(claim: dict[str, Any], row: PaperRow, rival: PaperRow) -> float:
    ours, theirs, kind = row.summary, rival.summary, claim["kind"]
    if kind == "bytes":
        return ours.wire_bytes / theirs.wire_bytes
    if kind == "overhead":
        return ours.dequantize_s / ours.jct_s
    if kind == "ablation":
        return ours.jct_s / theirs.jct_s - 1
    if kind == "memory":
        weights = find_model(row.model).weight_bytes
        return 1 - (weights + ours.peak_kv_bytes) / (weights + theirs.peak_kv_bytes)
    spent, before = (sum(s.phases_s[phase] for phase in claim["phases"]) for s in (ours, theirs))
    return spent / ours.jct_s if kind == "share" else 1 - spent / before if before else 0.0
