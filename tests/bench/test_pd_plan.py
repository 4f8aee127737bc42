"""Plans of `homkv bench pd`, and the capacity that loads are shares of."""

from pathlib import Path

import pytest

from homkv.bench.generate import MODELS
from homkv.bench.pd import nixl
from homkv.bench.pd.capacity import capacity_rps
from homkv.bench.pd.forms import make_form
from homkv.bench.pd.messages import Cell
from homkv.bench.pd.options import PdOptions
from homkv.bench.pd.plan import read_plan
from homkv.bench.pd.workload import Lengths
from homkv.errors import HomkvError, ShapeError, UnsupportedError
from homkv.sim.record import StepSample

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
    lengths, form = Lengths((100, 100), (101, 101)), make_form(MODELS["tiny"], "bf16")
    cell = Cell("bf16", link, True, "exact", 4, (100, 100), 201)
    expected = expected or 1e6 / (8 * 2 * form.payload_bytes(100))
    assert capacity_rps(steps, lengths, cell, form, (1, 1), shared) == pytest.approx(expected)


@pytest.mark.parametrize("plan", sorted(PLANS.glob("*.toml")), ids=lambda path: path.stem)
def test_plans_that_come_along_can_be_read(plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each leg names what a run knows; NIXL need not be here for that."""
    monkeypatch.setattr(nixl, "is_available", lambda: True)
    legs = read_plan(plan, BASE)
    assert legs
    assert all(leg.loads or leg.rate_rps for leg in legs)
