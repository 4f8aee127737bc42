"""Is compressing KV worth it here? Sizes a deployment for a load in every format, simulates it, and compares."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from typing import Any

from homkv.errors import CapacityError, UnsupportedError
from homkv.sim.capacity import capacity, max_batch
from homkv.sim.engine import simulate
from homkv.sim.roofline import RooflineCosts
from homkv.sim.scenario import Scenario
from homkv.sim.summary import Summary, summarize
from homkv.sim.trace import Request, poisson_arrivals

FORMATS = ("fp16", "fp8", "balanced", "small")
UTILISATION = 0.8  # of the bottleneck's capacity, for which instances are counted: less for bursts
MAX_INSTANCES = 2048
TIE = 0.03
SECONDS_PER_HOUR = 3600
OnRun = Callable[[str], None]


@dataclass(frozen=True)
class Prices:
    """Per GPU and hour, in any currency."""

    prefill: float = 1.0
    decode: float = 1.0

    def __post_init__(self) -> None:
        if not all(0 <= price < math.inf for price in (self.prefill, self.decode)) or self.prefill + self.decode == 0:
            raise UnsupportedError(
                f"expected prices of at least 0 and one above 0, found {self.prefill}, {self.decode}"
            )


@dataclass(frozen=True)
class Option:
    """One format, sized for the load and simulated. ``cost``: per million generated tokens."""

    format: str
    num_prefill: int
    num_decode: int
    gpus: int
    bottleneck: str
    summary: Summary
    cost: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"kind": "sim-whatif", **asdict(self)}


@dataclass(frozen=True)
class Advice:
    """``best``: the option to take; ``worth``: whether it compresses. ``reason``: why, in one sentence."""

    best: Option
    worth: bool
    reason: str


def lengths(requests: Sequence[Request]) -> tuple[int, int]:
    """Mean prompt and answer, rounded up."""
    count = len(requests)
    prompt, output = sum(r.prompt_tokens for r in requests), sum(r.output_tokens for r in requests)
    return -(-prompt // count), -(-output // count)


def rate_of(requests: Sequence[Request]) -> float:
    """Requests per second between the first and the last arrival. Raises UnsupportedError if there is no such rate."""
    span = requests[-1].arrival_s - requests[0].arrival_s
    if not span > 0:
        raise UnsupportedError(
            f"expected at least two requests at different times, found {len(requests)} at one; give a rate, or more"
        )
    return (len(requests) - 1) / span


def size(
    scenario: Scenario, requests_per_s: float, prompt_tokens: int, output_tokens: int, utilisation: float = UTILISATION
) -> Scenario:
    """Fewest instances of either kind that serve the rate at this utilisation of every stage.

    Raises CapacityError if 2048 do not, or if one request does not fit; UnsupportedError for a utilisation outside
    (0, 1].
    """
    if not 0 < utilisation <= 1:
        raise UnsupportedError(f"expected a utilisation above 0 and up to 1, found {utilisation}")
    one = capacity(scenario.system(), prompt_tokens, output_tokens)
    if max_batch(scenario.system(), prompt_tokens, output_tokens) == 0:
        raise CapacityError(
            f"expected decode memory for one request of {prompt_tokens} + {output_tokens} tokens, found less on "
            f"{scenario.decode_gpu} with {scenario.format}; use more GPUs per instance"
        )
    wanted = requests_per_s / utilisation
    scaled = replace(scenario, num_prefill=_count(wanted / one.prefill), num_decode=_count(wanted / one.decode))
    while (found := capacity(scaled.system(), prompt_tokens, output_tokens)).link < wanted:
        system = scaled.system()
        egress, ingress = system.egress_gbps or math.inf, system.ingress_gbps or math.inf
        if scaled.num_prefill * egress <= scaled.num_decode * ingress:
            scaled = replace(scaled, num_prefill=_count(scaled.num_prefill * wanted / found.link))
        else:
            scaled = replace(scaled, num_decode=_count(scaled.num_decode * wanted / found.link))
    return scaled


def _count(instances: float) -> int:
    count = max(1, math.ceil(instances - 1e-9)) if math.isfinite(instances) else MAX_INSTANCES + 1
    if count > MAX_INSTANCES:
        raise CapacityError(
            f"expected a load that {MAX_INSTANCES} instances serve, found one for {instances:,.0f}; "
            "lower the rate or give instances more GPUs or network"
        )
    return count


def evaluate(scenario: Scenario, requests: Sequence[Request], prices: Prices) -> Option:
    """Simulate a sized deployment."""
    system = scenario.system()
    costs = system.costs
    assert isinstance(costs, RooflineCosts)
    prefill_gpus = scenario.num_prefill * costs.prefill_layout.gpus
    decode_gpus = scenario.num_decode * costs.decode_layout.gpus
    summary = summarize(simulate(system, requests))
    per_second = (prefill_gpus * prices.prefill + decode_gpus * prices.decode) / SECONDS_PER_HOUR
    tokens_per_s = rate_of(requests) * lengths(requests)[1]
    return Option(
        format=scenario.format,
        num_prefill=scenario.num_prefill,
        num_decode=scenario.num_decode,
        gpus=prefill_gpus + decode_gpus,
        bottleneck=capacity(system, *lengths(requests)).bottleneck,
        summary=summary,
        cost=1e6 * per_second / min(tokens_per_s, summary.tokens_per_s),
    )


@dataclass(frozen=True)
class Options:
    """``found``: what each format needs and does, in the order asked for; ``impossible``: format -> why not at all."""

    found: list[Option]
    impossible: dict[str, str]


def options(
    scenario: Scenario,
    requests: Sequence[Request],
    prices: Prices,
    formats: Sequence[str] = FORMATS,
    utilisation: float = UTILISATION,
    on_run: OnRun = lambda title: None,
) -> Options:
    """Every format in a deployment of its own size. Raises CapacityError if none can serve the load."""
    out = Options([], {})
    for name in formats:
        on_run(name)
        try:
            sized = size(scenario.with_format(name), rate_of(requests), *lengths(requests), utilisation)
            out.found.append(evaluate(sized, requests, prices))
        except CapacityError as error:
            out.impossible[name] = str(error)
    if not out.found:
        raise CapacityError(next(iter(out.impossible.values())))
    return out


def advise(options: Options, min_gain: float = 0.1) -> Advice:
    """The cheapest option, of those the fastest; the exact one unless cost or JCT fall by ``min_gain``.

    Within TIE both count as equal, and the format named first is taken: name the more exact ones first. Compression
    costs quality and is one more thing to run, so a gain below ``min_gain`` is none. Raises UnsupportedError if 16 bits
    were not among the formats.
    """
    found = options.found
    cheap = [option for option in found if option.cost <= (1 + TIE) * min(o.cost for o in found)]
    fastest = min(option.summary.jct_s for option in cheap)
    best = next(option for option in cheap if option.summary.jct_s <= (1 + TIE) * fastest)
    if "fp16" in options.impossible:
        return Advice(best, True, f"{best.format}: 16 bits cannot serve this at all: {options.impossible['fp16']}")
    exact = next((option for option in found if option.format == "fp16"), None)
    if exact is None:
        raise UnsupportedError("expected fp16 among the formats to compare with, found none; add --kv-cache-dtype fp16")
    saving, faster = 1 - best.cost / exact.cost, 1 - best.summary.jct_s / exact.summary.jct_s
    if best is exact or max(saving, faster) < min_gain:
        return Advice(exact, False, _why_not(exact, saving, faster))
    return Advice(best, True, f"{best.format}: {_change(best, exact)}{_against_fp8(found, best)}")


def _change(option: Option, other: Option) -> str:
    cost, jct = option.cost / other.cost - 1, option.summary.jct_s / other.summary.jct_s - 1
    return f"cost per token {cost:+.0%} and mean JCT {jct:+.0%} against {other.format}"


def _against_fp8(found: Sequence[Option], best: Option) -> str:
    fp8 = next((option for option in found if option.format == "fp8" and option is not best), None)
    return "" if fp8 is None else f"; {_change(best, fp8)}"


def _why_not(exact: Option, saving: float, faster: float) -> str:
    phases = exact.summary.phases_s
    largest = max(phases, key=phases.__getitem__)
    return (
        f"no: the best format changes cost by {-saving:+.0%} and mean JCT by {-faster:+.0%}; "
        f"{phases[largest] / exact.summary.jct_s:.0%} of a 16-bit JCT is {largest.removesuffix('_s')}, "
        f"{phases['transfer_s'] / exact.summary.jct_s:.0%} transfer"
    )


@dataclass(frozen=True)
class Point:
    """One run of a sweep: ``axis`` (link_gbps, requests_per_s or prompt_tokens) at ``value``."""

    axis: str
    value: float
    option: Option

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**self.option.to_dict(), "kind": "sim-sweep", "axis": self.axis, "value": self.value}


def sweep_links(
    sized: Scenario, requests: Sequence[Request], prices: Prices, gbps: Sequence[float], formats: Sequence[str]
) -> Iterator[Point]:
    """The same instances and requests behind faster and slower links."""
    for value, name in product(gbps, formats):
        yield from _served("link_gbps", value, partial(replace, sized, link_gbps=value, format=name), requests, prices)


def sweep_rates(
    sized: Scenario, requests: Sequence[Request], prices: Prices, factors: Sequence[float], formats: Sequence[str]
) -> Iterator[Point]:
    """The same instances under multiples of the load; Poisson arrivals."""
    for factor in factors:
        rate = rate_of(requests) * factor
        faster = poisson_arrivals(requests, rate)
        for name in formats:
            yield from _served("requests_per_s", rate, partial(sized.with_format, name), faster, prices)


def sweep_prompts(
    scenario: Scenario, requests: Sequence[Request], prices: Prices, tokens: Sequence[int], formats: Sequence[str],
    utilisation: float = UTILISATION,
) -> Iterator[Point]:  # fmt: skip
    """Prompts of one length each, arriving as the requests do, instances sized anew for every format and length."""
    for value in tokens:
        fixed = [Request(r.request_id, r.arrival_s, value, r.output_tokens) for r in requests]
        for name in formats:
            sizing = partial(size, scenario.with_format(name), rate_of(fixed), *lengths(fixed), utilisation)
            yield from _served("prompt_tokens", value, sizing, fixed, prices)


def _served(
    axis: str, value: float, deployment: Callable[[], Scenario], requests: Sequence[Request], prices: Prices
) -> list[Point]:
    """One point; none where this format cannot serve this here: a gap in its line says so."""
    try:
        return [Point(axis, value, evaluate(deployment(), requests, prices))]
    except CapacityError:
        return []
