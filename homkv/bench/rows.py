"""Measured rows on disk."""

import json
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal


def command_line() -> str:
    """This process's command, as it is typed."""
    return shlex.join(["homkv", *sys.argv[1:]])


def append_rows(rows: Iterable[dict[str, Any]], record: Path | None, *, mode: Literal["a", "w"] = "a") -> None:
    """Append one JSON line per row to ``record``; nothing without one. ``mode`` "w": instead of what it held."""
    if record is None:
        return
    record.parent.mkdir(parents=True, exist_ok=True)
    with record.open(mode, encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
