"""Who may connect: CURVE key pairs and the list of trusted public keys."""

import io
import logging
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import msgspec
import zmq
from zmq.utils import z85

from homkv.errors import TransferError

log = logging.getLogger(__name__)
Z85Key = Annotated[str, msgspec.Meta(min_length=40, max_length=40)]


class KeyPair(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A CURVE key pair, Z85 text of 40 characters each."""

    public: Z85Key
    secret: Z85Key

    def __repr__(self) -> str:  # keep the secret out of logs
        return f"KeyPair(public={self.public!r})"

    @classmethod
    def generate(cls) -> "KeyPair":
        """Make a new pair."""
        public, secret = zmq.curve_keypair()
        return cls(public.decode(), secret.decode())

    def save(self, path: Path | str) -> None:
        """Write the pair, readable by its owner only. Raises TransferError if the file exists."""
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError as error:
            raise TransferError(f"expected no file at {path}, found one; delete it to replace the key") from error
        with os.fdopen(fd, "wb") as file:
            file.write(msgspec.json.encode(self))

    @classmethod
    def load(cls, path: Path | str) -> "KeyPair":
        """Read a pair. Raises TransferError if others can read the file or the two keys do not belong together."""
        with _readable(path) as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            if mode & 0o077:
                raise TransferError(
                    f"expected {path} readable by its owner only (0600), found {mode:04o}; its secret may be known: "
                    "generate a new pair, or chmod 600 if you are sure"
                )
            data = file.read(4096)
        try:
            pair = msgspec.json.decode(data, type=cls)
            matches = zmq.curve_public(pair.secret.encode()) == pair.public.encode()
        except (msgspec.MsgspecError, ValueError, zmq.ZMQError) as error:
            raise TransferError(f"expected a key pair of homkv in {path}, found {error}; make a new one") from error
        if not matches:
            raise TransferError(f"expected the public key of the secret in {path}, found another; generate a new pair")
        return pair


class TrustStore:
    """Public keys that may connect to a listener. May be changed while the listener runs."""

    def __init__(self, keys: Iterable[str] = ()) -> None:
        self._keys: set[str] = set()
        for key in keys:
            self.add(key)

    @classmethod
    def load(cls, path: Path | str) -> "TrustStore":
        """Read one public key per line; empty lines and ``#`` comments are skipped."""
        with _readable(path) as file:
            try:
                lines = file.read().decode().splitlines()
            except UnicodeDecodeError as error:
                message = f"expected a public key per line in {path}, found bytes that are no text"
                raise TransferError(message) from error
        # a Z85 key may contain '#', so only whole lines are comments
        keys = [line.strip() for line in lines if line.strip() and not line.startswith("# ")]
        if not all(map(_is_public, keys)):  # what is there instead is never shown: it may be a secret
            raise TransferError(
                f"expected a public key of 40 Z85 characters per line in {path}, found something else; name a .pub or "
                "trust file"
            )
        return cls(keys)

    def save(self, path: Path | str) -> None:
        """Write one public key per line; a reader sees the old keys or the new ones. Raises TransferError."""
        scratch = Path(path).with_name(Path(path).name + ".new")
        try:
            scratch.write_text("".join(f"{key}\n" for key in self.keys), encoding="utf-8")
            os.replace(scratch, path)
        except OSError as error:
            raise TransferError(f"expected to write {path}, found {error.strerror}; choose another file") from error

    @property
    def keys(self) -> list[str]:
        """The trusted public keys, sorted."""
        return sorted(self._keys)

    def add(self, public: str) -> None:
        """Trust a key. Raises TransferError if it is not 40 characters of Z85."""
        if not _is_public(public):
            raise TransferError(f"expected a public key of 40 Z85 characters, found {public!r}; see KeyPair.public")
        self._keys.add(public)

    def remove(self, public: str) -> None:
        """Stop trusting a key: the next connection with it is refused, an open one lives on."""
        self._keys.discard(public)

    def callback(self, domain: str, key: bytes) -> bool:
        """Answer pyzmq's authenticator: may this key connect?"""
        trusted = key.decode() in self._keys
        if not trusted:
            log.warning("refused a peer with untrusted public key %s", key.decode())
        return trusted


@dataclass(frozen=True)
class Security:
    """How a connection is protected: ``keys`` are ours, ``trust`` (listeners) are the keys that may connect.

    ``insecure=True`` turns encryption and authentication off and excludes keys: there is no half way.
    """

    keys: KeyPair | None = None
    trust: TrustStore = field(default_factory=TrustStore)
    insecure: bool = False

    def __post_init__(self) -> None:
        if (self.keys is None) != self.insecure:
            raise TransferError(
                "expected either keys=KeyPair or insecure=True, found "
                f"{'both' if self.insecure else 'neither'}; KeyPair.generate() makes keys"
            )


def _is_public(text: str) -> bool:
    """Whether it is 40 characters of Z85."""
    try:
        return len(text) == 40 and len(z85.decode(text)) == 32
    except (KeyError, ValueError):
        return False


def _readable(path: Path | str) -> io.BufferedReader:
    try:
        return open(path, "rb")
    except OSError as error:
        raise TransferError(f"expected a readable file at {path}, found {error.strerror}; see docs/wire.md") from error
