"""What `homkv serve --engine vllm` refuses before anything starts; what only vLLM knows is refused in live_engine."""

import json
from pathlib import Path

import pytest

from homkv.cli.serve_vllm import _inspect, _plan
from homkv.errors import FormatError, UnsupportedError

LLAMA = {"model_type": "llama", "hidden_size": 512, "num_attention_heads": 4, "num_hidden_layers": 2}


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("per-layer:model=0,version=1,layers=k4420v2222*2", "per-layer plan"),
        ("plans/my-model.json", "per-layer plan"),
        ("hack", "found hack"),
        ("hack:prefill=int8", "found hack:prefill=int8"),
        ("fp8", "found fp8"),
        ("bf16", "found bf16"),
    ],
)
def test_formats_that_blocks_do_not_hold(name: str, found: str) -> None:
    with pytest.raises(UnsupportedError, match=found) as error:
        _plan(name, 128, "bfloat16")
    assert "--engine homkv" in str(error.value)


def test_no_format_at_all() -> None:
    with pytest.raises(FormatError, match="homkv formats"):
        _plan("balancd", 128, "bfloat16")


def test_weights_of_another_width() -> None:
    with pytest.raises(UnsupportedError, match="--dtype bfloat16, float16, float32, found 'float64'"):
        _plan("balanced", 128, "float64")


def test_a_head_dim_that_no_page_has() -> None:
    with pytest.raises(UnsupportedError, match="72"):
        _plan("balanced", 72, "bfloat16")


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("balanced-long", "HOMKV_K4420V2222W192_P1_L1_B448"),
        ("k4420v2222w128", "HOMKV_K4420V2222W128_P1_L1_B448"),
    ],
)
def test_longer_windows_are_served(name: str, backend: str) -> None:
    assert _plan(name, 128, "bfloat16").name == backend


@pytest.mark.parametrize(
    ("config", "found"),
    [
        (LLAMA | {"model_type": "mistral", "sliding_window": 4096, "max_position_embeddings": 32768}, "sliding-window"),
        ({"model_type": "deepseek_v3", "kv_lora_rank": 512}, "latent attention"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "an encoder and a decoder"),
    ],
    ids=lambda x: x["model_type"] if isinstance(x, dict) else "",
)
def test_models_that_pages_do_not_serve(tmp_path: Path, config: dict[str, object], found: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match=found):
        _inspect(str(tmp_path))


def test_a_model_that_they_serve(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    assert _inspect(str(tmp_path)) == (str(tmp_path), 128)
