"""Plan files: what is written is read again, and everything else is refused with its reason."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from homkv.errors import FormatError
from homkv.formats import make_codec, parse_options
from homkv.models import LoadedModel
from homkv.plan import LayerPlan, spelled

MODEL = "0123456789abcdef" * 2
LAYERS = ("k4420v2222", "k4420v2222", "k8420v4222", "k4220v2222")
PLAN = LayerPlan(MODEL, LAYERS, "mine", provenance={"seed": 3})


def test_a_file_comes_back_as_it_was(tmp_path: Path) -> None:
    PLAN.save(tmp_path / "p.json")
    found = LayerPlan.load(tmp_path / "p.json")
    assert found == PLAN
    assert found.provenance == {"seed": 3}
    assert spelled(str(tmp_path / "p.json")) == PLAN.spelling
    assert spelled("balanced") == "balanced"


def test_presets_become_their_layouts_and_names_do_not_decide_the_bytes() -> None:
    a, b = LayerPlan(MODEL, ("balanced", "small")), LayerPlan(MODEL, ("k4420v2222", "k4220v2222"), "other")
    assert a.layers == b.layers
    assert a.title == b.title
    assert a.title != LayerPlan(MODEL[::-1], a.layers).title


@given(st.lists(st.sampled_from(["k4420v2222", "k8420v4222", "k0000v0000", "k8888v8888"]), min_size=1, max_size=80))
def test_a_spelling_says_everything(layers: list[str]) -> None:
    plan = LayerPlan(MODEL, tuple(layers))
    base, options = parse_options(plan.spelling)
    assert base == "per-layer"
    found = LayerPlan.from_options(options)
    assert found.layers == plan.layers
    assert found.model == MODEL


def changed(**fields: object) -> str:
    return json.dumps(json.loads(PLAN.dumps()) | fields)


FORMATS = dict(enumerate(LAYERS))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "JSON"),
        ("[]", "fields"),
        ("[" * 100_000, "JSON"),
        (json.dumps({"homkv_plan": 1}), "fields"),
        (changed(homkv_plan=2), "schema 1"),
        (changed(format_version=99), "page format 1, found 99"),
        (changed(model="xyz"), "32 hex digits"),
        (changed(model=7), "type str"),
        (changed(num_layers=True), "type int"),
        (changed(num_layers=3), r"unknown \['3'\]"),
        (changed(num_layers=5), r"missing \['4'\]"),
        (changed(num_layers=0), "num_layers from 1"),
        (changed(num_layers=10**9), "num_layers from 1"),
        (changed(layers=FORMATS | {3: "kivi"}), "kABCDvEFGH"),
        (changed(layers=FORMATS | {3: 4}), "format names"),
        (changed(layers=FORMATS | {3: "k4420v2222w128"}), "one window"),
        (changed(layers={}), "missing"),
    ],
)
def test_a_bad_plan_is_refused_with_its_reason(text: str, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        LayerPlan.loads(text)


def test_files_that_are_no_plans(tmp_path: Path) -> None:
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe")
    (tmp_path / "large.json").write_text(" " * (2 << 20))
    for name, message in (("binary.json", "UTF-8"), ("large.json", "at most"), ("absent.json", "homkv calibrate")):
        with pytest.raises(FormatError, match=message):
            spelled(str(tmp_path / name))


@pytest.mark.parametrize(
    "options",
    [
        "model=0,version=1,layers=k4420v2222",
        f"model={MODEL},layers=k4420v2222",
        f"model={MODEL},version=2,layers=k4420v2222",
        f"model={MODEL},version=²,layers=k4420v2222",
        f"model={MODEL},version=1,layers=k4420v2222*0",
        f"model={MODEL},version=1,layers=k4420v2222*9999",
        f"model={MODEL},version=1,layers=k4420v2222//",
        f"model={MODEL},version=1,layers=k4421v2222",
        f"model={MODEL},version=1,layers=k4420v2222w7",
    ],
)
def test_a_bad_spelling_is_refused(options: str) -> None:
    with pytest.raises(FormatError):
        make_codec(f"per-layer:{options}", 64)


def test_another_model_is_refused() -> None:
    PLAN.check_model(MODEL, 4)
    with pytest.raises(FormatError, match="belongs to one model"):
        PLAN.check_model("f" * 32, 4)
    with pytest.raises(FormatError, match="5 layers, found one for 4"):
        PLAN.check_model(MODEL, 5)


KEPT = sorted((Path(__file__).parents[1] / "benchmarks" / "plans").glob("*.json"))


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.stem)
def test_kept_plans_hold_what_their_names_promise(path: Path) -> None:
    """MODEL-BITS.json: at most BITS at 32k tokens of head_dim 128, everything counted, as its provenance says."""
    plan = LayerPlan.load(path)
    model, _, budget = path.stem.rpartition("-")
    bits = make_codec(plan.spelling, 128).bits_per_element(32_768)
    assert 0.97 * float(budget) < bits <= float(budget)
    assert bits == pytest.approx(plan.provenance["bits_per_element"])
    assert plan.provenance["model"] == model
    assert len(plan.provenance["sensitivity"]) == len(plan.layers)


def test_plans_are_kept_of_three_models_for_two_budgets() -> None:
    assert len(KEPT) == 6


@pytest.mark.model
@pytest.mark.parametrize("budget", ["2.25", "2.6"])
def test_a_kept_plan_is_for_the_model_of_its_name(budget: str, smollm2: LoadedModel) -> None:
    (path,) = (p for p in KEPT if p.stem == f"smollm2-{budget}")
    LayerPlan.load(path).check_model(smollm2.fingerprint, smollm2.num_layers)
