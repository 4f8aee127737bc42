"""Records: what is written is what is read, and nothing else is taken for a record."""

import math
from pathlib import Path

import msgspec
import pytest

from homkv.errors import TraceError
from homkv.sim.record import (
    LeftOut,
    Line,
    RequestRecord,
    RunInfo,
    StepSample,
    read_left_out,
    read_record,
    write_record,
)

RUN = RunInfo(run_id="r", source="sim", model="m", kv_cache_dtype="fp16", command="c", machine="x", options={"a": "b"})
STEP = StepSample(run_id="r", stage="decode", batch=2, tokens=100, seconds=0.01)
REQUEST = RequestRecord(
    run_id="r",
    request_id="0",
    arrival_s=0.0,
    prompt_tokens=4,
    output_tokens=2,
    queue_s=1.0,
    prefill_s=1.0,
    pack_s=0.0,
    transfer_s=0.0,
    unpack_s=0.0,
    wait_s=0.0,
    decode_s=1.0,
    ttft_s=2.0,
    tpot_s=1.0,
    jct_s=3.0,
    wire_bytes=10,
    kv_bytes=10,
)


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    write_record(path, [RUN, STEP])
    write_record(path, [REQUEST], append=True)
    run = read_record(path)["r"]
    assert (run.info, run.steps, run.requests) == (RUN, (STEP,), (REQUEST,))


def test_what_was_left_out_is_told_apart(tmp_path: Path) -> None:
    path, left_out = tmp_path / "r.jsonl", LeftOut(run_id="s", reason="no room")
    write_record(path, [left_out])
    assert read_record(path) == {}
    write_record(path, [RUN, STEP], append=True)
    assert list(read_record(path)) == ["r"]
    assert read_left_out(path) == [left_out]


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ([], "at least one run"),
        ([STEP], "a line of kind run"),
        ([RUN, RUN], "line 2: expected every id once"),
        ([RUN, REQUEST, REQUEST], "line 3: expected every id once"),
        ([RUN, msgspec.structs.replace(REQUEST, jct_s=-1.0)], "line 2"),
        ([RUN, msgspec.structs.replace(REQUEST, run_id="other")], "a line of kind run for 'other'"),
    ],
)
def test_refuses(tmp_path: Path, lines: list[Line], reason: str) -> None:
    write_record(tmp_path / "r.jsonl", lines)
    with pytest.raises(TraceError, match=reason):
        read_record(tmp_path / "r.jsonl")


@pytest.mark.parametrize(
    "text",
    ['{"kind": "run", "x": ' + "[" * 100_000, "{}", '{"kind": "weather"}', "not json", '{"kind": "run", "run_id": 1}'],
)
def test_refuses_other_lines(tmp_path: Path, text: str) -> None:
    (tmp_path / "r.jsonl").write_text(text)
    with pytest.raises(TraceError, match="line 1"):
        read_record(tmp_path / "r.jsonl")


def test_refuses_to_write_what_json_has_not(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="jct_s"):
        write_record(tmp_path / "r.jsonl", [RUN, msgspec.structs.replace(REQUEST, jct_s=math.nan)])
