"""HACK's experiment: its models, prefill GPUs and data sets as far as they are public, beside what it claims."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from homkv.sim.capacity import Capacity, capacity
from homkv.sim.engine import simulate
from homkv.sim.hardware import data, find_gpu, find_model
from homkv.sim.roofline import Layout, smallest_layout
from homkv.sim.scenario import Scenario, nic_gbps
from homkv.sim.summary import Summary, summarize
from homkv.sim.trace import Request
from homkv.sim.workload import draw, lengths_of, mean_lengths

MODEL = "llama-3.1-70b"  # of the paper's best case
DECODE_GPU = "a100"
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
MAX_PREFILL = 16
PREFILL_MARGIN = 1.5  # prefill instances are added until they could serve this much more than decode (or 16 of them)
OnRun = Callable[[str], None]
Place = tuple[str, str, float]  # prefill GPU, profile, load


@dataclass(frozen=True)
class PaperRow:
    """One simulated run."""

    model: str
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
        return {"kind": "sim-paper", "decode_gpu": DECODE_GPU, **asdict(self)}


def deployment(prefill_gpu: str, lengths: tuple[int, int], model: str = MODEL) -> tuple[Scenario, Capacity]:
    """Prefill instances around one decode instance, and what they can serve in 16 bits.

    The paper's numbers of instances were not seen. An instance is the fewest GPUs that hold the weights; prefill gets
    enough instances not to be the bottleneck, if 16 are enough. Each sends through its share of one machine's network,
    at the 10 to 50 Gb/s that the paper calls typical.
    """
    shape, prefill, decode = find_model(model), find_gpu(prefill_gpu), find_gpu(DECODE_GPU)
    layout, decode_layout = smallest_layout(shape, prefill, pipeline=True), smallest_layout(shape, decode)
    base = Scenario(
        model,
        prefill_gpu,
        DECODE_GPU,
        prefill_layout=layout,
        decode_layout=decode_layout,
        link_gbps=min(prefill.nic_gbps, nic_gbps(prefill, layout)),
        ingress_gbps=nic_gbps(decode, decode_layout),
        overlap=False,
    )
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
    model: str = MODEL,
    on_run: OnRun = lambda title: None,
) -> Iterator[PaperRow]:
    """Simulate every combination; the same requests for all formats."""
    for gpu, name in itertools.product(prefill_gpus, profiles):
        prompt, output = lengths_of(name)
        base, limit = deployment(gpu, mean_lengths(prompt, output), model)
        for load in loads:
            rate = load * limit.rate
            requests = draw(prompt, output, rate, num_requests, seed)
            for kv, overlap in variants:
                on_run(f"{gpu}, {name}, load {load:g}, {kv}")
                summary = _run(replace(base, format=kv, overlap=overlap), requests)
                place = (base.model, gpu, name, load, kv, overlap, base.num_prefill, rate)
                yield PaperRow(*place, limit.bottleneck, summary)


def _run(scenario: Scenario, requests: Sequence[Request]) -> Summary:
    return summarize(simulate(scenario.system(), requests))


def run_ablations(
    prefill_gpu: str = "a100",
    names: Sequence[str] = ("long",),
    load: float = 0.9,
    num_requests: int = 500,
    seed: int = 0,
    model: str = MODEL,
    on_run: OnRun = lambda title: None,
) -> Iterator[PaperRow]:
    """HACK without each of its eliminations and with other partitions, and our pages with a dequantizing kernel."""
    variants = [(kv, kv in OVERLAPPED or kv.startswith("dequant")) for kv in ABLATIONS]
    variants.append(("balanced", False))
    yield from run_paper((prefill_gpu,), names, (load,), variants, num_requests, seed, model, on_run)


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
