"""Prefill and decode on one machine: each slows the other down by a factor, from when it starts until it ends."""

from typing import Any

import msgspec
import pytest

from homkv.errors import UnsupportedError
from homkv.sim.engine import System, simulate
from homkv.sim.fitted import beside, seal_per_token_s
from homkv.sim.record import Run, RunInfo, StepSample
from homkv.sim.trace import Request
from homkv.sim.workload import draw


def phases(system: System, requests: list[Request]) -> list[Any]:
    return sorted(simulate(system, requests).tally.records("r"), key=lambda r: int(r.request_id))


def test_a_prompt_beside_a_sequence_by_hand(round_costs: Any) -> None:
    """Request 0 decodes 100 steps of 0.1 s from 1 s on; request 1's prompt arrives in the middle of one of them.

    It computes from 2.05 s, 1 s of work at half speed: until 4.05 s. The step under way ends at 2.1 s; steps then take
    0.3 s, and the last of seven is under way at 4.05 s and ends at 4.2 s.
    """
    costs = round_costs(step_base_s=0.1, step_sequence_s=0.0, per_token_s=0.0)
    system = System(costs, prefill_beside=2.0, decode_beside=3.0, max_batch=2)
    first, second = phases(system, [Request("0", 0.0, 1000, 101), Request("1", 2.05, 1000, 2)])
    assert first.prefill_s == pytest.approx(1.0)
    assert second.prefill_s == pytest.approx(2.0)
    assert second.wait_s == pytest.approx(4.2 - 4.05)
    assert first.decode_s == pytest.approx(100 * 0.1 + 7 * 0.2)


def test_a_prompt_goes_on_at_full_speed_when_decoding_ends(round_costs: Any) -> None:
    """Half a second beside decoding is a quarter of the work; the rest takes 0.75 s."""
    costs = round_costs(step_base_s=0.1, step_sequence_s=0.0, per_token_s=0.0)
    system = System(costs, prefill_beside=2.0, decode_beside=1.0)
    _, second = phases(system, [Request("0", 0.0, 1000, 16), Request("1", 2.0, 1000, 2)])
    assert second.prefill_s == pytest.approx(0.5 + 0.75)


@pytest.mark.parametrize("background_pack", [False, True])
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("gbps", [0.01, None])
def test_a_factor_of_nearly_one_changes_nearly_nothing(
    round_costs: Any, background_pack: bool, overlap: bool, gbps: float | None
) -> None:
    """The mechanics of shared machines against those of machines of their own, where they must agree."""
    costs = round_costs(pack_token_s=1e-4, unpack_token_s=1e-4)
    requests = draw((50, 400), (1, 60), 1.0, 60)

    def run(**factors: float) -> list[Any]:
        system = System(
            costs, egress_gbps=gbps, ingress_gbps=gbps, background_pack=background_pack, overlap=overlap,
            capacity_bytes=10**6, **factors,
        )  # fmt: skip
        return phases(system, requests)

    for own, shared in zip(run(), run(prefill_beside=1 + 1e-9), strict=True):
        assert shared.jct_s == pytest.approx(own.jct_s, abs=1e-6)
        assert shared.transfer_s == pytest.approx(own.transfer_s, abs=1e-6)


def test_bytes_and_tokens_are_conserved(round_costs: Any) -> None:
    requests = draw((50, 400), (1, 60), 3.0, 200)
    system = System(round_costs(), egress_gbps=0.005, ingress_gbps=0.005, prefill_beside=1.7, decode_beside=2.2)
    outcome = simulate(system, requests)
    assert outcome.sent_bytes == outcome.received_bytes == sum(1000 * r.prompt_tokens for r in requests)
    assert outcome.decoded_tokens == sum(r.output_tokens - 1 for r in requests)


def test_pages_sealed_between_steps_take_time_for_each_sequence(round_costs: Any) -> None:
    """Steps of 0.1 s and 0.02 s for each sequence in them: 19 of both, one of the first alone, one of the second."""
    costs = round_costs(step_base_s=0.1, step_sequence_s=0.0, per_token_s=0.0, prefill_token_s=0.0)
    requests = [Request("0", 0.0, 1000, 21), Request("1", 0.0, 1000, 21)]
    for found in phases(System(costs, num_prefill=2, seal_per_token_s=0.02), requests):
        assert found.decode_s == pytest.approx(19 * 0.14 + 0.12)


def test_what_sealing_takes_is_by_the_token() -> None:
    info = RunInfo(run_id="r", source="replay", model="m", kv_cache_dtype="hack", command="c", machine="x")
    samples = [
        StepSample(run_id="r", stage="seal", batch=1, tokens=64, seconds=seconds) for seconds in (0.064, 0.128, 9.0)
    ]
    assert seal_per_token_s(Run(info, (), tuple(samples))) == pytest.approx(0.002)
    assert seal_per_token_s(Run(info, ())) == 0.0


@pytest.mark.parametrize(
    ("change", "expected"), [({}, 0.002), ({"machine": "another"}, 0.0), ({"kv_cache_dtype": "another"}, 0.0)]
)
def test_what_sealing_takes_may_come_from_another_record(change: dict[str, str], expected: float) -> None:
    """Of the same format on the same devices: earlier records did not time it."""
    info = RunInfo(run_id="r", source="replay", model="m", kv_cache_dtype="hack-2026", command="", machine="m")
    sample = StepSample(run_id="r", stage="seal", batch=1, tokens=64, seconds=0.128)
    later = Run(info, (), (sample,))
    assert seal_per_token_s(Run(msgspec.structs.replace(info, **change), ()), [later]) == pytest.approx(expected)


def test_a_pipeline_is_refused(round_costs: Any) -> None:
    with pytest.raises(UnsupportedError, match="expected one stage"):
        simulate(System(round_costs(stages=2), prefill_beside=2.0), [Request("0", 0.0, 10, 2)])


def test_factors_are_measured_over_fitted(round_costs: Any) -> None:
    costs = round_costs()
    info = RunInfo(run_id="r", source="replay", model="m", kv_cache_dtype="fp16", command="c", machine="x")

    def sample(stage: Any, tokens: int, seconds: float) -> StepSample:
        return StepSample(run_id="r", stage=stage, batch=1, tokens=tokens, seconds=seconds)

    at_rest = [sample("prefill", n, costs.prefill_s(n, 0)) for n in (100, 200, 400)]
    at_rest += [sample("decode", n, costs.step_s(1) + costs.per_token_s * n) for n in (100, 400)]
    assert beside(Run(info, (), tuple(at_rest))) == (1.0, 1.0)
    slow = [msgspec.structs.replace(at_rest[1], seconds=0.3, beside=True), sample("decode", 100, 0.03)]
    slow[1] = msgspec.structs.replace(slow[1], beside=True)
    assert beside(Run(info, (), (*at_rest, *slow))) == pytest.approx((0.3 / 0.2, 0.03 / 0.012))

    alone = Run(msgspec.structs.replace(info, run_id="alone"), (), tuple(at_rest))
    elsewhere = Run(msgspec.structs.replace(info, machine="y"), (), tuple(at_rest))
    measured = Run(info, (), (*at_rest, *slow))
    assert beside(alone, [alone, measured]) == beside(measured)  # its neighbours' means, where it has none
    assert beside(elsewhere, [elsewhere, measured]) == (1.0, 1.0)
