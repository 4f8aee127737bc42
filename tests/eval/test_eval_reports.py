"""What ``homkv eval --only-report`` makes of records."""

import sys
from pathlib import Path

import msgspec
import pytest

from homkv import cli
from homkv.eval.jsonl import append_jsonl
from homkv.eval.record import Case, read_records


def case(name: str, item: str, kl: float) -> Case:
    return Case(f"{name}{item}", "m", name, "text", item, "exact", 9, [kl] * 16, [1.0] * 16, "1" * 16, "1" * 16)


def test_records_of_several_machines_make_one_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second, page = tmp_path / "first.jsonl", tmp_path / "second.jsonl", tmp_path / "docs" / "m.md"
    for i in range(3):
        append_jsonl(first, case("a", f"{i}", 0.1))
    append_jsonl(second, msgspec.structs.replace(case("a", "0", 0.4), key="by another implementation"))
    append_jsonl(second, case("b", "0", 0.3))
    files = ["--json", str(first), "--json", str(second)]
    monkeypatch.setattr(sys, "argv", ["homkv", "eval", "--only-report", *files, "--report", str(page)])
    with pytest.raises(SystemExit, match="0"):
        cli.main()
    assert "0.2000" in capsys.readouterr().out
    written = page.read_text()
    assert "| a | 0.2000 |" in written  # the last file's case in place of the first's
    assert "| b | 0.3000 |" in written
    assert " ".join(files) in written  # how to make the page again
    assert [len(read_records(file)) for file in (first, second)] == [3, 2]
