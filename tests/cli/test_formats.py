"""``homkv formats`` prints what the codecs say, and what the documents say."""

import json

import pytest
from typer.testing import CliRunner

from homkv.cli import app
from homkv.errors import ShapeError
from homkv.formats import format_names, make_codec
from homkv.spec import PRESETS


def rows(*args: str) -> dict[str, dict[str, float]]:
    result = CliRunner().invoke(app, ["formats", "--json", *args])
    assert result.exit_code == 0, result.output
    return {row["name"]: row for row in json.loads(result.output)["formats"]}


def test_every_format_is_listed() -> None:
    assert tuple(rows()) == format_names()
    assert {*PRESETS, "hack", "hack-2026", "fp16"} <= set(rows())


@pytest.mark.parametrize("head_dim", [64, 128])
def test_numbers_are_the_codecs_own(head_dim: int) -> None:
    for name, row in rows("--head-dim", str(head_dim), "--context", "1000").items():
        codec = make_codec(name, head_dim)
        assert row["page_bytes"] == codec.page_bytes
        assert row["bits_per_element"] == codec.bits_per_element(1000)
        assert row["sent_bits_per_element"] == 8 * codec.wire_bytes(1000) / (2 * head_dim * 1000)
        assert row["is_packed"] == (codec.coder is not None)
        assert row["ratio_to_fp16"] * 16 == pytest.approx(row["bits_per_element"])


def test_fp16_costs_16_bits_and_balanced_what_the_design_says() -> None:
    table = rows()
    assert table["fp16"]["bits_per_element"] == pytest.approx(16)
    assert table["balanced"]["bits_per_element"] == pytest.approx(2.5, abs=0.05)
    assert table["balanced"]["page_bytes"] == 5056


def test_the_table_is_readable() -> None:
    result = CliRunner().invoke(app, ["formats"], env={"COLUMNS": "120"})
    assert result.exit_code == 0
    for name in format_names():
        assert name in result.output
    assert "5,056" in result.output
    assert "k4420v2222" in result.output


def test_no_context_is_refused() -> None:
    result = CliRunner().invoke(app, ["formats", "--context", "0"])
    assert isinstance(result.exception, ShapeError)
