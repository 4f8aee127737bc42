"""`homkv bench pd` whole, on CPUs: worker processes, both kinds of links, records, and what it refuses."""

import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from homkv.bench.jct.summary import measured, rates_at_p99, tails
from homkv.bench.pd import nixl
from homkv.bench.pd.cell import run_cell
from homkv.bench.pd.messages import Cell, Closed
from homkv.bench.pd.options import PdOptions, known_prefill
from homkv.bench.pd.pool import CellError, Pool, PoolOptions
from homkv.bench.pd.run import PdBench
from homkv.bench.pd.workload import WORKLOADS, poisson
from homkv.cli import main
from homkv.cli.bench_pd import overlaps_of, split_devices
from homkv.errors import FormatError, HomkvError, ShapeError, UnsupportedError
from homkv.sim.record import PHASES, read_left_out, read_record

TINY = WORKLOADS["tiny"]


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    options = PoolOptions(("cpu",), ("cpu", "cpu"), "tiny", lanes=2, chunk_bytes=1 << 14, use_direct=True)
    with Pool(options, time.monotonic() + 300) as made:
        yield made


def tokens(pool: Pool, name: str, link: str, overlap: bool = True) -> list[list[int]]:
    if link == "direct":
        pool.join(link, time.monotonic() + 300)
    cell = Cell(name, link, overlap, "exact", 2, TINY.prompt, TINY.longest)
    outcome = run_cell(pool, cell, poisson(TINY, 5, 50.0, 0), time.monotonic() + 300)
    assert {life.decode_rank for life in outcome.lives} == {1, 2}
    sent = sum(life.prefilled.link_bytes for life in outcome.lives if life.prefilled)
    assert sum(outcome.closed[rank].digest_bytes for rank in (1, 2)) == sent  # every byte was checked on arrival
    return [life.finished.tokens for life in outcome.lives if life.finished]


@pytest.mark.parametrize("name", ["bf16", "balanced"])
def test_links_do_not_change_the_tokens(pool: Pool, name: str) -> None:
    expected = tokens(pool, name, "direct")
    assert [len(t) for t in expected] == [r.output_tokens for r in poisson(TINY, 5, 50.0, 0)]
    assert tokens(pool, name, "tcp") == expected
    assert tokens(pool, name, "0.5", overlap=False) == expected


def test_a_record_of_a_whole_run(tmp_path: Path) -> None:
    options = PdOptions(
        ("cpu",), ("cpu",), tmp_path / "pd.jsonl", model="tiny", workloads=("tiny",), formats=("bf16", "small"),
        links=("1",), loads=(0.8,), requests=4, turns=2, slots=2, budget_s=600,
    )  # fmt: skip
    bench = PdBench(options, Console(quiet=True))
    runs = bench.run()
    assert bench.skipped == []
    assert [run.info.options["load"] for run in runs] == ["0.8"] * 4
    assert [run.info.run_id.rpartition("/") for run in runs] == [
        (f"tiny/1/{name}/overlap/0.8", "/", turn) for turn in "01" for name in ("bf16", "small")
    ]
    assert runs == list(read_record(options.record).values())
    for run in runs:
        sealed = {"seal"} if run.info.kv_cache_dtype == "small" else set()  # a CPU's steps do not seal
        assert {step.stage for step in run.steps} == {"prefill", "pack", "unpack", "handoff", "decode"} | sealed
        for r in run.requests:
            assert sum(getattr(r, phase) for phase in PHASES) == pytest.approx(r.jct_s, abs=1e-6)
    base, small = measured(runs)
    assert small.mean("wire_bytes") < base.mean("wire_bytes")
    assert [r.prompt_tokens for r in base.requests] == [r.prompt_tokens for r in small.requests]
    assert len(base.runs) == len(small.runs) == 2
    assert rates_at_p99(tails([base, small]), "0.8") == []  # one load says nothing


def test_a_cell_that_fails_is_left_out_and_the_next_one_runs(tmp_path: Path) -> None:
    """16-bit KV of the longest prompt does not fit in the budget; ours does, on new workers."""
    options = PdOptions(
        ("cpu",), ("cpu",), tmp_path / "pd.jsonl", model="tiny", workloads=("tiny",), formats=("bf16", "small"),
        links=("1",), rate_rps=50.0, requests=3, slots=2, kv_budget_gib=250_000 / 2**30, budget_s=300,
    )  # fmt: skip
    bench = PdBench(options, Console(quiet=True))
    runs = bench.run()
    assert [run.info.run_id for run in runs] == ["tiny/1/small/overlap/50rps/0.000233GiB/0"]
    (left_out,) = read_left_out(options.record)
    assert left_out.run_id == "tiny/1/bf16/overlap/50rps/0.000233GiB/0"
    assert "CapacityError" in left_out.reason
    assert bench.skipped == [f"{left_out.run_id}: {left_out.reason}"]
    assert (runs[0].info.peak_kv_bytes or 0) <= 250_000


@pytest.mark.skipif(nixl.is_available(), reason="NIXL is installed, so that its link opens")
def test_a_link_that_does_not_open_costs_its_own_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that cannot load NIXL fail when its first cell comes; the second one is not tried, TCP's run."""
    monkeypatch.setattr(nixl, "is_available", lambda: True)
    options = PdOptions(
        ("cpu",), ("cpu",), tmp_path / "pd.jsonl", model="tiny", workloads=("tiny",), formats=("fp8", "small"),
        links=("nixl", "1"), rate_rps=50.0, requests=2, slots=2, budget_s=600,
    )  # fmt: skip
    runs = PdBench(options, Console(quiet=True)).run()
    assert [run.info.run_id for run in runs] == [f"tiny/1/{name}/overlap/50rps/0" for name in ("fp8", "small")]
    first, second = read_left_out(options.record)
    assert "No module named 'nixl'" in first.reason
    assert second.run_id == "tiny/nixl/small/overlap/50rps/0"
    assert second.reason.startswith("the link nixl did not open")


def test_waiting_ends(pool: Pool) -> None:
    with pytest.raises(CellError, match=r"expected Closed of workers \[0\] in time"):
        pool.gather(Closed, [0], time.monotonic() + 0.05)


def test_a_worker_that_fails_is_an_error_with_its_log() -> None:
    with pytest.raises(CellError, match=r"(?s)expected worker \d to go on, found.*no-such-model"):
        Pool(PoolOptions(("cpu",), ("cpu",), "no-such-model"), time.monotonic() + 300)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"model": "gpt"}, UnsupportedError),
        ({"workloads": ("huge",)}, UnsupportedError),
        ({"formats": ("nonsense",)}, FormatError),
        ({"links": ("fast",)}, UnsupportedError),
        ({"links": ("0",)}, UnsupportedError),
        ({"links": ("nan",)}, UnsupportedError),
        ({"turns": 0}, ShapeError),
        ({"requests": 0}, ShapeError),
        ({"slots": -1}, ShapeError),
        ({"loads": (0.0,)}, ShapeError),
        ({"rate_rps": -1.0}, ShapeError),
        ({"kv_budget_gib": -1.0}, ShapeError),
    ],
)
def test_what_cannot_be_measured_is_refused(change: dict[str, Any], error: type[Exception]) -> None:
    usual: dict[str, Any] = {"prefill_devices": ("cpu",), "decode_devices": ("cpu",), "record": Path("unused")}
    with pytest.raises(error):
        PdOptions(**{**usual, **change})


@pytest.mark.parametrize("device", ["cuda:99", "abacus", "meta"])
def test_devices_that_are_not_here_are_refused(device: str) -> None:
    options = PdOptions((device,), ("cpu",), Path("unused"))
    with pytest.raises(UnsupportedError, match=r"CUDA devices|cpu or cuda|like cpu"):
        PdBench(options, Console(quiet=True))


def test_devices_by_role() -> None:
    assert split_devices("cuda:0, cuda:1", None, None) == (("cuda:0",), ("cuda:1",))
    assert split_devices("a,b,c", None, None) == (("a", "b"), ("c",))
    assert split_devices(None, ["a"], ["b", "c"]) == (("a",), ("b", "c"))
    for bad in (("a", None, None), (None, ["a"], None), ("a,b", ["c"], None), (None, None, None)):
        with pytest.raises(ShapeError, match="--devices with two or more"):
            split_devices(*bad)


def test_words_that_mean_nothing_are_refused() -> None:
    assert overlaps_of("both") == (True, False)
    with pytest.raises(ShapeError):
        overlaps_of("maybe")
    assert known_prefill("int8") == "int8"
    with pytest.raises(HomkvError):
        known_prefill("fp4")


def test_the_command_names_what_is_wrong(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["homkv", "bench", "pd", "--devices", "cpu,cpu", "--link", "warp"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    assert "expected direct, nixl, tcp or a rate" in capsys.readouterr().err


def test_the_command_line_becomes_options(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[PdOptions] = []
    monkeypatch.setattr("homkv.cli.bench_pd.show", lambda options, console, legs: seen.append(options))
    words = "bench pd --prefill cpu --decode cpu --decode cpu --model tiny --link 2 --link tcp --overlap both --rate 3"
    monkeypatch.setattr(sys, "argv", ["homkv", *words.split()])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code in (0, None)
    usual = PdOptions(("cpu",), ("cpu", "cpu"), Path("runs/pd.jsonl"), model="tiny")
    assert seen == [replace(usual, links=("2", "tcp"), overlaps=(True, False), rate_rps=3.0)]


def test_an_estimate_needs_no_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = "bench pd --devices cuda:0,cuda:1 --link 25 --link nixl --load 0.8 --load 3 --requests 4 --estimate h100"
    monkeypatch.setattr(sys, "argv", ["homkv", *words.split()])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code in (0, None)
    out = capsys.readouterr().out
    assert out.count("/overlap/0.8/0") == 2 * 5
    assert out.count("long, NIXL") == 5  # requests per second at equal P99
