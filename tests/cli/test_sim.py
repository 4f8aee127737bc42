"""``homkv sim``: commands end with a table, a file or an error that says what to do."""

import json
from collections import Counter
from pathlib import Path

import pytest
from typer.testing import CliRunner

from homkv.cli import app
from homkv.errors import HomkvError, TraceError, UnsupportedError
from homkv.sim.record import read_record

RUNNER = CliRunner(env={"COLUMNS": "250"})


def invoke(*args: str, code: int = 0) -> str:
    result = RUNNER.invoke(app, ["sim", *args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.output


def test_run_writes_a_record_and_plots(tmp_path: Path) -> None:
    record = tmp_path / "r.jsonl"
    out = invoke("run", "--requests", "30", "--record", str(record), "--plots", str(tmp_path), "--link-gbps", "10")
    assert "balanced" in out
    runs = read_record(record)
    assert list(runs) == ["fp16", "fp8", "hack", "balanced", "small"]
    assert all(len(run.requests) == 30 for run in runs.values())
    assert (tmp_path / "sim-run.png").stat().st_size > 1000
    assert (tmp_path / "sim-run.svg").read_text().lstrip().startswith("<?xml")


@pytest.mark.parametrize("command", ["run", "whatif"])
def test_no_number_is_cut_off_at_80_columns(command: str) -> None:
    result = CliRunner(env={"COLUMNS": "80"}).invoke(app, ["sim", command, "--requests", "30"])
    assert result.exit_code == 0, result.output
    assert "…" not in result.output


def test_run_on_a_trace(tmp_path: Path) -> None:
    trace = tmp_path / "t.csv"
    trace.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.97,4808,10\n")
    assert "1 requests" in invoke("run", "--trace", str(trace), "--kv-cache-dtype", "small")
    trace.write_text(trace.read_text() + "2023-11-16 18:17:01.97,4808,10\n")
    with pytest.raises(TraceError, match="line 3"):
        invoke("run", "--trace", str(trace))


def test_whatif_answers_and_sweeps(tmp_path: Path) -> None:
    table = tmp_path / "w.jsonl"
    out = invoke(
        "whatif", "--link-gbps", "25", "--gpu", "h100", "--model", "llama-70b", "--requests", "40",
        "--json", str(table), "--plots", str(tmp_path), "--kv-cache-dtype", "fp16", "--kv-cache-dtype", "small",
    )  # fmt: skip
    assert "prefill and" in out
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    assert {row["kind"] for row in rows} == {"sim-whatif", "sim-sweep"}
    assert {row.get("axis") for row in rows} == {None, "link_gbps", "requests_per_s", "prompt_tokens"}
    assert len(list(tmp_path.glob("*.png"))) == 4


def test_sweeps_begin_with_the_first_format_that_fits(tmp_path: Path) -> None:
    """A 20 GB card holds no 16-bit KV of these prompts beside the weights of Llama-3.1-8B: its lines have gaps."""
    table = tmp_path / "w.jsonl"
    out = invoke(
        "whatif", "--gpu", "rtx4000ada", "--model", "llama-3.1-8b", "--prefill-tp", "1", "--decode-tp", "1",
        "--link-gbps", "10", "--requests", "100", "--requests-per-s", "0.1", "--sweep", "--json", str(table),
    )  # fmt: skip
    assert "fp16 cannot serve this" in out
    points = [row for row in map(json.loads, table.read_text().splitlines()) if row["kind"] == "sim-sweep"]
    assert {p["format"] for p in points if p["axis"] == "link_gbps"} == {"fp8", "balanced", "small"}
    assert max(p["value"] for p in points if p["axis"] == "prompt_tokens" and p["format"] == "fp16") == 8192


def test_whatif_can_say_no() -> None:
    out = invoke("whatif", "--model", "llama-8b", "--profile", "short", "--requests", "60", "--gpu", "h200")
    assert "fp16, 1 prefill and 1 decode" in out
    assert "no: " in out


def test_paper_prints_claims(tmp_path: Path) -> None:
    table = tmp_path / "p.jsonl"
    out = invoke(
        "paper", "--prefill-gpu", "v100", "--profile", "cocktail", "--load", "0.9", "--requests", "30", "--no-artifact",
        "--json", str(table), "--plots", str(tmp_path),
    )  # fmt: skip
    assert "71%" in out
    kinds = Counter(json.loads(line)["kind"] for line in table.read_text().splitlines())
    assert kinds == {"sim-paper": 11 + 5 * 9, "sim-paper-grid": 1, "sim-paper-part": 16}
    assert "why they differ" in out
    assert (tmp_path / "sim-v100-cocktail.png").exists()


def test_validate_checks(tmp_path: Path) -> None:
    record = tmp_path / "r.jsonl"
    invoke("run", "--requests", "20", "--record", str(record), "--kv-cache-dtype", "small")
    with pytest.raises(TraceError, match="step lines of prefill"):
        invoke("validate", str(record))
    step = {"kind": "step", "run_id": "small", "batch": 1, "tokens": 14_000, "seconds": 100.0}
    with record.open("a") as file:
        file.writelines(json.dumps({**step, "stage": stage}) + "\n" for stage in ("prefill", "decode"))
    out = invoke("validate", str(record), "--plots", str(tmp_path))
    assert "error" in out
    assert "measured | simulated" in out
    invoke("validate", str(record), "--check", code=1)
    assert (tmp_path / "sim-validation-r.png").exists()
    # Simulated with the tables, validated against the tables: the same.
    invoke("validate", str(record), "--gpu", "h100", "--model", "llama-8b", "--check")


@pytest.mark.parametrize(
    "args",
    [
        ["run", "--gpu", "abacus"],
        ["run", "--model", "gpt-9"],
        ["run", "--kv-cache-dtype", "zip"],
        ["run", "--requests", "0"],
        ["run", "--num-prefill", "0"],
        ["run", "--requests-per-s", "-1"],
        ["run", "--requests-per-s", "nan"],
        ["run", "--link-gbps", "0"],
        ["run", "--link-gbps", "nan"],
        ["run", "--prefill-tp", "0"],
        ["run", "--profile", "novel"],
        ["run", "--model", "falcon-180b", "--decode-tp", "1"],
        ["run", "--gpu", "zen4-core", "--kv-cache-dtype", "kivi", "--model", "smollm2-135m"],
        ["whatif", "--requests", "1"],
        ["whatif", "--decode-price", "nan"],
        ["paper", "--load", "0"],
        ["paper", "--prefill-gpu", "abacus"],
        ["validate", "/nowhere"],
        ["validate", "/nowhere", "--gpu", "h100"],
    ],
)
def test_refusals_are_typed(args: list[str]) -> None:
    with pytest.raises(HomkvError, match="expected"):
        invoke(*args)


def test_bad_trace_names_the_line(tmp_path: Path) -> None:
    trace = tmp_path / "t.jsonl"
    trace.write_text('{"timestamp": 0, "input_length": 5, "output_length": NaN}\n')
    with pytest.raises(TraceError, match=r"line 1: .*output_length"):
        invoke("whatif", "--trace", str(trace))
    with pytest.raises(UnsupportedError):
        invoke("run", "--trace", str(trace), "--requests", "-3")
