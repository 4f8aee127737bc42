"""Requests to replay or to simulate: the one trace format, and readers of the public traces.

The format is JSON Lines, one request per line, in the order of arrival, gzip-compressed or not:

    {"request_id": "0", "arrival_s": 0.0, "prompt_tokens": 12000, "output_tokens": 256}

``prefix_blocks`` is optional: ids of the prompt's leading blocks of PREFIX_BLOCK_TOKENS tokens. Equal ids at equal
places are the same tokens, so a shared leading run is KV that a prefix cache may already hold.

`read_trace` also reads Mooncake's JSON Lines (``timestamp`` ms, ``input_length``, ``output_length``, ``hash_ids``),
Azure's CSV (``TIMESTAMP``, ``ContextTokens``, ``GeneratedTokens``) and, without arrival times, Vidur's CSV
(``num_prefill_tokens``, ``num_decode_tokens``); it tells them apart by their columns, not by their names.
"""

import csv
import gzip
import itertools
import json
import math
import random
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec

from homkv.errors import TraceError

PREFIX_BLOCK_TOKENS = 512  # Mooncake's
GZIP_MAGIC = b"\x1f\x8b"
MAX_TOKENS = 1 << 31  # of a prompt or an answer
MAX_ARRIVAL_S = 1e9  # 32 years: beyond it a float no longer tells microseconds apart
Row = Mapping[str, Any]


class Request(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One request. ``arrival_s``: seconds since the trace's start."""

    request_id: str
    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    prefix_blocks: tuple[int, ...] = ()


def read_trace(path: Path, *, requests_per_s: float | None = None, seed: int = 0) -> list[Request]:
    """Read a trace file of any known kind.

    ``requests_per_s`` replaces the file's arrival times by a Poisson process of that rate (`poisson_arrivals`); a file
    without arrival times needs it. Raises TraceError, which names the line and the reason, for a file that cannot be
    opened or decompressed, an unknown or missing column, a value that is not a number, negative or not finite, an
    arrival before the one above it, and an empty file.
    """
    text = read_text(path)
    if not text.strip():
        raise TraceError(f"expected requests in {path}, found an empty file; see homkv.sim.trace for the format")
    parse = _json_rows if text.lstrip()[0] == "{" else _csv_rows
    requests = list(_requests(path, parse(path, text), requests_per_s is not None))
    if not requests:
        raise TraceError(
            f"expected requests in {path}, found none below the header; see homkv.sim.trace for the format"
        )
    return requests if requests_per_s is None else poisson_arrivals(requests, requests_per_s, seed)


def write_trace(requests: Iterable[Request], path: Path) -> None:
    """Write requests as JSON Lines, gzip-compressed if the name ends in ``.gz``."""
    data = b"".join(msgspec.json.encode(request) + b"\n" for request in requests)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


class Order:
    """Looks at requests one after another: arrivals ascend, ids are unique, every field is in range."""

    def __init__(self) -> None:
        self._before, self._ids = 0.0, set[str]()

    def check(self, request: Request) -> None:
        """Take the next one. Raises TraceError."""
        if request.request_id in self._ids:
            raise TraceError(f"expected every request_id once, found {request.request_id!r} again")
        self._ids.add(request.request_id)
        if not 0 <= request.arrival_s <= MAX_ARRIVAL_S:
            raise TraceError(f"expected 0 <= arrival_s <= 1e9, found {request.arrival_s!r}")
        if request.arrival_s < self._before:
            raise TraceError(
                f"expected arrivals in ascending order, found {request.arrival_s:g} s after {self._before:g} s; sort "
                "the trace by its arrival times"
            )
        self._before = request.arrival_s
        for field in ("prompt_tokens", "output_tokens"):
            if not 1 <= getattr(request, field) < MAX_TOKENS:
                raise TraceError(f"expected 1 <= {field} < 2^31, found {getattr(request, field)!r}")


def poisson_arrivals(requests: Iterable[Request], requests_per_s: float, seed: int = 0) -> list[Request]:
    """The same requests in the same order at the times of a Poisson process, a pure function of ``seed``.

    ``gap ~ Exponential(requests_per_s)``. Raises TraceError for a rate that is not positive and finite.
    """
    if not (math.isfinite(requests_per_s) and requests_per_s > 0):
        raise TraceError(f"expected a positive rate in requests per second, found {requests_per_s!r}")
    draw = random.Random(seed)
    at, out = 0.0, []
    for request in requests:
        at += draw.expovariate(requests_per_s)
        out.append(msgspec.structs.replace(request, arrival_s=at))
    return out


def scaled(
    requests: Iterable[Request],
    *,
    tokens: float = 1.0,
    answers: float | None = None,
    speed: float = 1.0,
    limit: int | None = None,
) -> list[Request]:
    """The first ``limit`` requests, arrivals ``speed`` times faster, lengths (at least 1) times a factor.

    Prompts are multiplied by ``tokens``, answers by ``answers``, None meaning ``tokens``.
    What a small machine needs to replay a large one's trace. Prefix blocks are dropped when lengths change.
    """
    out = []
    for request in itertools.islice(requests, limit):
        prompt = max(1, round(request.prompt_tokens * tokens))
        output = max(1, round(request.output_tokens * (tokens if answers is None else answers)))
        blocks = request.prefix_blocks if tokens == 1.0 else ()
        out.append(Request(request.request_id, request.arrival_s / speed, prompt, output, blocks))
    return out


def read_text(path: Path) -> str:
    """Text of a file, gunzipped if its first bytes say so. Raises TraceError."""
    try:
        data = path.read_bytes()
        if data.startswith(GZIP_MAGIC):
            data = gzip.decompress(data)
        return data.decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise TraceError(
            f"expected a readable trace of JSON Lines or CSV, gzip or not, found {path}: {error}"
        ) from error


def _json_rows(path: Path, text: str) -> Iterator[tuple[int, Row]]:
    for line, content in enumerate(text.splitlines(), 1):
        if not content.strip():
            continue
        try:
            row = json.loads(content)
        except (ValueError, RecursionError) as error:  # ValueError: not JSON, or a number of thousands of digits
            raise TraceError(f"{path}, line {line}: expected a JSON object, found {content[:60]!r}: {error}") from error
        if not isinstance(row, dict):
            raise TraceError(f"{path}, line {line}: expected a JSON object, found {content[:60]!r}")
        yield line, row


def _csv_rows(path: Path, text: str) -> Iterator[tuple[int, Row]]:
    reader = csv.DictReader(text.splitlines())
    try:
        for row in reader:
            if None in row or None in row.values():
                raise TraceError(
                    f"{path}, line {reader.line_num}: expected {len(reader.fieldnames or ())} columns as in the "
                    f"header, found {'more' if None in row else 'fewer'}"
                )
            yield reader.line_num, row
    except csv.Error as error:
        raise TraceError(f"{path}, line {reader.line_num + 1}: expected comma-separated values: {error}") from error


def _requests(path: Path, rows: Iterator[tuple[int, Row]], timeless: bool) -> Iterator[Request]:
    convert: Callable[[Row, int], Request] | None = None
    order = Order()
    for index, (line, row) in enumerate(rows):
        try:
            if convert is None:
                convert = _converter(row, timeless)
            request = convert(row, index)
            order.check(request)
            yield request
        except TraceError as error:
            raise TraceError(f"{path}, line {line}: {error}") from error


def _converter(row: Row, timeless: bool) -> Callable[[Row, int], Request]:
    """The reader of this kind of row. Raises TraceError for unknown columns."""
    for column, convert in (("arrival_s", _own), ("timestamp", _mooncake), ("TIMESTAMP", _Azure())):
        if column in row:
            return convert
    if "num_prefill_tokens" in row:
        if not timeless:
            raise TraceError(
                "expected arrival times, found a trace of lengths only; give a rate in requests per second"
            )
        return _vidur
    raise TraceError(
        f"expected the columns of homkv (arrival_s, prompt_tokens, output_tokens), Mooncake, Azure or Vidur, found "
        f"{', '.join(map(str, row))[:120]}"
    )


def _own(row: Row, index: int) -> Request:
    unknown = sorted(set(row) - set(Request.__struct_fields__))
    if unknown:
        raise TraceError(f"expected columns among {', '.join(Request.__struct_fields__)}, found {unknown}")
    request_id = row.get("request_id", str(index))
    if not isinstance(request_id, str) or not request_id:
        raise TraceError(f"expected a string as request_id, found {request_id!r}")
    arrival_s = _number(row, "arrival_s")
    return Request(
        request_id,
        arrival_s,
        _tokens(row, "prompt_tokens"),
        _tokens(row, "output_tokens"),
        _blocks(row, "prefix_blocks"),
    )


def _mooncake(row: Row, index: int) -> Request:
    prompt, output = _tokens(row, "input_length"), _tokens(row, "output_length")
    return Request(str(index), _number(row, "timestamp") / 1e3, prompt, output, _blocks(row, "hash_ids"))


class _Azure:
    """Rows of Azure's CSV; times count from the first row."""

    def __init__(self) -> None:
        self.start: datetime | None = None

    def __call__(self, row: Row, index: int) -> Request:
        text = str(row["TIMESTAMP"])
        try:
            now = datetime.fromisoformat(text)
        except ValueError as error:
            raise TraceError(f"expected a date and time as TIMESTAMP, found {text!r}") from error
        self.start = self.start or now
        if (now.tzinfo is None) != (self.start.tzinfo is None):
            raise TraceError(f"expected TIMESTAMP with a time zone in all rows or in none, found {text!r}")
        arrival_s = (now - self.start).total_seconds()
        if arrival_s < 0:
            raise TraceError(f"expected arrivals in ascending order, found {text!r}; sort the trace by TIMESTAMP")
        return Request(str(index), arrival_s, _tokens(row, "ContextTokens"), _tokens(row, "GeneratedTokens"))


def _vidur(row: Row, index: int) -> Request:
    return Request(str(index), 0.0, _tokens(row, "num_prefill_tokens"), _tokens(row, "num_decode_tokens"))


def _number(row: Row, column: str) -> float:
    if column not in row:
        raise TraceError(f"expected a column {column}, found none")
    value = row[column]
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise TraceError(f"expected a number as {column}, found {value!r}") from error
    if not math.isfinite(number) or number < 0:
        raise TraceError(f"expected a finite number of at least 0 as {column}, found {value!r}")
    return number


def _tokens(row: Row, column: str) -> int:
    number = _number(row, column)
    if not 1 <= number < MAX_TOKENS or number != int(number):
        raise TraceError(f"expected a whole number of tokens from 1 to 2^31 - 1 as {column}, found {row[column]!r}")
    return int(number)


def _blocks(row: Row, column: str) -> tuple[int, ...]:
    value = row.get(column, ())
    if not isinstance(value, list | tuple) or not all(isinstance(x, int) and not isinstance(x, bool) for x in value):
        raise TraceError(f"expected a list of block ids as {column}, found {value!r}")
    return tuple(value)
