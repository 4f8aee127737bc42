"""``homkv serve``: mistakes are one message and exit code 2."""

import stat
import sys
from pathlib import Path

import pytest

from homkv import cli
from homkv.transport.keys import KeyPair


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    """Run ``homkv serve …``, expect exit code 2 and no traceback; return the message."""

    def call(*args: str) -> str:
        monkeypatch.setattr(sys, "argv", ["homkv", "serve", *args])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        said = capsys.readouterr().err
        assert stopped.value.code == 2, said
        assert "Traceback" not in said
        return " ".join(said.split())

    return call


@pytest.fixture
def keys(tmp_path: Path) -> list[str]:
    """Options of a well configured instance."""
    pair, key, trust = KeyPair.generate(), tmp_path / "a.key", tmp_path / "a.trust"
    pair.save(key)
    trust.write_text(pair.public)
    return ["--keys", str(key), "--trust", str(trust)]


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_security_is_either_keys_or_insecure(refuse, keys: list[str], role: str) -> None:  # type: ignore[no-untyped-def]
    assert "found none of them" in refuse(role)
    assert "found --keys" in refuse(role, *keys[:2])
    assert "found --trust" in refuse(role, *keys[2:])
    assert "found --keys --trust --insecure" in refuse(role, *keys, "--insecure")


def test_files_that_are_not_keys_are_named(refuse, keys: list[str], tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    assert "nothing.key" in refuse("decode", "--keys", str(tmp_path / "nothing.key"), *keys[2:])
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00")
    assert "no text" in refuse("decode", *keys[:2], "--trust", str(binary))
    binary.write_text("short")
    assert "40 Z85 characters" in refuse("decode", *keys[:2], "--trust", str(binary))
    binary.chmod(0o644)
    assert "0600" in refuse("decode", "--keys", str(binary), *keys[2:])


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("prefill", "--insecure", "--link-gbps", "0"), "positive --link-gbps"),
        (("prefill", "--insecure", "--link-gbps", "nan"), "positive --link-gbps"),
        (("prefill", "--insecure", "--num-threads", "0"), "--num-threads"),
        (("decode", "--insecure", "--max-tokens", "0"), "--max-tokens"),
        (("decode", "--insecure", "--max-sequences", "0"), "--max-sequences"),
        (("decode", "--insecure", "--lease-s", "0"), "positive --lease-s"),
        (("decode", "--insecure", "--model", "/no/such/model"), "UnsupportedError"),
    ],
)
def test_settings_that_cannot_work_are_refused(refuse, args: tuple[str, ...], says: str) -> None:  # type: ignore[no-untyped-def]
    assert says in refuse(*args)


def test_keys_are_made_for_their_owner_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "new.key"
    monkeypatch.setattr(sys, "argv", ["homkv", "serve", "keys", str(file)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 0
    assert capsys.readouterr().out.strip() == KeyPair.load(file).public
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_keys_never_replace_a_file(refuse, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    file = tmp_path / "old.key"
    file.write_text("precious")
    assert "delete it" in refuse("keys", str(file))
    assert file.read_text() == "precious"
    assert "choose another" in refuse("keys", str(tmp_path / "no" / "folder.key"))
