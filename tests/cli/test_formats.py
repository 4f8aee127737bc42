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
    narrow = CliRunner().invoke(app, ["formats"], env={"COLUMNS": "80"}).output
    assert "k4420v2222" in narrow
    assert "…" not in narrow


def test_no_context_is_refused() -> None:
    result = CliRunner().invoke(app, ["formats", "--context", "0"])
    assert isinstance(result.exception, ShapeError)


@pytest.mark.parametrize("head_dim", [0, -64])
def test_heads_without_channels_are_refused(head_dim: int) -> None:
    result = CliRunner().invoke(app, ["formats", "--head-dim", str(head_dim)])
    assert isinstance(result.exception, ShapeError)


def test_formats_that_do_not_cover_a_head_dim_are_named_with_the_reason() -> None:
    result = CliRunner().invoke(app, ["formats", "--head-dim", "80", "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.output)
    assert "found 80" in report["unsupported"]["kivi"]
    assert {row["name"] for row in report["formats"]} == set(format_names()) - set(report["unsupported"])
    shown = CliRunner().invoke(app, ["formats", "--head-dim", "80"]).output
    assert "Not for head_dim 80" in shown
    assert "balanced" in shown
