"""RoPE order: our formulas against transformers, and both against what happens to a model's keys."""

import math

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from homkv.errors import UnsupportedError
from homkv.models.describe import measure_rope, probe_cache, rotation_error
from homkv.rope import RopeSpec, default_rope, no_rope, pairing_of, rope_from_config

SMALL = {
    "hidden_size": 128,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}
GPTJ = {"n_embd": 128, "n_head": 2, "n_layer": 1, "n_positions": 512, "n_ctx": 512, "vocab_size": 64, "rotary_dim": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 128}
PARTIAL = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}

MODELS: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("llama", SMALL),
    "llama3": ("llama", SMALL | {"rope_parameters": LLAMA3}),
    "linear": ("llama", SMALL | {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "dynamic": ("llama", SMALL | {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}}),
    "yarn": ("llama", SMALL | {"rope_parameters": YARN}),
    "yarn-untruncated": ("llama", SMALL | {"rope_parameters": YARN | {"truncate": False}}),
    "qwen2": ("qwen2", SMALL | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen3": ("qwen3", SMALL | {"head_dim": 80}),
    "mistral": ("mistral", SMALL | {"sliding_window": None}),
    "phi3": ("phi3", SMALL | {"rope_parameters": PARTIAL | {"partial_rotary_factor": 0.75}, "sliding_window": None}),
    "gpt_neox": ("gpt_neox", SMALL | {"rope_parameters": PARTIAL | {"partial_rotary_factor": 0.25}}),
    "stablelm": ("stablelm", SMALL | {"rope_parameters": PARTIAL}),
    "persimmon": ("persimmon", SMALL | {"rope_parameters": PARTIAL}),
    "falcon": ("falcon", SMALL | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "cohere": ("cohere", SMALL),
    "glm": ("glm", SMALL | {"head_dim": 64, "rope_parameters": PARTIAL}),
    "glm4": ("glm4", SMALL | {"head_dim": 64, "rope_parameters": PARTIAL}),
    "ernie4_5": ("ernie4_5", SMALL | {"head_dim": 64}),
    "helium": ("helium", SMALL | {"head_dim": 64}),
    "gptj": ("gptj", GPTJ),
    "codegen": ("codegen", GPTJ | {"n_embd": 256, "n_head": 4}),
}


def tiny(name: str) -> PreTrainedModel:
    model_type, fields = MODELS[name]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **fields), dtype=torch.float32)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # biases and norms too: nothing may hide by being 0 or 1
    return model.eval()


@pytest.mark.parametrize("name", MODELS)
def test_config_gives_what_the_model_does(name: str) -> None:
    model = tiny(name)
    keys, _ = probe_cache(model, name)
    measured = measure_rope(model, keys)
    told = rope_from_config(
        model.config.to_dict(), keys.shape[-1], pairing=pairing_of(model.config.get_text_config().model_type)
    )
    assert (told.pairing, told.rotary_dim) == (measured.pairing, measured.rotary_dim)
    assert told.inv_freq == pytest.approx(measured.inv_freq, rel=1e-4)
    assert told.channel_order() == measured.channel_order()


@pytest.mark.parametrize("name", MODELS)
def test_neighbouring_slots_turn_ever_faster(name: str) -> None:
    """The order against the keys alone: the same token everywhere leaves only the rotation in the cache."""
    model = tiny(name)
    keys, _ = probe_cache(model, name)
    spec = measure_rope(model, keys)
    assert sorted(spec.channel_order()) == list(range(spec.head_dim))
    slots = keys[..., list(spec.channel_order())].double()
    still = spec.head_dim - spec.rotary_dim
    assert torch.equal(slots[:, 0, :still], slots[:, 1, :still])
    pairs = slots[..., still:].unflatten(-1, (-1, 2))  # [G, 2 positions, pairs, 2]
    lengths = pairs.norm(dim=-1)
    assert torch.allclose(lengths[:, 0], lengths[:, 1], rtol=1e-4)
    first, second = pairs.unbind(1)
    sine = first[..., 0] * second[..., 1] - first[..., 1] * second[..., 0]
    cosine = (first * second).sum(-1)
    angle = torch.atan2(sine, cosine).abs()
    assert (angle.diff(dim=-1) > -1e-5).all()
    assert angle[0, -1] > 10 * angle[0, 0]


def test_a_wrong_pairing_is_noticed() -> None:
    keys, _ = probe_cache(tiny("llama"), "llama")
    half, interleaved = default_rope(64), default_rope(64, pairing="interleaved")
    assert rotation_error(keys, half) < 1e-4
    assert rotation_error(keys, interleaved) > 0.5


def test_measuring_overrules_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("homkv.rope.INTERLEAVED_TYPES", frozenset({"llama"}))
    model = tiny("llama")
    assert measure_rope(model, probe_cache(model, "llama")[0]).pairing == "half"


def test_a_model_that_turns_otherwise_is_refused() -> None:
    model = tiny("llama")
    with pytest.raises(UnsupportedError, match="rotate in pairs"):
        measure_rope(model, torch.randn(2, 2, 64))


def test_order_of_a_small_head_by_hand() -> None:
    assert RopeSpec(8, 8, "half", (1.0, 0.1, 0.01, 0.001)).channel_order() == (3, 7, 2, 6, 1, 5, 0, 4)
    assert RopeSpec(8, 8, "interleaved", (1.0, 0.1, 0.01, 0.001)).channel_order() == (6, 7, 4, 5, 2, 3, 0, 1)
    assert RopeSpec(8, 4, "half", (1.0, 0.1)).channel_order() == (4, 5, 6, 7, 1, 3, 0, 2)
    assert no_rope(4).channel_order() == (0, 1, 2, 3)


def test_order_follows_the_frequency_not_the_index() -> None:
    assert RopeSpec(6, 6, "half", (0.1, 1.0, 0.1)).channel_order() == (2, 5, 0, 3, 1, 4)


def test_transformers_4_fields_are_read() -> None:
    old = {"rope_theta": 500_000.0, "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"}}
    assert rope_from_config(old, 64) == rope_from_config({"rope_parameters": LLAMA3}, 64)


def test_no_theta_means_no_rope() -> None:
    assert rope_from_config({"n_embd": 64}, 64) == no_rope(64)


def test_unknown_scaling_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="longrope"):
        rope_from_config({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, 64)


def test_frequencies_must_match_the_rotary_dim() -> None:
    with pytest.raises(UnsupportedError, match="one frequency per channel pair"):
        RopeSpec(64, 64, "half", (1.0,))


def test_llama3_blends_between_its_two_limits() -> None:
    base, scaled = default_rope(64, 500_000.0), rope_from_config({"rope_parameters": LLAMA3}, 64)
    ratio = [b / s for b, s in zip(base.inv_freq, scaled.inv_freq, strict=True)]
    assert math.isclose(ratio[0], 1.0)
    assert math.isclose(ratio[-1], 8.0)
    assert ratio == sorted(ratio)
