"""One schema from a file, the environment and flags."""

from pathlib import Path

import pytest

from homkv.errors import UnsupportedError
from homkv.serve.settings import ServeSettings, load_settings


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def test_flags_win_over_the_environment_and_that_over_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "homkv.toml").write_text('port = 1\ndecode = 2\nsource = "quality"\n')
    monkeypatch.setenv("HOMKV_DECODE", "3")
    monkeypatch.setenv("HOMKV_SOURCE", "small")
    found = load_settings(["--source", "fp16"])
    assert (found.port, found.decode, found.source) == (1, 3, "fp16")
    other = tmp_path / "other.toml"
    other.write_text("port = 2\n")
    assert load_settings([], other).port == 2


def test_formats_may_be_repeated_or_json() -> None:
    assert load_settings(["--kv-cache-dtype", "small", "--kv-cache-dtype", "fp16"]).kv_cache_dtype == ["small", "fp16"]
    assert load_settings(["--kv-cache-dtype", '["hack:pi=64,bits=2"]']).kv_cache_dtype == ["hack:pi=64,bits=2"]


def test_every_default_is_documented() -> None:
    text = (Path(__file__).parent.parent.parent / "docs" / "serving.md").read_text()
    missing = [name for name in ServeSettings.model_fields if f"--{name.replace('_', '-')}`" not in text]
    assert missing == ["until_eof"]  # for parents of instances only


@pytest.mark.parametrize(
    ("file", "says"), [("port = ", "settings"), ("prot = 1", "prot"), ("port = 70000", "--port 70000")]
)
def test_a_file_that_cannot_be_used_is_an_error(tmp_path: Path, file: str, says: str) -> None:
    (tmp_path / "homkv.toml").write_text(file)
    with pytest.raises(UnsupportedError, match=says):
        load_settings([])


def test_an_api_key_from_a_file(tmp_path: Path) -> None:
    key = tmp_path / "api.key"
    key.write_text(" secret\n")
    settings = load_settings(["--api-key-file", str(key)])
    assert settings.read_api_key() == "secret"
    assert "secret" not in repr(load_settings(["--api-key", "secret"]))
    key.write_text("\n")
    with pytest.raises(UnsupportedError, match="empty"):
        settings.read_api_key()
