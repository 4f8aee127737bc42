"""Formats on texts: exact ones lose nothing, coarser ones lose more, results resume, and reports say what was found."""

import json
import math
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest
import torch
from eval_cases import ids, text, tiny

from homkv import cli
from homkv.bootstrap import Estimate, difference, estimate, resolved, share
from homkv.errors import FormatError, ShapeError
from homkv.eval.code import Problem
from homkv.eval.encoding import HostEncodedRows, encoded_on_host
from homkv.eval.exact import continue_greedily, run_exact
from homkv.eval.forced import passes, score, write
from homkv.eval.gate import Gate, Threshold, check, load_gate
from homkv.eval.items import Item, Options, make_items
from homkv.eval.jsonl import append_jsonl
from homkv.eval.metrics import edit_similarity, first_miss, kl_divergence, token_scores
from homkv.eval.record import CALIBRATION, MODEL_BF16, Case, Size, Speed, read_records, rounded
from homkv.eval.report import make_report, markdown, notes
from homkv.eval.run import Conditions, measure_cases
from homkv.eval.sizes import measure_size, measure_sizes, measure_speed
from homkv.eval.summary import Choices, summarize, unresolved
from homkv.formats import make_codec
from homkv.formats.rows import RowsCodec
from homkv.models import BUNDLES, LoadedModel
from homkv.plan import LayerPlan

GATES = Path(__file__).parents[2] / "benchmarks" / "gates"


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return tiny()


# -- metrics ----------------------------------------------------------------------------------------------------------


def test_kl_of_known_distributions() -> None:
    p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log() + 3
    expected = 0.5 * math.log(2) + 0.5 * math.log(0.5 / 0.75)
    assert float(kl_divergence(p, q)) == pytest.approx(expected, rel=1e-6)
    scores = token_scores(p, q, torch.tensor([0]))
    assert scores.nll == [pytest.approx(math.log(4), rel=1e-6)]
    assert (scores.top1, scores.hit) == ([0], [0])
    with pytest.raises(ShapeError, match="the same tokens"):
        token_scores(p, q[:, :1], torch.tensor([0]))


def test_edit_similarity_and_first_miss() -> None:
    assert edit_similarity("kitten", "sitting") == pytest.approx(1 - 3 / 7)
    assert edit_similarity("", "") == 1
    assert edit_similarity("abc", "") == 0
    assert [first_miss(x) for x in ([1, 1, 0, 1], [0], [1, 1])] == [2, 0, 2]


def test_intervals_cover_the_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for _ in range(200):
        found = estimate(torch.randn(30, generator=generator).tolist())
        assert found.low is not None
        assert found.high is not None
        hits += found.low < 0 < found.high
    assert 170 <= hits <= 200  # 95 % asked for; the percentile bootstrap of 30 is a little narrow
    assert estimate([1.0, 3.0], [3.0, 1.0]).mean == 1.5
    assert estimate([1.0, 2.0]).low is None
    assert not resolved(difference([1.0, 2.0, 3.0, 4.0], [2.0, 1.0, 4.0, 3.0]))
    assert resolved(difference([1.0, 2.0, 3.0, 4.0], [0.5, 1.4, 2.5, 3.4]))
    with pytest.raises(ShapeError, match="same texts"):
        difference([1.0], [1.0, 2.0])
    assert [round(x or 0, 3) for x in vars(share(8, 8)).values()] == [1, 0.676, 1]  # Wilson 1927
    assert [round(x or 0, 3) for x in vars(share(1, 10)).values()] == [0.1, 0.018, 0.404]
    with pytest.raises(ShapeError, match="one prompt"):
        share(0, 0)


# -- formats on texts -------------------------------------------------------------------------------------------------


def test_16_bit_kv_is_the_exact_model_and_fewer_bits_lose_more(loaded: LoadedModel) -> None:
    exact = run_exact(loaded, ids(321), 280, record=True)
    names = ("fp16", "int8", "near-lossless", "small")
    found = {name: score(loaded, [exact], name, impl="reference")[0] for name in names}
    losses = [sum(scores.kl) for scores, _ in found.values()]
    assert losses[0] < 1e-4
    assert losses == sorted(losses)
    scores, errors = found["small"]
    assert len(scores.kl) == 40
    assert torch.tensor(errors).shape == (2, 2)
    assert max(found["fp16"][1][0]) < 0.01 < min(errors[0])


def test_passes_end_where_a_page_is_sealed() -> None:
    codec = make_codec("balanced", 64)
    cuts = list(passes(codec, 100, 400))
    assert cuts[0][0] == 100
    assert cuts[-1][1] == 400
    assert all(a[1] == b[0] for a, b in pairwise(cuts))
    assert all(codec.num_pages(start) == codec.num_pages(stop - 1) for start, stop in cuts)


def test_quantized_prefill_loses_at_least_as_much(loaded: LoadedModel) -> None:
    exact = run_exact(loaded, ids(321), 280)
    once, all_the_way = (
        sum(score(loaded, [exact], "small", impl="reference", prefill=p)[0][0].kl) for p in ("exact", "quantized")
    )
    assert all_the_way > once > 0


def test_writing_follows_the_exact_model_as_far_as_it_can(loaded: LoadedModel) -> None:
    start = ids(200)
    exact = run_exact(loaded, torch.cat((start, continue_greedily(loaded, start[None], 12)[0])), 199)
    tokens = write(loaded, exact, "fp16", 0)
    assert tokens == exact.ids[200:].tolist()
    assert write(loaded, exact, "small", 5)[:5] == tokens[:5]


def test_sizes_and_speed(loaded: LoadedModel) -> None:
    exact = run_exact(loaded, ids(301), 300)
    size = measure_size(loaded, exact, "balanced")
    assert size.stored == pytest.approx(make_codec("balanced", 64).bits_per_element(300))
    assert size.sent == pytest.approx(size.stored)
    assert size.stored_32k == pytest.approx(make_codec("balanced", 128).bits_per_element(32768))
    packed = measure_size(loaded, run_exact(loaded, ids(401), 400), "cachegen")
    assert packed.sent < packed.stored == 16
    speed = measure_speed(loaded, "balanced", 300)
    assert speed.microseconds > 0
    assert speed.peer.startswith("torch matmul")
    assert min(speed.ratios) > 0
    assert speed.layers == 2  # each with its own KV, as in a decode step
    assert measure_speed(loaded, "balanced", 300, "reference").layers == 1


# -- runs, reports, gates ---------------------------------------------------------------------------------------------


def test_a_run_resumes_and_reports(loaded: LoadedModel, tmp_path: Path) -> None:
    items = [text(f"text-{i}", 260, 220, i) for i in range(3)]
    path, steps = tmp_path / "run.jsonl", []
    conditions = Conditions(("small", "int8"))
    cases = measure_cases(loaded, items, conditions, path, steps.append)
    assert len(cases) == len(steps) == 3 * 4
    before = path.read_bytes()
    path.write_bytes(before[:-20])  # a line that an interruption cut off
    again = measure_cases(loaded, items, conditions, path)
    assert [c.key for c in again] == [c.key for c in cases]
    assert len(read_records(path)) == 12
    for name in ("small", "int8"):
        append_jsonl(path, measure_size(loaded, run_exact(loaded, ids(230), 200), name))
    report = make_report(read_records(path))
    assert next(s.format for s in report.summaries) == "exact"
    assert {s.format for s in report.summaries} == {"exact", "model-bf16", "int8", "small"}
    small = next(s for s in report.summaries if s.format == "small")
    assert small.num_tokens == 3 * 39
    assert len(small.drift) == 4
    page = markdown(report, "homkv eval", ["a.png"])
    assert page.count("\n| small |") == 4  # the main table, intervals, choices and drift
    assert "![a.png](a.png)" in page
    json.dumps(report.as_json())


def test_sizes_are_measured_once(loaded: LoadedModel) -> None:
    known: set[str] = set()
    for _ in range(2):
        found = list(measure_sizes(loaded, ids(201), ("small", "fp16"), known, speed_context=256))
        assert len(found) == (0 if known else 4)
        known |= {record.key for record in found}


def test_a_plan_has_sizes_and_a_speed(loaded: LoadedModel) -> None:
    plan = LayerPlan(loaded.fingerprint, ("k4420v2222w128", "k8444v4444w128")).spelling
    size, speed = measure_sizes(loaded, ids(201), (plan,), (), speed_context=300)
    assert isinstance(size, Size)
    halves = [make_codec(name, 128).bits_per_element(32768) for name in ("k4420v2222w128", "k8444v4444w128")]
    assert size.stored_32k == pytest.approx(sum(halves) / 2)
    assert isinstance(speed, Speed)
    assert speed.microseconds > 0


def test_a_format_that_cannot_hold_the_numbers_is_recorded_and_the_run_goes_on(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, items, conditions = tmp_path / "f.jsonl", [text("t", 200, 180, 3)], Conditions(("small", "int8"), bf16=False)
    with monkeypatch.context() as patch:
        patch.setattr(RowsCodec, "encode", lambda *_: (_ for _ in ()).throw(FormatError("expected less")))
        failed = measure_cases(loaded, items, replace(conditions, impl="reference"), path)
    assert [c.error for c in failed] == [None, "FormatError: expected less", "FormatError: expected less"]
    report = make_report(read_records(path))
    assert [s.format for s in report.summaries] == ["exact"]
    assert len(report.failed) == 2
    assert any("expected less" in note for note in notes(report))
    again = measure_cases(loaded, items, replace(conditions, impl="reference"), path)
    assert [c.error for c in again] == [None] * 3  # tried again


def test_formats_write_code_and_continuations_by_themselves(loaded: LoadedModel, tmp_path: Path) -> None:
    start = tuple(ids(180, 5).tolist())
    problem = Problem("T/0", "def f():\n", "f", "    return 1\n", "def check(f):\n    assert f() == 1\n")
    items = [Item("code", "T/0", start, 179, 8, problem), Item("greedy", "g", start, 179, 8)]
    cases = measure_cases(loaded, items, Conditions(("fp16", "k2000v2000"), run_code=True), tmp_path / "w.jsonl")
    assert not any(c.error for c in cases)
    written = {c.format: c for c in cases if c.task == "code"}
    assert written["exact"].similarity == written["fp16"].similarity == 1
    assert written["fp16"].text == written["exact"].text
    assert (written["k2000v2000"].similarity or 0) < 1
    assert {c.passed for c in written.values()} == {False, None}  # random weights write no program
    rows = {s.format: s for s in summarize(cases)}
    exact, coarse = rows["exact"], rows["k2000v2000"]
    assert exact.diverges is not None
    assert coarse.diverges is not None
    assert coarse.diverges.mean < exact.diverges.mean == 8
    assert (str(exact.stayed), str(coarse.stayed)) == ("1/1", "0/1")
    assert exact.similarity is not None
    blank = [msgspec.structs.replace(c, text=" \n", similarity=1.0) for c in cases if c.task == "code"]
    assert {(s.similarity, s.num_blank) for s in summarize(blank) if s.format != MODEL_BF16} == {(None, 1)}
    assert any("with nothing" in note for note in notes(make_report(blank)))


def test_scores_that_are_not_finite_are_never_written() -> None:
    assert rounded([0.123456789]) == [0.12346]
    for value in (math.nan, math.inf):
        with pytest.raises(FormatError, match="finite"):
            rounded([1.0, value])


def test_the_reference_on_a_gpu_encodes_the_same_bytes_on_the_host() -> None:
    k, v = torch.randn(2, 3, 128, 64, generator=torch.Generator().manual_seed(0))
    plan = LayerPlan("0" * 32, ("k4420v2222", "k8444v4444"))
    gpu = torch.device("meta")  # any that is not the CPU
    for codec in (make_codec("small", 64, list(range(63, -1, -1))), make_codec(plan.spelling, 64)):
        assert encoded_on_host(codec, "reference", torch.device("cpu")) is codec
        assert encoded_on_host(codec, "triton", gpu) is codec
        host = encoded_on_host(codec, "reference", gpu)
        assert host.layout_id == codec.layout_id
        for layer in range(2):
            mine = host.at_layer(layer, 2)
            assert isinstance(mine, HostEncodedRows)
            assert torch.equal(mine.encode(k, v), codec.at_layer(layer, 2).encode(k, v))


def case(name: str, item: str, kl: list[float], task: str = "text", hit: str = "11") -> Case:
    return Case(f"{name}{item}", "m", name, task, item, "exact", 9, kl, [1.0] * len(kl), "1" * len(kl), hit)


HITS = {MODEL_BF16: "110", "a": "100", "same": "110"}  # of greedy continuations


def test_lengths_and_prefills_are_not_mixed() -> None:
    plan = LayerPlan("0" * 32, ("small", "balanced"))
    texts = [case("a", f"{i}", [0.1] * 4) for i in range(3)]
    longer = [msgspec.structs.replace(case("a", f"x{i}", [0.9] * 8), prefix=6000) for i in range(2)]
    stored = [msgspec.structs.replace(case(plan.spelling, f"q{i}", [0.5] * 4), prefill="quantized") for i in range(2)]
    report = make_report([*longer, *texts, *stored, case("a", "c", [7.0] * 4, CALIBRATION)])
    assert str(report.main) == "9 + 4"
    (row,) = report.summaries
    twice = [case("k4420v2222", "0", [0.1] * 4), case("balanced", "1", [0.1] * 4)]  # one format by two names
    assert [s.format for s in make_report(twice).summaries] == ["balanced"]
    newer = msgspec.structs.replace(texts[0], key="by another implementation", kl=[0.4] * 4)
    (again,) = make_report([*texts, newer]).summaries
    assert again.num_texts == 3  # not four
    assert again.kl is not None
    assert again.kl.mean == pytest.approx(0.2)
    assert row.kl is not None
    assert row.kl.mean == pytest.approx(0.1)
    assert {str(s): list(rows) for s, rows in report.others.items()} == {
        "9 + 4, quantized prefill": [plan.spelling],
        "6,000 + 8": ["a"],
    }
    page = markdown(report, "homkv eval", [])
    assert f"| plan 2.40 w64 {plan.title[-6:]} | 0.5000 | – |" in page
    assert "| a | – | 0.9000 |" in page
    assert "## Drift" in page  # of the longest tail
    assert "| a | 0.9000 | 0.9000 | 0.9000 | 0.9000 |" in page


def test_summaries_count_and_say_what_is_not_resolved() -> None:
    texts = [case("a", f"{i}", [0.1 + 0.01 * i] * 4) for i in range(4)]
    texts += [case("b", f"{i}", [0.1 + 0.01 * (i ^ 1)] * 4) for i in range(4)]
    texts += [case("c", f"{i}", [0.3 + 0.01 * i] * 4) for i in range(4)]
    keys = [case("a", "k", [0.0] * 2, "passkey", "11"), case("a", "l", [0.0] * 2, "passkey", "10")]
    a, *_ = summarize([*texts, *keys])
    assert str(a.passkey) == "1/2"
    assert a.passkey.tokens == 0.75
    assert str(a.copy) == "–"
    assert a.kl is not None
    assert a.kl.mean == pytest.approx(0.115)
    assert a.perplexity == pytest.approx(math.e)
    assert a.perplexity_ratio is None  # nothing to compare with
    assert unresolved(texts) == [("a", "b")]


def test_other_choices_are_counted_against_bfloat16_over_all_lengths() -> None:
    flags = {"a": ["1101", "11111110"], MODEL_BF16: ["0101", "11110000"], "b": ["1111"]}
    cases = [
        msgspec.structs.replace(case(name, f"{i}", [0.1] * len(top1)), prefix=9 + i, top1=top1)
        for name, texts in flags.items()
        for i, top1 in enumerate(texts)
    ]
    found = make_report(cases).choices
    assert found["a"] == Choices(12, pytest.approx(2 / 12), pytest.approx(6 / 12), Estimate(-4 / 12, None, None))
    assert found["b"].tokens == 4  # of the text that both have
    page = markdown(make_report(cases), "homkv eval", [])
    assert "| a | 12 | 166.7 | 500.0 | -333.3 |" in page


def test_intervals_of_the_rest_are_paired_with_the_model_itself() -> None:
    loss = msgspec.structs.replace(case("a", "0", [0.1, 0.1, 0.1, 0.5]), nll=[2.0] * 4)
    greedy = [case(name, f"g{i}", [0.0] * 3, "greedy", hit) for name, hit in HITS.items() for i in range(3)]
    keys = [msgspec.structs.replace(case("a", f"k{i}", [], "passkey"), prefix=n) for i, n in enumerate((99, 99, 199))]
    report = make_report([case("exact", "0", [0.0] * 4), loss, *greedy, *keys])
    rows = {row.format: row for row in report.summaries}
    assert rows["a"].perplexity_ratio == Estimate(pytest.approx(math.e), None, None)
    assert rows["a"].drift_change == Estimate(pytest.approx(0.4), None, None)
    assert rows["a"].longer_than_bf16 == Estimate(-1, -1, -1)
    assert rows["same"].longer_than_bf16 == Estimate(0, 0, 0)
    assert {n: str(found) for n, found in rows["a"].passkey_by_length.items()} == {100: "2/2", 200: "1/1"}
    assert [note for note in notes(report) if "bfloat16" in note] == [
        "not resolved: whether same follows the exact model longer or shorter than bfloat16 does"
    ]
    page = markdown(report, "homkv eval", [])
    assert "| a | 2/2 | 1/1 |" in page
    assert "| a | 2.7183 | 1.000 | 0.4000 | 1.00 [0.44, 1.00] | – |" in page
    assert report.as_json()["speeds"] == {}


def test_gates_keep_and_fail(tmp_path: Path) -> None:
    rows = summarize([case("a", f"{i}", [0.1] * 4) for i in range(3)])
    kept = check(Gate("m", {"a": Threshold(kl_at_most=0.2, top1_at_least=0.9)}), rows)
    assert [c.kept for c in kept] == [True, True]
    assert [c.kept for c in check(Gate("m", {"a": Threshold(kl_at_most=0.05, passkeys_at_least=1)}), rows)] == [
        False
    ] * 2
    with pytest.raises(FormatError, match="expected results of b"):
        check(Gate("m", {"b": Threshold()}), rows)
    bad = tmp_path / "gate.json"
    for content in ("{}", '{"model": "m", "formats": {}}', '{"model": "m", "formats": {"a": {"kl": 1}}}', "["):
        bad.write_text(content)
        with pytest.raises(FormatError, match="gate"):
            load_gate(bad)


@pytest.mark.parametrize("path", sorted(GATES.glob("*.json")), ids=lambda path: path.stem)
def test_gates_ask_for_models_and_formats_that_exist(path: Path) -> None:
    gate = load_gate(path)
    assert gate.model in BUNDLES
    for name, threshold in gate.formats.items():
        make_codec(name, 64)
        assert threshold.kl_at_most is not None
        assert threshold.kl_at_most < 0.05
    assert gate.model in path.stem


@pytest.mark.model
def test_the_gate_of_a_real_model_is_kept(
    smollm2: LoadedModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("homkv.models.load_model", lambda *_, **__: smollm2)
    gate = GATES / "smollm2.json"
    monkeypatch.setattr(sys, "argv", ["homkv", "eval", "--gate", str(gate)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 0
    assert capsys.readouterr().out.count("kept") == 6


@pytest.mark.model
def test_balanced_keeps_a_real_model_and_hack_does_not(smollm2: LoadedModel, tmp_path: Path) -> None:
    items = make_items(
        smollm2.tokenizer, Options(("text", "copy"), texts=1, prefix=480, scored=32, copies=1, copy_length=300)
    )
    cases = measure_cases(smollm2, items, Conditions(("balanced", "hack"), bf16=False), tmp_path / "r.jsonl")
    rows = {s.format: s for s in summarize(cases)}
    balanced, hack = rows["balanced"].kl, rows["hack"].kl
    assert balanced is not None
    assert hack is not None
    assert balanced.mean < 0.03
    assert hack.mean > 20 * balanced.mean
    assert rows["balanced"].copy.total == 3
