"""Validation: a record of a machine that follows the model is reproduced, one of another machine is not."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from homkv.errors import TraceError
from homkv.sim.engine import System, simulate
from homkv.sim.fitted import DECODE, POLYNOMIAL, non_negative_fit
from homkv.sim.record import RunInfo, StepSample, read_record, write_record
from homkv.sim.validate import validate
from homkv.sim.workload import draw


def steps_of(costs: Any, run_id: str = "r") -> list[StepSample]:
    """What a benchmark of this machine would have written."""
    out = [
        StepSample(run_id=run_id, stage=stage, batch=1, tokens=n, seconds=seconds)
        for n in (100, 200, 400)
        for stage, seconds in (
            ("prefill", costs.prefill_s(n, 0)),
            ("pack", costs.pack_s(n)),
            ("unpack", costs.unpack_s(n)),
        )
    ]
    for batch in (1, 4):
        for context in (100, 400):
            seconds = costs.step_s(batch) + costs.per_token_s * batch * context
            out.append(StepSample(run_id=run_id, stage="decode", batch=batch, tokens=context, seconds=seconds))
    return out


def recorded(path: Path, costs: Any, **changes: Any) -> Path:
    requests = draw((50, 400), (1, 60), 3.0, 200)
    options = {"num_decode": 2, "egress_gbps": 0.01, "ingress_gbps": 0.01, "capacity_bytes": 10**6}
    outcome = simulate(System(costs, **options), requests)
    info = RunInfo(
        run_id="r", source="replay", model="m", kv_cache_dtype="fp16", command="c", machine="x", num_decode=2,
        link_gbps=0.01, num_layers=4, kv_capacity_bytes=10**6,
    )  # fmt: skip
    write_record(path, [msgspec.structs.replace(info, **changes), *steps_of(costs), *outcome.tally.records("r")])
    return path


def test_a_faithful_record_is_reproduced(tmp_path: Path, round_costs: Any) -> None:
    costs = round_costs(pack_token_s=1e-4, unpack_token_s=2e-4)
    (found,) = validate([recorded(tmp_path / "r.jsonl", costs)])
    assert found.mean_error == pytest.approx(0, abs=1e-6)
    assert found.p99_error == pytest.approx(0, abs=1e-6)
    assert found.holds
    for phase, measured in found.measured_phases_s.items():
        assert found.simulated_phases_s[phase] == pytest.approx(measured, abs=1e-6)


def test_turns_of_one_configuration_are_pooled(tmp_path: Path, round_costs: Any) -> None:
    costs, paths = round_costs(), []
    for turn in ("a/0", "a/1", "b"):
        run = read_record(recorded(tmp_path / "r.jsonl", costs))["r"]
        lines = [run.info, *run.steps, *run.requests]
        paths.append(tmp_path / f"{turn[0]}.jsonl")
        write_record(paths[-1], [msgspec.structs.replace(line, run_id=turn) for line in lines], append=True)
    first, *_ = validate([tmp_path / "r.jsonl"])
    (both,) = validate([paths[0]])
    assert (both.run_id, both.requests) == ("a", 400)
    assert both.pairs == first.pairs * 2
    assert both.turns_jct_s == pytest.approx([first.measured_jct_s] * 2)
    assert both.noise == pytest.approx(0)
    assert both.measured_jct_s == pytest.approx(first.measured_jct_s)
    assert both.measured_phases_s == pytest.approx(first.measured_phases_s)
    (alone,) = validate([paths[2]])
    assert (alone.run_id, alone.requests) == ("b", 200)


def test_noise_is_the_farthest_turn(tmp_path: Path, round_costs: Any) -> None:
    """Turns of the same requests that took 1 and 1.5 times as long: 1.25 in the mean, each 20 % away from it."""
    run = read_record(recorded(tmp_path / "r.jsonl", round_costs()))["r"]
    for turn, times in (("a/0", 1.0), ("a/1", 1.5)):
        slow = [msgspec.structs.replace(r, jct_s=times * r.jct_s) for r in run.requests]
        lines = [msgspec.structs.replace(line, run_id=turn) for line in (run.info, *run.steps, *slow)]
        write_record(tmp_path / "a.jsonl", lines, append=True)
    (found,) = validate([tmp_path / "a.jsonl"])
    assert found.noise == pytest.approx(0.2)
    assert found.mean_error == pytest.approx(1 / 1.25 - 1)


def test_turns_beside_other_work_are_left_out(tmp_path: Path, round_costs: Any) -> None:
    run = read_record(recorded(tmp_path / "r.jsonl", round_costs()))["r"]
    for turn, load in (("a/0", "5.1 2.0 1.0"), ("a/1", "1.5 2.0 1.0")):
        lines = [msgspec.structs.replace(line, run_id=turn) for line in (run.info, *run.steps, *run.requests)]
        lines[0] = msgspec.structs.replace(lines[0], options={"load_average": load})
        write_record(tmp_path / "a.jsonl", lines, append=True)
    (both,), (quiet,) = validate([tmp_path / "a.jsonl"]), validate([tmp_path / "a.jsonl"], max_load=3.0)
    assert (len(both.turns_jct_s), len(quiet.turns_jct_s)) == (2, 1)
    assert validate([tmp_path / "a.jsonl"], max_load=1.0) == []


def test_another_link_is_noticed(tmp_path: Path, round_costs: Any) -> None:
    (found,) = validate([recorded(tmp_path / "r.jsonl", round_costs(), link_gbps=0.001)])
    assert not found.holds
    assert found.mean_error > 0.1


def test_step_times_are_needed(tmp_path: Path, round_costs: Any) -> None:
    run = read_record(recorded(tmp_path / "r.jsonl", round_costs()))["r"]
    for stage in ("prefill", "decode"):
        kept = [s for s in run.steps if s.stage != stage]
        write_record(tmp_path / "s.jsonl", [run.info, *kept, *run.requests])
        with pytest.raises(TraceError, match=f"step lines of {stage}"):
            validate([tmp_path / "s.jsonl"])
    write_record(tmp_path / "s.jsonl", [run.info, *run.steps, run.requests[0]])
    with pytest.raises(TraceError, match="at least two requests"):
        validate([tmp_path / "s.jsonl"])


def test_fits_are_never_negative_and_use_what_they_can_tell() -> None:
    def sample(batch: int, tokens: int, seconds: float) -> StepSample:
        return StepSample(run_id="r", stage="decode", batch=batch, tokens=tokens, seconds=seconds)

    exact = [sample(1, n, 0.5 + 1e-3 * n + 1e-6 * n * n) for n in (10, 100, 1000, 3000)]
    assert non_negative_fit(exact, POLYNOMIAL) == pytest.approx((0.5, 1e-3, 1e-6))
    one = non_negative_fit([sample(1, 100, 0.2)], POLYNOMIAL)
    assert sum(a * b for a, b in zip(one, (1, 100, 100**2), strict=True)) == pytest.approx(0.2)
    at_one_length = [sample(b, 1000, 0.5 + 1e-2 * b) for b in (1, 2, 4)]
    constant, *rest = non_negative_fit(at_one_length, DECODE)  # B and B * context are one there, the constant is not
    assert constant == pytest.approx(0.5)
    assert rest[0] + 1000 * rest[1] == pytest.approx(1e-2)
    falling = non_negative_fit([sample(1, 100, 0.3), sample(1, 200, 0.2), sample(1, 400, 0.1)], POLYNOMIAL)
    assert min(falling) >= 0
    assert non_negative_fit([], DECODE) == (0.0, 0.0, 0.0)
