import os
from pathlib import Path

import pytest

from homkv.errors import TransferError
from homkv.transport.keys import KeyPair, Security, TrustStore


def test_a_saved_pair_is_private_and_comes_back(tmp_path: Path) -> None:
    pair, path = KeyPair.generate(), tmp_path / "key.json"
    pair.save(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert KeyPair.load(path) == pair
    assert pair.secret not in repr(pair)
    with pytest.raises(TransferError, match="found one"):
        KeyPair.generate().save(path)


NOT_Z85 = b'{"public":"%s","secret":"%s"}' % (b"!" * 40, b"~" * 40)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_a_key_file_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "key.json"
    KeyPair.generate().save(path)
    os.chmod(path, mode)
    with pytest.raises(TransferError, match="readable by its owner only"):
        KeyPair.load(path)


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff", b'{"public":"x","secret":"y"}', NOT_Z85])
def test_a_damaged_key_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "key.json"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(TransferError, match="expected a key pair"):
        KeyPair.load(path)


def test_keys_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "key.json"
    KeyPair(KeyPair.generate().public, KeyPair.generate().secret).save(path)
    with pytest.raises(TransferError, match="public key of the secret"):
        KeyPair.load(path)
    with pytest.raises(TransferError, match="readable file"):
        KeyPair.load(tmp_path / "none")


def test_a_trust_store_reads_keys_and_comments(tmp_path: Path) -> None:
    keys = [KeyPair.generate().public for _ in range(3)]
    path = tmp_path / "trusted"
    path.write_text("# prefill instances\n" + "\n\n".join(keys) + "\n")
    trust = TrustStore.load(path)
    assert all(trust.callback("*", key.encode()) for key in keys)
    trust.remove(keys[0])
    assert not trust.callback("*", keys[0].encode())


@pytest.mark.parametrize("key", ["", "short", "\x00" * 40, "é" * 40, "x" * 41])
def test_what_is_no_key_cannot_be_trusted(key: str) -> None:
    with pytest.raises(TransferError, match="40 Z85 characters"):
        TrustStore([key])


def test_insecure_must_be_said_and_excludes_keys() -> None:
    with pytest.raises(TransferError, match="neither"):
        Security()
    with pytest.raises(TransferError, match="both"):
        Security(KeyPair.generate(), insecure=True)
    assert Security(insecure=True).keys is None
