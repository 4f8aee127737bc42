"""Plans of `homkv bench pd`, and the capacity that loads are shares of."""

from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest

from homkv.bench.generate import MODELS
from homkv.bench.pd.capacity import capacity_rps
from homkv.bench.pd.estimate import estimates, seal_per_token_s
from homkv.bench.pd.forms import make_form
from homkv.bench.pd.options import PdOptions
from homkv.bench.pd.plan import read_plan
from homkv.bench.pd.points import Point, cell_of, walk
from homkv.bench.pd.workload import Lengths
from homkv.errors import HomkvError, ShapeError, UnsupportedError
from homkv.sim.record import StepSample, read_record

PLANS = Path(__file__).parents[2] / "benchmarks" / "plans"
BASE = PdOptions(("cpu",), ("cpu",), Path("unused"), model="tiny", workloads=("tiny",))


def test_legs_change_what_they_name(tmp_path: Path) -> None:
    plan = tmp_path / "plan.toml"
    plan.write_text('[[leg]]\nlinks = ["2"]\nrequests = 3\n[[leg]]\noverlaps = [false]\n')
    first, second = read_plan(plan, BASE)
    assert (first.links, first.requests, first.overlaps) == (("2",), 3, BASE.overlaps)
    assert (second.links, second.overlaps) == (BASE.links, (False,))


@pytest.mark.parametrize(
    ("text", "error"),
    [("", UnsupportedError), ("[[leg]]\nspeed = 3\n", UnsupportedError), ("[[leg]]\nrequests = 0\n", ShapeError)],
)
def test_what_is_no_plan_is_refused(tmp_path: Path, text: str, error: type[HomkvError]) -> None:
    plan = tmp_path / "plan.toml"
    plan.write_text(text)
    with pytest.raises(error):
        read_plan(plan, BASE)


@pytest.mark.parametrize(
    ("link", "shared", "expected"), [("direct", False, 2.0), ("direct", True, 1 / 0.75), ("1e-3", False, None)]
)
def test_the_slowest_stage_sets_the_rate(link: str, shared: bool, expected: float | None) -> None:
    """Prefill 0.5 s; an answer of 101 tokens in steps of 10 ms, four at once: 0.25 s."""
    steps = [
        StepSample(run_id="", stage="prefill", batch=1, tokens=100, seconds=0.5),
        StepSample(run_id="", stage="decode", batch=4, tokens=100, seconds=0.01),
        StepSample(run_id="", stage="prefill", batch=1, tokens=100, seconds=9.0, beside=True),
    ]
    leg = replace(
        BASE, prefill_devices=("cuda:0",), decode_devices=("cuda:0" if shared else "cuda:1",), slots=4,
        lengths={"tiny": Lengths((100, 100), (101, 101))},
    )  # fmt: skip
    base = Point("tiny", cell_of(leg, "tiny", "bf16", link, True), 0.0, [], 0.0)
    expected = expected or 1e6 / (8 * 2 * make_form(MODELS["tiny"], "bf16").payload_bytes(100))
    assert capacity_rps(leg, base, steps) == pytest.approx(expected)


def two_legs(plan: Path, first: str, second: str) -> list[PdOptions]:
    common = '[[leg]]\nformats = ["bf16"]\nlinks = ["10"]\n'
    plan.write_text(f"{common}{first}\n{common}{second}\n")
    return read_plan(plan, BASE)


def test_legs_that_differ_without_saying_so_are_refused(tmp_path: Path) -> None:
    """Cells have names; of two cells of one name the second would never be measured."""
    for change in ("slots = 2", "requests = 3"):
        with pytest.raises(ShapeError, match=r"found tiny/10/bf16/overlap/0\.5/0 with other slots or requests"):
            two_legs(tmp_path / "plan.toml", "", change)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("rate_rps = 2.0", "rate_rps = 3.0"),
        ("rate_rps = 2.0", 'rate_rps = 2.0\nprefill = "int8"'),
        ("rate_rps = 2.0", "rate_rps = 2.0\nkv_budget_gib = 1.0"),
        ("loads = [0.8]", "loads = [1.0]"),
    ],
)
def test_cells_that_differ_have_names_of_their_own(tmp_path: Path, first: str, second: str) -> None:
    legs = two_legs(tmp_path / "plan.toml", first, second)
    names = [point.run_id for _, point in walk(legs, lambda leg, base: 1.0, ())]
    assert len(set(names)) == len(names) == 2


@pytest.mark.parametrize("plan", sorted(PLANS.glob("*.toml")), ids=lambda path: path.stem)
def test_plans_that_come_along_can_be_read_and_estimated(plan: Path) -> None:
    """Each leg names what a run knows; neither GPUs nor NIXL need be here for that."""
    devices = ("cuda:0",), (("cuda:0",) if "one-gpu" in plan.stem else ("cuda:1",))
    rows = list(estimates(read_plan(plan, PdOptions(*devices, Path("unused"))), "h100"))
    assert len({row.point.run_id for row in rows}) == len(rows) >= 10
    assert all(1.0 < row.jct_s < row.seconds < 120.0 for row in rows)


def test_estimates_are_near_what_was_measured() -> None:
    """The first plan's cells on two H100s took 7.8 to 22 s each, at the rates that the record has."""
    record = read_record(PLANS.parent / "results" / "pd-h100x2-plan.jsonl")
    legs = read_plan(PLANS / "pd-two-gpus.toml", PdOptions(("cuda:0",), ("cuda:1",), Path("unused")))
    checked = 0
    for row in estimates(legs, "h100"):
        run = record.get(row.point.run_id.rpartition("/")[0])  # turns were not told apart then
        if run is not None:
            assert row.point.rate_rps == pytest.approx(float(run.info.options["rate_rps"]), rel=0.2)
            assert row.jct_s == pytest.approx(fmean(r.jct_s for r in run.requests), rel=0.2)
            checked += 1
    assert checked >= 20


def test_only_what_seals_between_steps_is_charged_for_it() -> None:
    shape = MODELS["llama-3.1-8b"]
    charged = {
        name for name in ("bf16", "fp8", "hack-2026", "small", "balanced") if seal_per_token_s(make_form(shape, name))
    }
    assert charged == {"hack-2026"}
    record = read_record(PLANS.parent / "results" / "pd-h100x2-64k.jsonl").values()
    measured = [s.seconds / s.tokens for run in record for s in run.steps if s.stage == "seal"]
    assert min(measured) < seal_per_token_s(make_form(shape, "hack-2026")) < max(measured)
