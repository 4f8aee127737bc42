"""``homkv serve --engine vllm``: what it would start, and what it refuses. vLLM itself is not needed."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from homkv import cli

LLAMA = {
    "model_type": "llama",
    "hidden_size": 1024,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "head_dim": 128,
    "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"},
}


def run(folder: Path, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, *more: str) -> int:
    (folder / "config.json").write_text(json.dumps(config))
    command = ["homkv", "serve", "--engine", "vllm", "--model", str(folder), "--device", "cpu", *more]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as found:
        cli.main()
    return int(found.value.code or 0)


def test_a_dry_run_prints_every_command_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        run(tmp_path, LLAMA, monkeypatch, "--decode", "2", "--router", "proxy", "--dry-run", "--", "--seed", "7") == 0
    )
    said = [part.splitlines() for part in capsys.readouterr().out.strip().split("\n\n")]
    assert [comment.split(":")[0] for comment, _ in said] == ["# prefill-0", "# decode-0", "# decode-1", "# router"]
    for _, command in said[:3]:
        assert "HOMKV_VLLM_BACKEND=HOMKV_K4420V2222_P1_L1_B448" in command
        assert "--block-size 448" in command
        assert command.endswith("--seed 7")
    assert "python -m homkv.vllm.proxy" in said[3][1]


def test_float32_takes_larger_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, LLAMA, monkeypatch, "--dtype", "float32", "--dry-run") == 0
    assert "--block-size 832" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"model_type": "deepseek_v2", "kv_lora_rank": 512}, [], "multi-head latent attention"),
        ({"model_type": "mistral", "sliding_window": 1024}, [], "sliding-window attention"),
        (
            {"model_type": "ministral", "sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]},
            [],
            "for vLLM, found a sliding window in 1 of 2 layers",
        ),
        ({"head_dim": 72}, [], "expected head_dim in"),
        ({}, ["--dtype", "int8"], "expected --dtype"),
        ({}, ["--kv-cache-dtype", "hack"], "expected a rows format"),
        ({}, ["--router", "nginx"], "expected --router"),
        ({}, ["--device", "tpu"], "expected --device"),
    ],
)
def test_what_cannot_be_served_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, Any],
    options: list[str],
    message: str,
) -> None:
    assert run(tmp_path, LLAMA | change, monkeypatch, *options, "--dry-run") == 2
    assert message in capsys.readouterr().err


def test_without_vllm_the_error_names_the_page_that_helps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert run(tmp_path, LLAMA, monkeypatch) == 2
    assert "docs/vllm.md" in capsys.readouterr().err
