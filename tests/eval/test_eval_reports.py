"""What ``homkv eval --only-report`` makes of records."""

import sys
from pathlib import Path

import msgspec
import pytest

from homkv import cli
from homkv.eval.jsonl import append_jsonl
from homkv.eval.plots import save_plots
from homkv.eval.record import Case, read_records
from homkv.eval.report import make_report


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


@pytest.mark.parametrize("model", ["org/name-1.5B", "/folder/of a model/"])
def test_plots_lie_beside_the_page_whatever_the_models_name(model: str, tmp_path: Path) -> None:
    report = make_report([msgspec.structs.replace(case("small", f"{i}", 0.1), model=model) for i in range(3)])
    found = save_plots(report, tmp_path / "docs")
    assert found
    assert sorted(p.name for p in tmp_path.rglob("*.png")) == sorted(found)
    assert all((tmp_path / "docs" / name).is_file() for name in found)
