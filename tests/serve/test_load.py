"""``homkv bench serve`` against a real service."""

import json
import sys
from pathlib import Path

import pytest
from gateway_cases import serving

from homkv import cli
from homkv.bench.arrivals import LoadOptions
from homkv.bench.load import Load, LoadResult, Stream
from homkv.errors import ShapeError, TransferError
from homkv.models import LoadedModel


def test_a_closed_loop_and_random_arrivals_are_measured(loaded: LoadedModel) -> None:
    with serving(loaded) as service:
        closed = Load(LoadOptions(service.url, num_requests=12, concurrency=6, max_tokens=8)).run()
        assert (len(closed.done), closed.max_open, closed.errors) == (12, 6, {})
        assert {s.num_tokens for s in closed.done} == {8}
        assert {s.num_prompt_tokens for s in closed.done} == {60}
        assert all(0 < s.ttft_s < s.e2el_s for s in closed.done)
        assert closed.tokens_per_s == pytest.approx(96 / closed.wall_s)
        before, after = closed.samples
        assert set(before.values) == set(after.values) > {"gateway open_fds"}
        poisson = Load(LoadOptions(service.url, num_requests=10, rate=20.0, max_tokens=4, shared_words=30)).run()
        assert len(poisson.done) == 10
        service.assert_free()


def test_errors_are_counted(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with serving(loaded, max_new_tokens=4) as service:
        result = Load(LoadOptions(service.url, num_requests=3, concurrency=3, max_tokens=5)).run()
        assert result.errors == {"HTTP 400": 3}
        record = tmp_path / "load.jsonl"
        command = ["homkv", "bench", "serve", "--url", service.url, "--requests", "2", "--json", str(record)]
        for max_tokens, code in ((4, 0), (5, 1)):
            monkeypatch.setattr(sys, "argv", [*command, "--max-tokens", str(max_tokens)])
            with pytest.raises(SystemExit) as stopped:
                cli.main()
            assert stopped.value.code == code
        rows = [json.loads(line) for line in record.read_text().splitlines()]
        assert [row["num_done"] for row in rows] == [2, 0]
        assert "api_key" not in rows[0]["options"]


def test_a_trace_is_replayed_while_the_service_is_watched(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace, record = tmp_path / "trace.jsonl", tmp_path / "load.jsonl"
    rows = [{"arrival_s": 0.1 * i, "prompt_tokens": 40 + i, "output_tokens": 3 + i % 2} for i in range(12)]
    trace.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["homkv", "bench", "serve", "--trace", str(trace), "--sample-s", "0.4", "--json", str(record)]
    with serving(loaded) as service:
        monkeypatch.setattr(sys, "argv", [*command, "--url", service.url, "--plots", str(tmp_path / "plots")])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert stopped.value.code == 0
        said = [json.loads(line) for line in record.read_text().splitlines()]
        *samples, result = said
        assert {row["kind"] for row in samples} == {"serve-sample"}
        assert len(samples) >= 4
        assert samples[-1]["values"]["streams_done"] == 12
        assert samples[-1]["values"]["gateway requests_accepted"] == 0
        assert result["kind"] == "serve-load"
        assert (result["num_done"], result["new_tokens"]) == (12, 6 * 3 + 6 * 4)
        assert result["prompt_tokens"] == sum(row["prompt_tokens"] for row in rows)
        assert (result["options"]["trace"], result["left_behind"], result["growth"]) == ("trace.jsonl", {}, [])
        assert 1.1 <= result["wall_s"] < 30
        assert (tmp_path / "plots" / "serve-soak.svg").exists()
        trace.write_text(trace.read_text() + '{"arrival_s": 0.0, "prompt_tokens": 1, "output_tokens": 0}\n')
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert stopped.value.code == 2
        assert "line 13: expected a whole number of tokens" in " ".join(capsys.readouterr().err.split())
        service.assert_free()


def test_percentiles() -> None:
    streams = [Stream(ttft_s=float(i), e2el_s=float(i) + 2, num_tokens=3) for i in range(1, 101)]
    result = LoadResult(LoadOptions("http://x"), 10.0, [*streams, Stream(error="HTTP 503")], 7)
    assert result.latencies()["ttft_s"] == pytest.approx({"mean": 50.5, "p50": 50.5, "p90": 90.1, "p99": 99.01})
    assert result.latencies()["tpot_s"]["p99"] == pytest.approx(1.0)


def test_what_cannot_be_sent_is_refused() -> None:
    with pytest.raises(ShapeError, match="rate"):
        LoadOptions("http://x", rate=0.0)
    with pytest.raises(ShapeError, match="shared words"):
        LoadOptions("http://x", prompt_words=3, shared_words=4)
    with pytest.raises(TransferError, match="homkv serve"):
        Load(LoadOptions("http://127.0.0.1:9", num_requests=1)).run()
