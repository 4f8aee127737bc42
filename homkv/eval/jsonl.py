"""Records that grow line by line: what was written before an interruption stays, and only a cut line is lost."""

from pathlib import Path
from typing import TypeVar

import msgspec

from homkv.errors import FormatError

T = TypeVar("T")


def read_jsonl(path: Path, decoder: msgspec.json.Decoder[T], what: str, remedy: str) -> list[T]:
    """All lines of a file; none if it does not exist.

    A last line without its end was cut off by an interruption: it is removed from the file. Raises FormatError, which
    names ``what`` was expected, the line and the ``remedy``, for anything else that cannot be decoded.
    """
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    lines = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            lines.append(decoder.decode(line))
        except msgspec.DecodeError as error:
            raise FormatError(f"expected {what} in {path}, found in line {number}: {error}; {remedy}") from error
    return lines


def append_jsonl(path: Path, line: msgspec.Struct) -> None:
    """Add one line and hand it to the system."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        file.write(msgspec.json.encode(line) + b"\n")
