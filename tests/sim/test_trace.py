"""Traces: every known kind is read, and every bad one is refused with its line and the reason."""

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from homkv.errors import TraceError
from homkv.sim.trace import Order, Request, poisson_arrivals, read_trace, scaled, write_trace

GOOD = '{"request_id": "a", "arrival_s": 0.5, "prompt_tokens": 10, "output_tokens": 2}'
AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9799600,4808,10\n"
MOONCAKE = '{"timestamp": 1500, "input_length": 6758, "output_length": 500, "hash_ids": [0, 1]}'
VIDUR = "num_prefill_tokens,num_decode_tokens,num_total_tokens,pd_ratio\n3772,54,3826,69.85\n"


def written(folder: Path, text: str | bytes) -> Path:
    path = folder / "trace"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_reads_what_it_writes(tmp_path: Path) -> None:
    requests = [Request("a", 0.0, 5, 1), Request("b", 1.25, 600, 3, (7, 8))]
    for name in ("t.jsonl", "t.jsonl.gz"):
        write_trace(requests, tmp_path / name)
        assert read_trace(tmp_path / name) == requests
    assert (tmp_path / "t.jsonl.gz").read_bytes()[:2] == b"\x1f\x8b"


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (GOOD, Request("a", 0.5, 10, 2)),
        (MOONCAKE, Request("0", 1.5, 6758, 500, (0, 1))),
        (AZURE, Request("0", 0.0, 4808, 10)),
        ("\ufeff" + AZURE, Request("0", 0.0, 4808, 10)),
    ],
)
def test_reads_public_kinds(tmp_path: Path, text: str, expected: Request, compress: bool) -> None:
    data = gzip.compress(text.encode()) if compress else text.encode()
    assert read_trace(written(tmp_path, data)) == [expected]


def test_azure_counts_from_its_first_row(tmp_path: Path) -> None:
    text = AZURE + "2023-11-16 18:17:04.0319600,3180,8\n"
    assert read_trace(written(tmp_path, text))[1].arrival_s == pytest.approx(0.052, abs=1e-6)


def test_lengths_only_need_a_rate(tmp_path: Path) -> None:
    path = written(tmp_path, VIDUR)
    with pytest.raises(TraceError, match="line 2: expected arrival times"):
        read_trace(path)
    (request,) = read_trace(path, requests_per_s=2.0, seed=1)
    assert request.prompt_tokens == 3772
    assert request.arrival_s > 0


@pytest.mark.parametrize(
    ("text", "where", "reason"),
    [
        ("", "", "empty file"),
        ("  \n", "", "empty file"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "", "none below the header"),
        (GOOD + "\n{", "line 2", "a JSON object"),
        (GOOD + "\n[1]", "line 2", "a JSON object"),
        (GOOD.replace("0.5", "NaN"), "line 1", "finite"),
        (GOOD.replace("0.5", "-1"), "line 1", "at least 0"),
        (GOOD.replace("0.5", "Infinity"), "line 1", "finite"),
        (GOOD.replace("0.5", "true"), "line 1", "finite"),
        (GOOD.replace("0.5", '"soon"'), "line 1", "a number as arrival_s"),
        (GOOD.replace("0.5", "1" + "0" * 400), "line 1", "a number as arrival_s"),
        (GOOD.replace("10,", "0,"), "line 1", "whole number of tokens"),
        (GOOD.replace("10,", "10.5,"), "line 1", "whole number of tokens"),
        (GOOD.replace("10,", "null,"), "line 1", "a number as prompt_tokens"),
        (GOOD.replace('"prompt_tokens": 10, ', ""), "line 1", "a column prompt_tokens, found none"),
        (GOOD.replace("{", '{"colour": 1, '), "line 1", "colour"),
        (GOOD + "\n" + GOOD.replace("0.5", "0.25").replace('"a"', '"b"'), "line 2", "ascending"),
        (MOONCAKE.replace("[0, 1]", "[0.5]"), "line 1", "block ids"),
        (AZURE + "2023-11-16 18:17:02.0,1,1\n", "line 3", "ascending"),
        (AZURE + "2023-11-16 18:17:09.0,1,1\n2023-11-16 18:17:08.0,1,1\n", "line 4", "ascending"),
        (AZURE + "2023-11-16 18:17:05.0,1\n", "line 3", "fewer"),
        (AZURE + "2023-11-16 18:17:05.0,1,1,1\n", "line 3", "more"),
        (AZURE + "yesterday,1,1\n", "line 3", "date and time"),
        (AZURE + "2023-11-16 18:17:05.0,-4,1\n", "line 3", "at least 0"),
        (AZURE + "2023-11-16T18:17:05+00:00,4,1\n", "line 3", "time zone"),
        ("a,b\n1,2\n", "line 2", "expected the columns"),
        (GOOD + "\n" + GOOD, "line 2", "every request_id once"),
        ('{"a": ' + "[" * 100_000, "line 1", "a JSON object"),
        (GOOD.replace("10,", "1" * 5000 + ","), "line 1", "a JSON object"),
        ("a,b\n" + "x" * 200_000 + ",1\n", "line 2", "comma-separated"),
        (b"\xff\xfe\x00", "", "readable trace"),
        (gzip.compress(GOOD.encode(), mtime=0)[:-6], "", "readable trace"),
        (b"\x1f\x8bnonsense", "", "readable trace"),
    ],
)
def test_refuses_with_line_and_reason(tmp_path: Path, text: str | bytes, where: str, reason: str) -> None:
    with pytest.raises(TraceError) as caught:
        read_trace(written(tmp_path, text))
    assert where in str(caught.value)
    assert reason in str(caught.value)


@settings(max_examples=200, deadline=None)
@given(data=st.one_of(st.text(), st.binary(), st.text().map(lambda t: AZURE + t), st.text().map(lambda t: GOOD + t)))
def test_any_bytes_are_requests_or_a_typed_error(tmp_path_factory: pytest.TempPathFactory, data: str | bytes) -> None:
    path = written(tmp_path_factory.getbasetemp(), data if isinstance(data, bytes) else data.encode("utf-8", "ignore"))
    try:
        requests = read_trace(path)
    except TraceError as caught:
        message = str(caught)
    else:
        order = Order()
        for request in requests:
            order.check(request)
        message = f"{path}: {len(requests)} requests"
    assert message.startswith((str(path), "expected"))


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="readable trace"):
        read_trace(tmp_path / "nowhere")


def test_poisson_is_a_function_of_the_seed() -> None:
    requests = [Request(str(i), 0.0, 1, 1) for i in range(20_000)]
    first, again, other = (poisson_arrivals(requests, 4.0, seed) for seed in (1, 1, 2))
    assert first == again != other
    assert first[-1].arrival_s == pytest.approx(5_000, rel=0.03)
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(TraceError, match="positive rate"):
            poisson_arrivals(requests, bad)


def test_scaled_keeps_order_and_proportions() -> None:
    requests = [Request("a", 2.0, 1000, 3, (1,)), Request("b", 4.0, 10, 1)]
    small = scaled(requests, tokens=0.1, speed=2.0)
    assert small == [Request("a", 1.0, 100, 1), Request("b", 2.0, 1, 1)]
    assert json.loads(json.dumps([r.arrival_s for r in scaled(requests, limit=1)])) == [2.0]
