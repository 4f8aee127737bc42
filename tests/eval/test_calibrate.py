"""The search for a plan: the choice is right where the best is known, and the whole search gives a plan that works."""

import itertools
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from eval_cases import sharp_llama
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import homkv
from homkv.errors import FormatError, ShapeError
from homkv.eval.calibrate import CalibrationOptions, calibrate, choose, num_cases
from homkv.eval.record import read_records
from homkv.formats import make_codec
from homkv.models import LoadedModel, describe_model

BITS = {"a": 2.0, "b": 2.5, "c": 4.0}


def test_bits_go_where_they_help_most() -> None:
    sensitivity = [{"a": 9.0, "b": 1.0, "c": 0.5}, {"a": 1.0, "b": 0.9, "c": 0.8}, {"a": 5.0, "b": 4.9, "c": 0.1}]
    assert choose(sensitivity, BITS, 2.0) == ["a", "a", "a"]
    assert choose(sensitivity, BITS, 2.17) == ["b", "a", "a"]
    assert choose(sensitivity, BITS, 2.84) == ["b", "a", "c"]  # b is above the hull of layer 2
    assert choose(sensitivity, BITS, 4.0) == ["c", "c", "c"]
    with pytest.raises(FormatError, match=r"at least 2\.000"):
        choose(sensitivity, BITS, 1.99)


def test_a_dearer_format_that_is_no_better_is_not_chosen() -> None:
    assert choose([{"a": 1.0, "b": 2.0, "c": 1.0}], BITS, 8.0) == ["a"]


def test_the_choice_is_near_the_best_of_all_choices() -> None:
    """Greedy loses at most one upgrade against the optimum."""
    rng = random.Random(0)
    for _ in range(50):
        rows = [sorted((rng.random() for _ in BITS), reverse=True) for _ in range(5)]
        sensitivity = [dict(zip(BITS, row, strict=True)) for row in rows]
        budget = rng.uniform(2.0, 4.0)
        chosen = choose(sensitivity, BITS, budget)
        assert sum(BITS[n] for n in chosen) <= 5 * budget + 1e-9
        fitting = (p for p in itertools.product(BITS, repeat=5) if sum(BITS[n] for n in p) <= 5 * budget)
        best = min(sum(layer[n] for layer, n in zip(sensitivity, p, strict=True)) for p in fitting)
        found = sum(layer[n] for layer, n in zip(sensitivity, chosen, strict=True))
        assert found <= best + max(max(layer.values()) - min(layer.values()) for layer in sensitivity)


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    """Layer 1 attends sharply, layer 0 hardly at all, so that bits help layer 1."""
    model = sharp_llama()
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.mul_(0.01)
    words = Tokenizer(models.WordLevel({"a": 0} | {chr(33 + i): i for i in range(1, 90)}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return describe_model(model, PreTrainedTokenizerFast(tokenizer_object=words), "tiny")


def test_the_search_finds_the_layer_that_matters(loaded: LoadedModel, tmp_path: Path) -> None:
    steps: list[str] = []
    names = ("k2220v2222", "k4420v2222", "k8444v4444")
    options = CalibrationOptions(3.6, names, texts=1, prefix_pages=3, scored=64)
    found = calibrate(loaded, options, tmp_path / "a.jsonl", steps.append)
    assert len(steps) == num_cases(loaded, options)
    low, high = found.plan.layers
    assert names.index(high) > names.index(low)
    assert found.plan.provenance["bits_per_element"] <= 3.6
    kl = {name: kl for name, _, kl in found.verified}
    assert kl["k8444v4444"] < kl[found.plan.title] < kl["k2220v2222"]
    assert calibrate(loaded, options, tmp_path / "b.jsonl").plan.dumps() == found.plan.dumps()
    with homkv.attach(loaded.model, found.plan.spelling):
        loaded.model.generate(torch.arange(150)[None], max_new_tokens=2, do_sample=False)


def test_a_search_goes_on_and_another_budget_measures_only_its_plan(loaded: LoadedModel, tmp_path: Path) -> None:
    path, names = tmp_path / "c.jsonl", ("k2220v2222", "k4420v2222", "k8444v4444")
    options = CalibrationOptions(3.6, names, window=128, texts=1, prefix_pages=3, scored=64)
    first = calibrate(loaded, options, path)
    assert {layer[-4:] for layer in first.plan.layers} == {"w128"}
    lines = path.read_bytes()
    path.write_bytes(lines[: len(lines) // 2])
    assert calibrate(loaded, options, path).plan.dumps() == first.plan.dumps()
    count = len(read_records(path))
    other = calibrate(loaded, replace(options, budget_bits=4.4), path)
    assert other.plan.layers != first.plan.layers
    assert len(read_records(path)) == count + 1


def test_bits_are_counted_at_the_head_dim_asked_for(loaded: LoadedModel, tmp_path: Path) -> None:
    options = CalibrationOptions(3.2, ("k4220v2222", "k8444v4444"), texts=1, prefix_pages=1, scored=8, head_dim=128)
    plan = calibrate(loaded, options, tmp_path / "d.jsonl").plan
    assert plan.provenance["candidates"]["k4220v2222"] == make_codec("k4220v2222", 128).bits_per_element(32768)


def test_a_search_that_cannot_be_is_refused_first(loaded: LoadedModel, tmp_path: Path) -> None:
    def step(what: str) -> None:
        raise AssertionError("nothing may be measured")

    with pytest.raises(FormatError, match="at least"):
        calibrate(loaded, CalibrationOptions(1.0), tmp_path / "e.jsonl", step)
    with pytest.raises(FormatError, match="kABCDvEFGH"):
        calibrate(loaded, CalibrationOptions(3.0, ("kivi",)), tmp_path / "e.jsonl", step)
    with pytest.raises(FormatError, match="window"):
        calibrate(loaded, CalibrationOptions(3.0, window=100), tmp_path / "e.jsonl", step)
    with pytest.raises(ShapeError, match="texts"):
        calibrate(loaded, CalibrationOptions(9.0, prefix_pages=10**6), tmp_path / "e.jsonl", step)
