"""HACK's experiment: its models, prefill GPUs and data sets as far as they are public, beside what it claims."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from homkv.sim.capacity import Capacity, capacity
from homkv.sim.engine import simulate
from homkv.sim.hardware import data, find_gpu
from homkv.sim.roofline import Layout
from homkv.sim.scenario import Scenario
from homkv.sim.summary import Summary, summarize
from homkv.sim.trace import Request
from homkv.sim.workload import draw, lengths_of, mean_lengths

MODEL = "llama-3.1-70b"
PREFILL_GPUS = ("a10g", "v100", "t4", "l4", "a100")
PROFILES = ("imdb", "humaneval", "arxiv", "cocktail", "long")
LOADS = (0.5, 0.9, 1.2, 1.5)  # of what the 16-bit system can serve; above 1 its queue grows as long as requests come
OVERLAPPED = ("balanced", "small")  # homkv sends layers while the next ones compute; HACK's code and rivals do not
VARIANTS = (
    ("fp16", False), ("fp16", True), ("fp8", False), ("cachegen", False), ("cachegen-once", False), ("kvquant", False),
    ("kivi", False),
    ("hack", False), ("hack-2026", False), ("balanced", True), ("small", True),
)  # fmt: skip
ABLATIONS = (
    "hack",
    "hack:se=0",
    "hack:rqe=0",
    "hack:pi=32",
    "hack:pi=128",
    "kivi-unfused",
    "dequant-balanced",
    "balanced",
)
DECODE_LAYOUT = Layout(tensor=4)  # of A100s with 80 GB: half an instance's network
MAX_PREFILL = 16
PREFILL_MARGIN = 1.5  # prefill instances are added until they could serve this much more than decode (or 16 of them)
OnRun = Callable[[str], None]
Place = tuple[str, str, float]  # prefill GPU, profile, load


@dataclass(frozen=True)
class PaperRow:
    """One simulated run. ``reduction``: of mean JCT, by format: 1 - own / other, in the same conditions."""

    prefill_gpu: str
    profile: str
    load: float
    format: str
    overlap: bool
    num_prefill: int
    requests_per_s: float
    bottleneck: str  # of the 16-bit system
    summary: Summary

    @property
    def name(self) -> str:
        """Format, and whether layers are sent while the next ones compute."""
        return self.format + (" +overlap" if self.overlap else "")

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"kind": "sim-paper", "model": MODEL, "decode_gpu": "a100", **asdict(self)}


def deployment(prefill_gpu: str, lengths: tuple[int, int]) -> tuple[Scenario, Capacity]:
    """Prefill instances around one decode instance of four A100s, and what they can serve in 16 bits.

    The paper's numbers of instances were not seen. Prefill gets enough not to be the bottleneck, if 16 are enough.
    Every prefill instance sends through one machine's network, at the 10 to 50 Gb/s that the paper calls typical.
    """
    nic = find_gpu(prefill_gpu).nic_gbps
    link = nic if prefill_gpu != "a100" else nic / 2  # two instances of four share a machine
    base = Scenario(
        MODEL, prefill_gpu, "a100", decode_layout=DECODE_LAYOUT, link_gbps=link, ingress_gbps=200, overlap=False
    )
    if prefill_gpu == "a100":
        base = replace(base, prefill_layout=DECODE_LAYOUT)
    one = capacity(base.system(), *lengths)
    wanted = math.ceil(PREFILL_MARGIN * one.decode / one.prefill) if math.isfinite(one.decode) else MAX_PREFILL
    base = replace(base, num_prefill=min(MAX_PREFILL, max(1, wanted)))
    return base, capacity(base.system(), *lengths)


def run_paper(
    prefill_gpus: Sequence[str] = PREFILL_GPUS,
    profiles: Sequence[str] = PROFILES,
    loads: Sequence[float] = LOADS,
    variants: Sequence[tuple[str, bool]] = VARIANTS,
    num_requests: int = 500,
    seed: int = 0,
    on_run: OnRun = lambda title: None,
) -> Iterator[PaperRow]:
    """Simulate every combination; the same requests for all formats."""
    for gpu in prefill_gpus:
        for name in profiles:
            prompt, output = lengths_of(name)
            base, limit = deployment(gpu, mean_lengths(prompt, output))
            for load in loads:
                rate = load * limit.rate
                requests = draw(prompt, output, rate, num_requests, seed)
                for kv, overlap in variants:
                    on_run(f"{gpu}, {name}, load {load:g}, {kv}")
                    summary = _run(replace(base, format=kv, overlap=overlap), requests)
                    yield PaperRow(gpu, name, load, kv, overlap, base.num_prefill, rate, limit.bottleneck, summary)


def _run(scenario: Scenario, requests: Sequence[Request]) -> Summary:
    return summarize(simulate(scenario.system(), requests))


def run_ablations(
    prefill_gpu: str = "a100",
    name: str = "long",
    load: float = 0.9,
    num_requests: int = 500,
    seed: int = 0,
    on_run: OnRun = lambda title: None,
) -> Iterator[PaperRow]:
    """HACK without each of its eliminations and with other partitions, and our pages with a dequantizing kernel."""
    variants = [(kv, kv in OVERLAPPED or kv.startswith("dequant")) for kv in ABLATIONS]
    variants.append(("balanced", False))
    yield from run_paper((prefill_gpu,), (name,), (load,), variants, num_requests, seed, on_run)


def reductions(rows: Sequence[PaperRow], of: tuple[str, bool], against: tuple[str, bool]) -> dict[Place, float]:
    """``1 - JCT(of) / JCT(against)`` in every place that has both."""
    jct = {(place_of(row), row.format, row.overlap): row.summary.jct_s for row in rows}
    places = dict.fromkeys(place_of(row) for row in rows)
    both = [place for place in places if (place, *of) in jct and (place, *against) in jct]
    return {place: 1 - jct[place, *of] / jct[place, *against] for place in both}


def place_of(row: PaperRow) -> Place:
    """Prefill GPU, profile and load."""
    return row.prefill_gpu, row.profile, row.load


@dataclass(frozen=True)
class ArtifactRow:
    """A published measurement of the authors' system beside its simulation (mean of several seeds)."""

    claim: dict[str, Any]
    simulated: Summary

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"kind": "sim-artifact", **asdict(self)}


def run_artifact(seeds: int = 20, on_run: OnRun = lambda title: None) -> Iterator[ArtifactRow]:
    """The authors' own runs on two GPUs: Qwen3-8B, one prefill and one decode GPU, 10 Gb/s, no overlap.

    24 (long) or 40 (short) requests, as theirs; means over seeds, since one draw of so few scatters.
    """
    for claim in data("claims.json")["artifact"]:
        on_run(f"{claim['gpu']}, {claim['rate']} requests/s, {claim['format']}")
        scenario = Scenario(
            "qwen3-8b", claim["gpu"], claim["gpu"], claim["format"], prefill_layout=Layout(), decode_layout=Layout(),
            link_gbps=10, overlap=False, usable_memory=0.95,
        )  # fmt: skip
        prompt, output = lengths_of(claim["profile"])
        count = 24 if claim["profile"] == "long" else 40
        runs = [_run(scenario, draw(prompt, output, claim["rate"], count, seed)) for seed in range(seeds)]
        yield ArtifactRow(claim, mean_of(runs))


def mean_of(runs: Sequence[Summary]) -> Summary:
    """Field by field; phases too."""

    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values)

    names = [name for name in Summary.__dataclass_fields__ if name != "phases_s"]
    fields: dict[str, Any] = {name: mean([getattr(run, name) for run in runs]) for name in names}
    phases = {name: mean([run.phases_s[name] for run in runs]) for name in runs[0].phases_s}
    return replace(runs[0], phases_s=phases, **fields)
