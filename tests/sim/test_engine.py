"""The engine against what can be worked out by hand: conservation, closed forms, limits."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import simpy

from homkv.errors import CapacityError, TraceError
from homkv.sim.engine import Outcome, System, simulate
from homkv.sim.record import PHASES
from homkv.sim.trace import Request, poisson_arrivals
from homkv.sim.workload import draw

GBPS = 0.8  # 1e8 bytes/s


def some_requests(num: int = 300, rate: float = 3.0, seed: int = 0) -> list[Request]:
    return draw((50, 400), (1, 60), rate, num, seed)


def one(costs: Any, **options: Any) -> dict[str, float]:
    """Phases of a single request of 100 + 11 tokens."""
    tally = simulate(System(costs, **options), [Request("a", 0.0, 100, 11)]).tally
    return {name: float(tally.column(name)[0]) for name in (*PHASES, "jct_s", "ttft_s", "tpot_s", "dequantize_s")}


def columns(outcome: Outcome) -> dict[str, np.ndarray]:
    return {name: outcome.tally.column(name) for name in (*PHASES, "jct_s", "arrival_s", "ttft_s")}


def test_one_request_by_hand(round_costs: Any) -> None:
    costs = round_costs(pack_token_s=1e-4, unpack_token_s=2e-4)
    got = one(costs, egress_gbps=GBPS, ingress_gbps=GBPS, overlap=False, latency_s=0.5)
    contexts = sum(101 + i for i in range(10))  # ten steps behind the first token, which prefill made
    assert got["prefill_s"] == pytest.approx(0.1)
    assert got["pack_s"] == pytest.approx(0.01)
    assert got["transfer_s"] == pytest.approx(100_000 / 1e8 + 0.5)
    assert got["unpack_s"] == pytest.approx(0.02)
    assert got["decode_s"] == pytest.approx(10 * 0.011 + contexts * 1e-5)
    assert got["dequantize_s"] == pytest.approx(contexts * 2e-6)
    assert got["queue_s"] == got["wait_s"] == 0
    assert got["tpot_s"] == pytest.approx(got["decode_s"] / 10)


def test_phases_sum_to_the_whole_and_are_not_negative(round_costs: Any) -> None:
    system = System(round_costs(pack_token_s=1e-4), 2, 2, 0.01, 0.01, capacity_bytes=2_000_000, max_batch=4)
    for options in ({}, {"overlap": False}, {"when_full": "swap"}, {"reserves_early": True}, {"background_pack": True}):
        found = columns(simulate(replace(system, **options), some_requests()))
        total = sum(found[name] for name in PHASES)
        np.testing.assert_allclose(total, found["jct_s"], atol=1e-9)
        assert min(found[name].min() for name in PHASES) > -1e-9
        assert (found["ttft_s"] <= found["jct_s"] + 1e-12).all()


def test_bytes_and_tokens_are_conserved(round_costs: Any) -> None:
    requests = some_requests()
    outcome = simulate(System(round_costs(), 3, 2, 0.05, 0.02, capacity_bytes=3_000_000), requests)
    assert sorted(outcome.tally.ids, key=int) == [r.request_id for r in requests]
    assert outcome.sent_bytes == outcome.received_bytes == sum(1000 * r.prompt_tokens for r in requests)
    assert outcome.decoded_tokens == sum(r.output_tokens - 1 for r in requests)
    assert outcome.peak_kv_bytes <= 3_000_000


def test_an_infinite_link_equals_one_machine(round_costs: Any) -> None:
    requests = some_requests()
    unlimited = columns(simulate(System(round_costs()), requests))
    assert unlimited["transfer_s"].max() == 0
    fast = columns(simulate(System(round_costs(), egress_gbps=1e9, ingress_gbps=1e9), requests))
    np.testing.assert_allclose(fast["jct_s"], unlimited["jct_s"], atol=1e-2 * 0.03)
    by_hand = one(round_costs())
    assert by_hand["jct_s"] == pytest.approx(by_hand["prefill_s"] + by_hand["decode_s"])


def test_half_the_bytes_take_half_the_time_on_the_link(round_costs: Any) -> None:
    link = {"egress_gbps": 0.01, "ingress_gbps": 0.01, "overlap": False}
    whole, half = one(round_costs(), **link), one(round_costs(token_bytes=500), **link)
    assert half["transfer_s"] == pytest.approx(whole["transfer_s"] / 2)
    # And in a queue: with prefill and decode taking no time, the link is all there is.
    free = round_costs(prefill_token_s=1e-12, step_base_s=1e-12, step_sequence_s=0.0, per_token_s=0.0)
    requests = [Request(str(i), 0.0, 100, 1) for i in range(20)]
    times = [
        simulate(System(replace(free, token_bytes=size), **link), requests).tally.column("jct_s").mean()
        for size in (1000, 500)
    ]
    assert times[1] == pytest.approx(times[0] / 2)


def test_same_seed_same_run(round_costs: Any) -> None:
    system = System(round_costs(), 2, 2, 0.02, 0.02, capacity_bytes=2_000_000)
    first, again = (columns(simulate(system, some_requests())) for _ in range(2))
    other = columns(simulate(system, some_requests(seed=1)))
    for name in PHASES:
        assert (first[name] == again[name]).all()
    assert (first["jct_s"] != other["jct_s"]).any()


@pytest.mark.parametrize("load", [0.3, 0.7])
def test_prefill_queue_is_m_d_1(round_costs: Any, load: float) -> None:
    """Constant service, Poisson arrivals: mean wait = load D / (2 (1 - load))."""
    service = 0.1
    requests = poisson_arrivals([Request(str(i), 0.0, 100, 1) for i in range(60_000)], load / service, seed=3)
    wait = simulate(System(round_costs()), requests).tally.column("queue_s").mean()
    assert wait == pytest.approx(load * service / (2 * (1 - load)), rel=0.06)


def test_littles_law(round_costs: Any) -> None:
    """Requests in the system, counted by their arrivals and ends, against rate times mean JCT."""
    requests = some_requests(3000)
    outcome = simulate(System(round_costs(), 2, 1, 0.5, 0.5), requests)
    arrival, jct = outcome.tally.column("arrival_s"), outcome.tally.column("jct_s")
    moments = np.linspace(100, outcome.end_s - 100, 20_000)
    inside = np.searchsorted(np.sort(arrival), moments, "right") - np.searchsorted(np.sort(arrival + jct), moments)
    assert inside.mean() == pytest.approx(len(requests) / outcome.end_s * jct.mean(), rel=0.03)


def test_overlap_hides_the_link_behind_prefill(round_costs: Any) -> None:
    """Four layers of 25 ms: a fast link ends one layer after prefill, a slow one is busy from the first layer on."""
    fast = one(round_costs(), egress_gbps=0.016, ingress_gbps=0.016)  # 100 kB in 50 ms
    assert fast["transfer_s"] == pytest.approx(0.05 / 4)
    slow = one(round_costs(), egress_gbps=0.004, ingress_gbps=0.004)  # in 200 ms
    assert slow["prefill_s"] + slow["transfer_s"] == pytest.approx(0.025 + 0.2)
    packed = one(round_costs(pack_token_s=2e-4), background_pack=True)
    assert packed["pack_s"] == pytest.approx(0.02 / 4)


def test_pipeline_stages_raise_the_rate_not_the_speed(round_costs: Any) -> None:
    requests = [Request(str(i), 0.0, 100, 1) for i in range(8)]
    found = columns(simulate(System(round_costs(stages=4)), requests))
    np.testing.assert_allclose(found["prefill_s"], 0.1)
    np.testing.assert_allclose(found["queue_s"], 0.025 * np.arange(8))


def test_waits_for_room_and_swaps(round_costs: Any) -> None:
    requests = [Request(str(i), 0.0, 100, 50) for i in range(4)]
    tight = System(round_costs(), capacity_bytes=200_000, overlap=False, egress_gbps=0.1, ingress_gbps=0.1)
    free = columns(simulate(replace(tight, capacity_bytes=None), requests))
    waiting, swapping = (
        columns(simulate(replace(tight, when_full=how, swap_gbps=0.01), requests)) for how in ("wait", "swap")
    )
    assert free["wait_s"].max() < 0.05  # the step under way
    assert waiting["wait_s"].max() > 1
    assert waiting["jct_s"].mean() > free["jct_s"].mean()
    assert swapping["wait_s"][1] >= 150_000 / 1.25e6  # loaded back over a slow bus
    early = columns(simulate(replace(tight, reserves_early=True), requests))
    assert early["queue_s"].max() > waiting["queue_s"].max()


def test_max_batch_is_kept(round_costs: Any) -> None:
    requests = [Request(str(i), 0.0, 10, 20) for i in range(3)]
    alone = columns(simulate(System(round_costs(), max_batch=1), requests))
    steps = 19 * 0.011 + 1e-5 * sum(11 + i for i in range(19))
    np.testing.assert_allclose(alone["decode_s"], steps)


def test_prefix_cache_saves_prefill_and_forgets(round_costs: Any) -> None:
    shared = [Request(str(i), 100.0 * i, 1200, 2, (1, 2)) for i in range(3)]
    roomy = simulate(System(round_costs(), prefix_bytes=10**9), shared)
    np.testing.assert_allclose(roomy.tally.column("prefill_s"), [1.2, 1.2 - 1.024, 1.2 - 1.024])
    assert roomy.cached_tokens == 2 * 1024
    tiny = simulate(System(round_costs(), prefix_bytes=1000 * 512), shared)  # one block
    np.testing.assert_allclose(tiny.tally.column("prefill_s"), [1.2, 1.2 - 0.512, 1.2 - 0.512])
    whole = [Request(str(i), 100.0 * i, 512, 2, (7,)) for i in range(2)]
    again = simulate(System(round_costs(), prefix_bytes=10**9), whole)
    assert again.cached_tokens == 511  # the last token must be computed


def test_events_do_not_grow_with_requests_or_tokens(round_costs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Why a million requests take seconds: a request is a handful of events, however many come and long they are."""

    class Counting(simpy.Environment):
        count = 0

        def step(self) -> None:
            Counting.count += 1
            super().step()

    def events(requests: list[Request]) -> float:
        Counting.count = 0
        simulate(System(round_costs(), 2, 2, 0.1, 0.1), requests)
        return Counting.count / len(requests)

    monkeypatch.setattr("homkv.sim.engine.simpy.Environment", Counting)
    few, many = events(some_requests(300)), events(some_requests(3000))
    assert few < 20
    assert many == pytest.approx(few, rel=0.1)
    longer = [replace_answer(request, 30) for request in some_requests(300, rate=0.1)]
    assert events(longer) <= events(some_requests(300, rate=0.1)) * 1.3


def replace_answer(request: Request, factor: int) -> Request:
    return Request(request.request_id, request.arrival_s, request.prompt_tokens, request.output_tokens * factor)


def test_refuses_what_cannot_end(round_costs: Any) -> None:
    with pytest.raises(CapacityError, match=r"'a'.*100 \+ 11 tokens"):
        simulate(System(round_costs(), capacity_bytes=1000), [Request("a", 0.0, 100, 11)])
    with pytest.raises(CapacityError):
        simulate(System(round_costs(), capacity_bytes=1000, reserves_early=True), [Request("a", 0.0, 100, 11)])
    with pytest.raises(TraceError, match="request 2: expected arrivals in ascending order"):
        simulate(System(round_costs()), [Request("a", 5.0, 10, 1), Request("b", 1.0, 10, 1)])
    with pytest.raises(TraceError, match="at least one"):
        simulate(System(round_costs()), [])


def test_records_of_a_run_are_records(round_costs: Any) -> None:
    outcome = simulate(System(round_costs(), egress_gbps=0.1, ingress_gbps=0.1), some_requests(50))
    for record in outcome.tally.records("r"):
        assert sum(getattr(record, name) for name in PHASES) == pytest.approx(record.jct_s)
        assert record.dequantize_s is not None
        assert record.dequantize_s <= record.decode_s
