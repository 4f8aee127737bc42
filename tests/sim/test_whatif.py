"""Advice: sizes that serve the load, and an honest no."""

from dataclasses import replace

import pytest

from homkv.errors import CapacityError, UnsupportedError
from homkv.sim.capacity import capacity
from homkv.sim.scenario import Scenario
from homkv.sim.whatif import (
    UTILISATION,
    Prices,
    advise,
    lengths,
    options,
    rate_of,
    size,
    sweep_links,
    sweep_prompts,
    sweep_rates,
)
from homkv.sim.workload import draw

BASE = Scenario("llama-3.1-70b", "h100", "h100", link_gbps=25)
WORK = draw((12_000, 16_000), (256, 512), 1.0, 150)


@pytest.mark.parametrize("rate", [0.2, 3.0, 20.0])
@pytest.mark.parametrize("link", [1.0, 100.0])
def test_sizes_serve_the_load_with_no_instance_to_spare(rate: float, link: float) -> None:
    sized = size(replace(BASE, link_gbps=link), rate, 14_000, 384)
    assert capacity(sized.system(), 14_000, 384).rate * UTILISATION >= rate * (1 - 1e-9)
    for side in ("num_prefill", "num_decode"):
        if getattr(sized, side) > 1:
            smaller = replace(sized, **{side: getattr(sized, side) - 1})
            assert capacity(smaller.system(), 14_000, 384).rate * UTILISATION < rate


def test_compression_pays_on_a_slow_link_and_not_on_a_fast_one() -> None:
    slow = advise(options(BASE, WORK, Prices()))
    assert slow.worth
    assert slow.best.format in ("balanced", "small")
    short = draw((500, 1500), (100, 200), 1.0, 150)
    fast = advise(options(replace(BASE, link_gbps=400), short, Prices()))
    assert not fast.worth
    assert fast.best.format == "fp16"
    assert fast.reason.startswith("no: ")


def test_cost_follows_prices() -> None:
    (cheap,), (dear,) = (options(BASE, WORK, Prices(1, price), ("fp16",)).found for price in (1, 3))
    gpus = 2 * dear.num_decode * 4  # two more per decode GPU, four GPUs per instance
    assert dear.cost - cheap.cost == pytest.approx(gpus / 3600 / (rate_of(WORK) * lengths(WORK)[1]) * 1e6, rel=0.1)


def test_what_16_bits_cannot_hold_is_worth_compressing() -> None:
    long = draw((600_000, 600_000), (100, 100), 0.01, 3)
    found = options(BASE, long, Prices())
    assert "fp16" in found.impossible
    advice = advise(found)
    assert advice.worth
    assert "16 bits cannot serve this at all" in advice.reason


def test_refusals() -> None:
    for bad in ((-1, 1), (0, 0), (1, float("nan")), (float("inf"), 1)):
        with pytest.raises(UnsupportedError, match="prices"):
            Prices(*bad)
    with pytest.raises(UnsupportedError, match="utilisation"):
        size(BASE, 1.0, 14_000, 384, 0.0)
    with pytest.raises(UnsupportedError, match="fp16 among the formats"):
        advise(options(BASE, WORK, Prices(), ("small",)))
    with pytest.raises(CapacityError, match="2048 instances"):
        size(BASE, 1e6, 14_000, 384)
    with pytest.raises(CapacityError, match="one request of 9000000"):
        size(BASE, 1.0, 9_000_000, 384)


def test_sweeps_move_the_way_they_must() -> None:
    sized = size(BASE, 1.0, *lengths(WORK))
    links = [p.option.summary.jct_s for p in sweep_links(sized, WORK, Prices(), (5, 25, 400), ("fp16",))]
    assert links == sorted(links, reverse=True)
    rates = [p.option.summary.jct_s for p in sweep_rates(sized, WORK, Prices(), (0.5, 1.0, 2.0), ("fp16",))]
    assert rates == sorted(rates)
    points = list(sweep_prompts(BASE, WORK, Prices(), (1000, 10_000, 100_000_000), ("fp16", "small")))
    assert [(p.option.format, p.value) for p in points] == [
        (name, n) for n in (1000, 10_000) for name in ("fp16", "small")
    ]  # what never fits is left out
    assert points[2].option.cost > points[0].option.cost
    assert points[0].to_dict()["kind"] == "sim-sweep"
