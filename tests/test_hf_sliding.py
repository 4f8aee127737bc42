"""Models of which some layers attend in a sliding window: those stay exact, the others' KV becomes pages."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hf_cases import attached, generate, kv, padded, prompts
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from homkv import generate as generate_module
from homkv.errors import CapacityError, FormatError, ShapeError, UnsupportedError
from homkv.hf import AttendingCache, attach
from homkv.hf.attention import attention_forward
from homkv.models import LoadedModel, describe_model
from homkv.models.describe import fingerprint, refuse_unsupported, sliding_windows_of
from homkv.models.forward import returned_cache
from homkv.plan import LayerPlan
from homkv.serve.engine import codec_for

WINDOW = 24
KINDS = ["sliding_attention", "full_attention"] * 2
SIZES = {
    "vocab_size": 97,
    "hidden_size": 96,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "sliding_window": WINDOW,
    "layer_types": KINDS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
# Kinds of positions in full attention: the model's only ones, frequencies of their own, none at all.
TYPES = {"ministral": "half", "gemma3_text": "half", "cohere2": "none"}
types = pytest.mark.parametrize("model_type", TYPES)


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def build(model_type: str = "ministral", **changes: object) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **SIZES | changes)).eval()


def described(model: PreTrainedModel) -> LoadedModel:
    return describe_model(model, SimpleNamespace(model_max_length=512), "sliding")


@types
def test_16_bit_pages_generate_what_the_model_generates(model_type: str) -> None:
    model, ids = build(model_type), prompts(2, 150)
    expected = generate(model, ids)
    with attached(model) as attachment:
        assert torch.equal(generate(model, ids), expected)
    cache = attachment.last_cache
    assert [cache.paged.num_tokens(s) for s in cache.seq_ids] == [161, 161]
    assert cache.paged.num_layers == 2
    held = 2 * 2 * 2 * 2 * (WINDOW - 1) * 64 * 4  # keys and values, layers, sequences, heads, tokens, channels, float32
    assert cache.kv_bytes() == 2 * 2 * 2 * cache.codec.kv_bytes(161) + held


@types
def test_chunks_shorter_and_longer_than_the_window_give_the_models_logits(model_type: str) -> None:
    model, ids = build(model_type), prompts(1, 170)
    expected = model(ids).logits
    with attached(model, exact_dtype=torch.float32):
        past, found = None, []
        for chunk in ids.split([70, 1, 7, 57, 35], 1):
            out = model(chunk, **kv(past), use_cache=True)
            past = returned_cache(out)
            found.append(out.logits)
        alone = model(ids, use_cache=False).logits
    error = (torch.cat(found, 1) - expected).norm() / expected.norm()
    assert error < 5e-3  # values of sealed pages were rounded to fp16
    assert (alone - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("name", ["fp16", "balanced"])
def test_a_padded_batch_generates_what_each_prompt_alone_does(name: str) -> None:
    model, ids = build(), [prompts(n) for n in (150, 20, 137)]
    batch, mask = padded(ids, "left")
    with attached(model, name):
        found = generate(model, batch, attention_mask=mask)[:, batch.shape[1] :]
        for row, alone in zip(found, ids, strict=True):
            assert torch.equal(row, generate(model, alone[None])[0, len(alone) :])


def test_gradients_do_not_pile_up_in_the_windows() -> None:
    model, ids = build(), prompts(1, 40)
    with torch.enable_grad(), attached(model) as attachment:
        model(ids, use_cache=True)
    assert not any(
        x.requires_grad for layer in attachment.last_cache.sliding_layers for x in (layer.keys, layer.values)
    )


def test_quantized_pages_differ_a_little() -> None:
    model, ids = build(), prompts(1, 200)
    expected = model(ids).logits[0, -1]
    with attached(model, "near-lossless"):
        cache = returned_cache(model(ids[:, :-1], use_cache=True))
        found = model(ids[:, -1:], **kv(cache)).logits[0, -1]
    assert 0 < (found - expected).norm() < 0.5 * expected.norm()


def test_beams_and_a_second_use() -> None:
    model, ids = build(), prompts(2, 140)
    expected = generate(model, ids, num_beams=3)
    with attached(model) as attachment:
        assert torch.equal(generate(model, ids, num_beams=3), expected)
        cache = attachment.new_cache()
        first = generate(model, ids, **kv(cache))
        cache.reset()
        assert (cache.get_seq_length(), cache.paged_layers[0].num_seen) == (0, 0)
        assert torch.equal(generate(model, ids, **kv(cache)), first)


def test_what_is_refused_leaves_the_windows_as_they_were() -> None:
    model, ids = build(), prompts(1, 400)
    packed = torch.cat((torch.arange(60, 62), torch.arange(2)))[None]
    with attached(model, max_tokens=64) as attachment:
        cache = attachment.new_cache()
        model(ids[:, :60], **kv(cache))
        with pytest.raises(CapacityError, match="at most 64 tokens"):
            model(ids[:, 60:], **kv(cache))
        with pytest.raises(UnsupportedError, match="batch of 1"):
            model(ids[:, 60:64].expand(2, -1), **kv(cache))
        with pytest.raises(UnsupportedError, match="consecutive positions"):
            model(ids[:, 60:64], position_ids=packed, **kv(cache))
        expected = model(ids[:, :64]).logits[:, -1:]
        found = model(ids[:, 60:64], **kv(cache)).logits[:, -1:]
    assert (found - expected).norm() < 5e-3 * expected.norm()


@types
def test_models_are_described_by_their_full_attention(model_type: str) -> None:
    loaded = described(build(model_type))
    assert loaded.num_layers == 2
    assert loaded.sliding_windows == (WINDOW, None, WINDOW, None)
    assert (loaded.num_kv_heads, loaded.head_dim, loaded.rope.pairing) == (2, 64, TYPES[model_type])
    if model_type == "gemma3_text":
        assert loaded.rope.inv_freq[1] == pytest.approx(1e6 ** (-1 / 32), rel=1e-6)  # 1e4 in its sliding windows


def test_plans_count_layers_of_pages() -> None:
    model, ids = build(), prompts(1, 150)
    layers = ("k8444v4444", "k4420v2222")
    with attached(model, LayerPlan(fingerprint(model), layers, "two").spelling) as attachment:
        generate(model, ids)
    assert [codec.name for codec in attachment.last_cache.paged.codecs] == list(layers)
    with pytest.raises(FormatError, match="plan for 2 layers, found one for 4"):
        attach(model, LayerPlan(fingerprint(model), layers * 2, "four").spelling)


def test_other_ways_to_run_such_a_model_are_refused() -> None:
    model = build()
    with pytest.raises(UnsupportedError, match="sliding window in 2 of 4 layers"):
        generate_module.generate(model, prompts(1, 8), max_new_tokens=1)
    with pytest.raises(UnsupportedError, match=r"serving.*sliding window in 2 of 4 layers"):
        codec_for(described(model), "balanced")


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        ("ministral", {"layer_types": KINDS[:1] * 4}, "sliding-window attention in every layer"),
        ("gpt_oss", {}, "attention sinks"),
        ("gemma2", {}, "soft-capped"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "both directions"),
        ("gemma3n_text", {"layer_types": KINDS * 8, "num_hidden_layers": 32, "num_kv_shared_layers": 2}, "share"),
    ],
)
def test_configs_that_are_not_covered_are_refused(model_type: str, changes: dict[str, Any], message: str) -> None:
    config = AutoConfig.for_model(model_type, **SIZES | changes)
    with pytest.raises(UnsupportedError, match=message):
        refuse_unsupported(config, model_type)


def test_attention_that_only_its_arguments_betray_is_refused() -> None:
    model, q = build(), torch.randn(1, 6, 8, 64)
    with pytest.raises(UnsupportedError, match="s_aux"):
        attention_forward(model, q, q[:, :2], q[:, :2], None, s_aux=torch.zeros(6))
    model.model.layers[0].self_attn.sliding_window = 7
    with attached(model), pytest.raises(UnsupportedError, match=r"window of 24 tokens.*found 7"):
        model(prompts(1, 8), use_cache=True)


def test_windows_and_layers_must_fit() -> None:
    class Silent(AttendingCache):
        def attend(self, *args: Any) -> Tensor:
            raise NotImplementedError

    assert sliding_windows_of(build().config) == (WINDOW, None) * 2
    with pytest.raises(ShapeError, match="expected 3 layers"):
        Silent(3, None, (WINDOW, None, None))
