"""Evaluation of a model with sliding windows: they stay exact, formats decide the rest, and the report says so."""

from pathlib import Path

import pytest
import torch
from eval_cases import ids, text, words
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.cache_utils import DynamicCache

from homkv.cli.eval import _run_record
from homkv.eval.basis import calibrate as calibrate_basis
from homkv.eval.exact import continue_greedily, run_exact
from homkv.eval.forced import score, store_prefix, write
from homkv.eval.record import Case
from homkv.eval.report import make_report, notes
from homkv.eval.run import Conditions, measure_cases
from homkv.eval.sizes import measure_size
from homkv.formats import make_codec
from homkv.models import LoadedModel, describe_model
from homkv.models.forward import forward_with_cache, returned_cache

WINDOW = 40


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    """Four random layers, of which the second and the last see everything."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "ministral",
        vocab_size=200,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=512,
        initializer_range=0.12,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )
    return describe_model(AutoModelForCausalLM.from_config(config), words(), "sliding")


def test_16_bit_kv_is_the_exact_model_and_fewer_bits_lose_more(loaded: LoadedModel) -> None:
    runs = [run_exact(loaded, ids(321, seed), 280, record=True) for seed in (1, 2)]
    assert [len(x) for x in (runs[0].keys, runs[0].sliding, runs[0].tail)] == [2, 2, 2]
    found = {name: score(loaded, runs, name, impl="reference") for name in ("fp16", "int8", "near-lossless", "small")}
    for one in zip(*found.values(), strict=True):
        losses = [sum(scores.kl) for scores, _ in one]
        assert losses[0] < 1e-4
        assert losses == sorted(losses)
    for scores, errors in found["fp16"]:
        assert len(scores.kl) == 40
        assert torch.tensor(errors).shape == (2, 2)
        assert torch.tensor(errors).max() < 0.01


def test_a_quantized_prompt_sees_exact_windows(loaded: LoadedModel) -> None:
    exact = run_exact(loaded, ids(321), 280)
    assert sum(score(loaded, [exact], "fp16", prefill="quantized")[0][0].kl) < 1e-4
    assert sum(score(loaded, [exact], "small", impl="reference", prefill="quantized")[0][0].kl) > 0.01


def test_greedy_text_goes_on_behind_the_windows(loaded: LoadedModel) -> None:
    prompt = ids(200)
    tail = continue_greedily(loaded, prompt[None], 60)[0]  # longer than a window
    exact = run_exact(loaded, torch.cat((prompt, tail)), 199)
    assert write(loaded, exact, "fp16", 0) == tail.tolist()


def test_windows_hold_what_later_tokens_may_see(loaded: LoadedModel) -> None:
    exact = run_exact(loaded, ids(301), 280)
    cache = store_prefix(loaded, [exact], make_codec("balanced", 64, loaded.rope), impl="reference")
    assert [layer.get_seq_length() for layer in cache.layers] == [280] * 4
    for layer, (keys, values) in zip(cache.sliding_layers, exact.sliding, strict=True):
        assert torch.equal(layer.keys[0], keys[:, -WINDOW + 1 :])
        assert torch.equal(layer.values[0], values[:, -WINDOW + 1 :])
    with torch.no_grad():
        own = returned_cache(forward_with_cache(loaded.model, exact.ids[None, :280], DynamicCache())).layers
    for layer, whole in zip(cache.sliding_layers, (own[0], own[2]), strict=True):
        assert whole.keys.shape[2] == 280
        assert torch.equal(layer.keys, whole.keys[:, :, -WINDOW + 1 :])
        assert torch.equal(layer.values, whole.values[:, :, -WINDOW + 1 :])


def test_bits_count_layers_of_pages_only(loaded: LoadedModel) -> None:
    size = measure_size(loaded, run_exact(loaded, ids(321), 300), "balanced", "reference")
    assert size.stored == pytest.approx(make_codec("balanced", 64).bits_per_element(300))
    assert size.sent == pytest.approx(size.stored)


def test_a_basis_has_the_layers_of_pages(loaded: LoadedModel) -> None:
    assert calibrate_basis(loaded, [ids(120).tolist()]).mean.shape == (2, 1, 64)


def test_the_report_says_which_layers_stay_exact(loaded: LoadedModel, tmp_path: Path) -> None:
    cases = measure_cases(loaded, [text("a", 200, 180, 1)], Conditions(("int8",), bf16=False), tmp_path / "r.jsonl")
    assert all(isinstance(case, Case) and not case.error for case in cases)
    report = make_report([_run_record(loaded), *cases])
    assert report.as_json()["sliding_windows"] == [WINDOW, None, WINDOW, None]
    assert any("2 of 4 layers attend to a sliding window of 40 tokens: they stay exact" in n for n in notes(report))
    assert not any("sliding" in n for n in notes(make_report(cases)))
