"""``homkv basis``: tables of a real model, and what it refuses."""

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from homkv.cli import app
from homkv.errors import ShapeError
from homkv.formats import make_codec
from homkv.models import LoadedModel


@pytest.mark.model
def test_tables_of_a_model_make_its_format(smollm2: LoadedModel, tmp_path: Path) -> None:
    path = tmp_path / "new" / "basis.safetensors"
    threads = str(torch.get_num_threads())
    result = CliRunner().invoke(
        app, ["basis", "--texts", "2", "--tokens", "60", "--out", str(path), "--num-threads", threads]
    )
    assert result.exit_code == 0, result.output
    name = result.output.split()[-1]
    assert name == f"basis:file={path}"
    codec = make_codec(name, smollm2.head_dim, smollm2.rope)
    assert codec.at_layer(29, smollm2.num_layers).name == codec.name
    result = CliRunner().invoke(app, ["basis", "--tokens", "5"])
    assert isinstance(result.exception, ShapeError)
