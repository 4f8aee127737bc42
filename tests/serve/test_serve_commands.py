"""``homkv serve``: mistakes are one message and exit code 2."""

import socket
import stat
import sys
from pathlib import Path

import pytest

from homkv import cli
from homkv.transport.keys import KeyPair, TrustStore


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    """Run ``homkv serve …``, expect exit code 2 and no traceback; return the message."""

    def call(*args: str, command: tuple[str, ...] = ("serve",)) -> str:
        monkeypatch.setattr(sys, "argv", ["homkv", *command, *args])
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
        (("prefill", "--insecure", "--link-gbps", "0"), "--link-gbps '0'"),
        (("prefill", "--insecure", "--link-gbps", "nan"), "--link-gbps 'nan'"),
        (("prefill", "--insecure", "--num-threads", "0"), "--num-threads"),
        (("decode", "--insecure", "--max-tokens", "0"), "--max-tokens"),
        (("decode", "--insecure", "--max-sequences", "0"), "--max-sequences"),
        (("decode", "--insecure", "--lease-s", "0"), "--lease-s"),
        (("--port", "many"), "--port 'many'"),
        (("--policy", "hope"), "--policy"),
        (("--decode", "0"), "at least one prefill and one decode"),
        (("--insecure", "--prefill-at", "tcp://a:1"), "homkv serve gateway"),
        (("gateway", "--insecure"), "--prefill-at and --decode-at"),
        (("gateway", "--insecure", "--prefill-at", "a:1"), "tcp://HOST:PORT"),
        (("gateway", "--prefill-at", "tcp://a:1", "--decode-at", "tcp://a:2"), "FILE.pub"),
        (("all", "--config", "/no/such.toml"), "/no/such.toml"),
        (("everything",), "expected one of all, gateway"),
        (("decode", "--insecure", "--model", "/no/such/model"), "UnsupportedError"),
    ],
)
def test_settings_that_cannot_work_are_refused(refuse, args: tuple[str, ...], says: str) -> None:  # type: ignore[no-untyped-def]
    assert says in refuse(*args)


def test_a_taken_port_is_refused_before_models_are_loaded(refuse) -> None:  # type: ignore[no-untyped-def]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"--port {port}, found Address already in use" in refuse("--port", port)


def test_a_secret_that_is_given_for_a_public_key_is_not_shown(refuse, keys: list[str], tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    said = refuse(str(tmp_path / "x.trust"), keys[1], command=("keys", "trust"))
    assert "name a .pub" in said
    assert KeyPair.load(keys[1]).secret not in said


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    """Run ``homkv …``, expect success; return what it printed."""

    def call(*args: str) -> str:
        monkeypatch.setattr(sys, "argv", ["homkv", *args])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert stopped.value.code == 0
        return capsys.readouterr().out.strip()

    return call


def test_keys_are_made_for_their_owner_only(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    public = run("keys", "new", str(tmp_path / "a"))
    file = tmp_path / "a.key"
    assert public == KeyPair.load(file).public == (tmp_path / "a.pub").read_text().strip()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert run("keys", "show", str(file)) == public  # never the secret


def test_keys_never_replace_a_file(refuse, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "old.key").write_text("precious")
    assert "delete it" in refuse(str(tmp_path / "old"), command=("keys", "new"))
    assert (tmp_path / "old.key").read_text() == "precious"
    assert "choose another" in refuse(str(tmp_path / "no" / "folder"), command=("keys", "new"))


def test_trust_files_gain_and_lose_keys(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    names = [str(tmp_path / name) for name in ("a", "b")]
    keys = sorted(run("keys", "new", name) for name in names)
    trust = tmp_path / "x.trust"
    assert "2 trusted keys" in run("keys", "trust", str(trust), *(f"{name}.pub" for name in names))
    assert run("keys", "show", str(trust)).splitlines() == keys
    assert "1 trusted keys" in run("keys", "trust", str(trust), f"{names[0]}.pub", "--remove")
    assert TrustStore.load(trust).keys == [KeyPair.load(f"{names[1]}.key").public]
