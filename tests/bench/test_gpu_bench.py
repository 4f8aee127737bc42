"""The GPU benchmark without a GPU: its arithmetic, records, plots and refusals, and that candidates are right."""

import itertools
import json
import statistics
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

pytest.importorskip("triton")

from homkv.bench import gpu, gpu_candidates, gpu_report, gpu_stats, plots
from homkv.bench.cpu import LARGE_MODEL, HeadShape
from homkv.bench.gpu_candidates import Case
from homkv.bench.gpu_clock import measure
from homkv.cli import app
from homkv.errors import FormatError, HomkvError, ShapeError, UnsupportedError

SHAPE = HeadShape(64, 4, 2)
CASE = Case(LARGE_MODEL, 8, 65536)
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="refusals of a machine without a GPU")


# -- arithmetic --------------------------------------------------------------------------------------------------


def test_a_line_through_exact_points_is_found_again() -> None:
    sizes = [1e8, 4e8, 8e8]
    fixed, rate = gpu_stats.fit_line(sizes, [5 + n / 4e12 * 1e6 for n in sizes])
    assert fixed == pytest.approx(5.0)
    assert rate == pytest.approx(4.0)
    assert gpu_stats.fit_line([1e8, 2e8], [2.0, 2.0])[1] == float("inf")
    with pytest.raises(ShapeError, match="sizes"):
        gpu_stats.fit_line([1e8, 1e8], [1.0, 2.0])


def test_the_fixed_cost_does_not_follow_noise_of_the_longest_context() -> None:
    sizes = [1e7, 1e8, 1e9]
    times = [6 + n / 4e12 * 1e6 for n in sizes]
    fixed, _ = gpu_stats.fit_line(sizes, [times[0], times[1], times[2] * 1.02])
    assert fixed == pytest.approx(6.0, abs=0.3)


def test_spread_is_half_the_quartile_distance() -> None:
    assert gpu_stats.spread([100.0]) == 0.0
    assert gpu_stats.spread([98.0, 99.0, 100.0, 101.0, 102.0]) == pytest.approx(0.015)


def test_samplers_take_turns_and_the_first_turn_is_not_counted() -> None:
    order = []

    def sampler(name: str):
        def sample() -> float:
            order.append(name)
            return float(len(order))

        return sample

    turns = []
    times = measure({"a": sampler("a"), "b": sampler("b")}, 2, lambda: turns.append(0))
    assert order == ["a", "b"] * 3
    assert times == {"a": [3.0, 5.0], "b": [4.0, 6.0]}
    assert len(turns) == 2


def test_rows_hold_ratios_taken_inside_a_round() -> None:
    """The second round is slow for everybody: ratios of medians would say something else."""
    times = {"fp16": [100.0, 300.0, 110.0], "sdpa cudnn": [90.0, 280.0, 120.0], "homkv small": [20.0, 50.0, 22.0]}
    rows = gpu_stats.decode_rows(CASE.fields, times, {"fp16": 1e9, "sdpa cudnn": 1e9, "homkv small": 1e8})
    fp16, cudnn, ours = rows
    assert ours["best_fp16"] == "fp16"
    assert ours["ratio_to_fp16"] == ours["ratios"]["fp16"] == statistics.median([5.0, 6.0, 5.0])
    assert fp16["ratio_to_fp16"] == 1.0
    assert cudnn["us"] == 120.0
    assert cudnn["tbps"] == pytest.approx(1e9 / 120e-6 / 1e12)
    assert set(ours) >= {"kind", "shape", "batch", "context", "candidate", "status", "us", "spread", "bytes", "rounds"}


def test_the_floor_is_the_fastest_read_of_the_run() -> None:
    rows = gpu_stats.decode_rows(
        CASE.fields, {"fp16": [250.0], "homkv small": [50.0]}, {"fp16": 1e9, "homkv small": 1e8}
    )
    rows += [{"kind": "stream", "candidate": "torch.sum", "tbps": 3.5}]
    gpu_stats.add_floors(rows)  # fp16 read 4 TB/s
    assert rows[1]["stream_tbps"] == pytest.approx(4.0)
    assert rows[1]["floor_us"] == pytest.approx(25.0)
    assert rows[1]["floor_fraction"] == pytest.approx(0.5)
    with pytest.raises(ShapeError, match="stream"):
        gpu_stats.fastest_stream([{"kind": "check"}])


def test_without_a_16_bit_peer_there_is_no_ratio() -> None:
    (row,) = gpu_stats.decode_rows(CASE.fields, {"homkv small": [50.0]}, {"homkv small": 1e8})
    assert row["ratio_to_fp16"] is None
    assert row["best_fp16"] is None


def test_a_plan_takes_the_mean_of_its_layers() -> None:
    times = {"fp16": [100.0, 120.0], "homkv a": [20.0, 24.0], "homkv b": [50.0, 60.0]}
    rows = gpu_stats.decode_rows(CASE.fields, times, {"fp16": 9e8, "homkv a": 1e8, "homkv b": 3e8})
    plans = {"homkv plan": ("homkv a", "homkv b", "homkv b"), "homkv other": ("homkv a", "homkv c")}
    (row,) = gpu_stats.plan_rows(rows, plans)  # c was not measured
    assert (row["candidate"], row["layers"], row["batch"]) == ("homkv plan", 3, CASE.batch)
    assert row["us"] == pytest.approx((22 + 55 + 55) / 3)
    assert row["bytes"] == pytest.approx(7e8 / 3)
    assert row["ratio_to_fp16"] == row["ratios"]["fp16"] == pytest.approx(100 / ((20 + 50 + 50) / 3))
    assert set(row["ratios"]) == {"fp16"}  # of no layer to itself


# -- what is measured --------------------------------------------------------------------------------------------


def test_candidates_count_the_bytes_that_they_must_read() -> None:
    everyone = [
        *gpu_candidates.our_formats(("small", "balanced")),
        *gpu_candidates.sixteen_bit_peers(),
        *gpu_candidates.compressed_peers(("small",)),
    ]
    tokens = CASE.batch * LARGE_MODEL.num_kv_heads * CASE.context
    per_token = {candidate.name: candidate.kv_bytes(CASE) / tokens for candidate in everyone}
    assert per_token["fp16"] == per_token["sdpa flash"] == per_token["sdpa cudnn"] == 512
    assert per_token["fp8"] == 256
    assert per_token["kivi"] == 96  # 64 of codes, 16 of K's scales and offsets, 16 of V's
    assert per_token["homkv small"] == per_token["dequant small"] == (1022 * 71 * 64 + 128 * 512) / 65536
    assert per_token["homkv balanced"] > per_token["homkv small"]
    assert set(per_token) >= {"hack", "hack-2026"}


def test_caches_of_a_graph_are_more_than_l2_holds() -> None:
    assert gpu_candidates.num_sets(10**9) == 1
    assert gpu_candidates.num_sets(300_000_000) == 2
    assert gpu_candidates.num_sets(10_000_000) == 40
    assert gpu_candidates.num_sets(1000) == gpu_candidates.MAX_SETS


def test_what_does_not_fit_is_skipped_with_a_reason_and_stores_are_shared() -> None:
    candidates = [*gpu_candidates.our_formats(("small",)), *gpu_candidates.sixteen_bit_peers(), gpu_candidates.Fp8()]
    room = sum(c.kv_bytes(CASE) * gpu_candidates.num_sets(c.kv_bytes(CASE)) for c in candidates[:2])
    kept, skipped = gpu.fitting(candidates, CASE, room + 1)
    assert [c.name for c in kept] == ["homkv small", "sdpa flash", "sdpa cudnn", "fp16"]
    assert [(row["candidate"], row["status"]) for row in skipped] == [("fp8", "skipped")]
    assert "GB" in skipped[0]["reason"]
    assert skipped[0]["context"] == 65536


def test_the_quick_selection_is_the_one_that_counts() -> None:
    quick, whole = gpu.make_options(quick=True), gpu.make_options(quick=False)
    sizes = {(case.batch, case.context) for case in quick.cases}
    assert sizes == {(1, 16384), (1, 131072), (8, 16384), (8, 65536), (8, 131072), (32, 65536), (32, 131072)}
    assert quick.full == {CASE}
    assert whole.full == set(whole.cases) > set(quick.cases)
    assert len({case.shape for case in whole.cases}) > 1
    named = gpu.make_options(quick=False, batches=[2], contexts=[1024], formats=["int8"], rounds=3)
    assert (named.cases, named.formats, named.rounds) == ((Case(LARGE_MODEL, 2, 1024),), ("int8",), 3)
    assert named.full == {Case(LARGE_MODEL, 2, 1024)}


@pytest.mark.parametrize("candidate", [gpu_candidates.OwnFp16(), gpu_candidates.Fp8(), gpu_candidates.Kivi()])
def test_candidates_are_checked_against_float64(
    candidate: gpu_candidates.Candidate, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_candidates, "CHECK_LENGTHS", (100, 33))
    row = gpu.check(candidate, SHAPE, device)
    assert row["status"] == "ok", row
    assert 0 < row["error"] < row["tolerance"]


def test_a_wrong_candidate_is_out_with_its_error(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(gpu_candidates.OwnFp16):
        def attend(self, q, kv, softmax_scale):  # forgets the scale
            return super().attend(q, kv, 1.0)

    monkeypatch.setattr(gpu_candidates, "CHECK_LENGTHS", (100, 33))
    row = gpu.check(Wrong(), SHAPE, device)
    assert row["status"] == "failed"
    assert "relative error" in row["reason"]


def test_a_candidate_that_raises_is_out_with_its_message(device: torch.device) -> None:
    class Broken(gpu_candidates.OwnFp16):
        def attend(self, q, kv, softmax_scale):
            raise UnsupportedError("expected sunshine, found rain\nsecond line")

    row = gpu.check(Broken(), SHAPE, device)
    assert row["status"] == "failed"
    assert row["reason"] == "UnsupportedError: expected sunshine, found rain"


def test_random_pages_lie_anywhere_and_are_numbers() -> None:
    codec = gpu_candidates.codec_for("small", 64)
    view = gpu_candidates.random_view(codec, Case(SHAPE, 3, 1000), torch.device("cpu"))
    pages = codec.num_pages(1000)
    assert view.page_table.shape == (3, pages)
    assert sorted(view.page_table.flatten().tolist()) == list(range(3 * pages))
    assert view.exact_len.tolist() == [codec.num_exact(1000)] * 3
    k, v = codec.dense(view.pool)
    assert torch.isfinite(k).all()
    assert torch.isfinite(v).all()


# -- records, tables, plots --------------------------------------------------------------------------------------


def synthetic_rows() -> list[dict]:
    """Two batches and three contexts of plausible times, and everything that goes with them."""
    rows: list[dict] = [{"kind": "stream", "candidate": "torch.sum", "bytes": 2**30, "us": 300.0, "tbps": 3.6}]
    for batch in (1, 8):
        for context in (16384, 65536, 131072):
            case = Case(LARGE_MODEL, batch, context)
            sizes = {"fp16": 512.0 * 8 * batch * context, "homkv small": 71.0 * 8 * batch * context}
            times = {name: [6 + n / 3.5e6, 7 + n / 3.5e6, 6.5 + n / 3.5e6] for name, n in sizes.items()}
            rows += gpu_stats.decode_rows(case.fields, times, sizes)
    rows.append(gpu.outcome(CASE, gpu_candidates.Fp8(), "skipped", "needs 9.0 GB, 1.0 GB are left"))
    gpu_stats.add_floors(rows)
    return rows + gpu_stats.fit_rows(rows)


def test_the_report_shows_every_candidate_within_80_columns(tmp_path: Path) -> None:
    console = Console(record=True, width=80, file=(tmp_path / "out.txt").open("w", encoding="utf-8"))
    rate = {"kind": "pack", "size": "131,072 x 8 heads", "candidate": "homkv k4220v2222", "status": "ok"}
    rows = [*synthetic_rows(), rate | {"us": 200.0, "spread": 0.01, "rate": 3.2}]
    gpu_report.print_report(rows, console)
    text = console.export_text()
    assert "homkv small" in text
    assert "skipped: fp8" in text
    assert "needs 9.0 GB" in text
    assert "3.20 TB/s" in text
    assert "…" not in text


def test_fits_need_two_contexts() -> None:
    fits = [row for row in synthetic_rows() if row["kind"] == "fit"]
    assert {(row["batch"], row["candidate"]) for row in fits} == {
        (batch, name) for batch in (1, 8) for name in ("fp16", "homkv small")
    }
    assert all(row["fixed_us"] == pytest.approx(6.5, abs=0.01) for row in fits)


def test_plots_come_from_stored_records(tmp_path: Path) -> None:
    file = tmp_path / "run.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in synthetic_rows()), encoding="utf-8")
    result = CliRunner().invoke(app, ["bench", "plot", str(file), "--out", str(tmp_path / "plots")])
    assert result.exit_code == 0, result.output
    names = sorted(path.name for path in (tmp_path / "plots").iterdir())
    assert names == [
        *("attention-floor-d128-32x8.png", "attention-floor-d128-32x8.svg"),
        *("attention-time-d128-32x8.png", "attention-time-d128-32x8.svg"),
    ]
    assert all((tmp_path / "plots" / name).stat().st_size > 5000 for name in names)


def test_a_candidate_keeps_its_colour() -> None:
    colours = plots.colours_of(["homkv small", "homkv balanced", "fp16", "fp8", "kivi"])
    assert len(set(colours.values())) == 5


@pytest.mark.parametrize("content", ["", "not json\n", '{"kind": "attention"}\n', "[1]\n"])
def test_files_without_measurements_are_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "run.jsonl"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(FormatError, match="expected"):
        plots.read_rows(file)
    with pytest.raises(FormatError, match="expected"):
        plots.read_rows(tmp_path / "absent.jsonl")


# -- refusals ----------------------------------------------------------------------------------------------------


@NO_GPU
def test_without_a_gpu_the_benchmark_says_so() -> None:
    with pytest.raises(UnsupportedError, match="CUDA"):
        gpu.run(gpu.make_options(quick=True), Console())


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["--device", "cuda"], marks=NO_GPU),
        ["--device", "tpu"],
        ["--device", "cpu", "--quick"],
        ["--device", "cpu", "--plots", "x"],
        pytest.param(["--quick"], marks=NO_GPU),
    ],
)
def test_options_that_do_not_apply_are_refused(arguments: list[str]) -> None:
    result = CliRunner().invoke(app, ["bench", "attention", *arguments])
    assert isinstance(result.exception, HomkvError)
    assert "expected" in str(result.exception)


def test_what_fails_in_company_is_checked_again_alone(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Order is kept, and a candidate that passes the second time is in."""
    calls: dict[str, int] = {}

    class Moody(gpu_candidates.OwnFp16):
        def __init__(self, name: str, failures: int) -> None:
            self.name, self.failures = name, failures

        def error(self, shape, device):
            calls[self.name] = calls.get(self.name, 0) + 1
            if calls[self.name] <= self.failures:
                raise UnsupportedError("expected silence, found a crowd")
            return 0.001

    rows = gpu.check_all([Moody("good", 0), Moody("shy", 1), Moody("bad", 9)], SHAPE, device)
    assert [(row["candidate"], row["status"]) for row in rows] == [("good", "ok"), ("shy", "ok"), ("bad", "failed")]
    assert calls == {"good": 1, "shy": 2, "bad": 2}


class InstantReplay:
    """Runs the calls once and makes times up that get shorter and shorter."""

    clock = itertools.count()

    def __init__(self, calls, sample_ms: float = 1.0) -> None:
        for call in calls:
            call()

    def __call__(self) -> float:
        return float(1000 - next(self.clock))


@pytest.mark.skipif(torch.cuda.is_available(), reason="pretends that there is a GPU")
def test_a_whole_run_on_a_pretended_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step but the timing, in the interpreter: checks, caches, calls, rows, table, record and plots."""
    monkeypatch.setattr(gpu, "require_cuda", lambda: torch.device("cpu"))
    monkeypatch.setattr(gpu, "Replay", InstantReplay)
    monkeypatch.setattr(gpu, "STREAM_BYTES", (4096,))
    monkeypatch.setattr(gpu, "machine", lambda device: {"gpu": "none"})
    monkeypatch.setattr(gpu, "COMPILE_THREADS", 1)
    without_hack = gpu_candidates.compressed_peers(("small",))[:3]  # whose kernels have their own tests
    monkeypatch.setattr(gpu, "compressed_peers", lambda formats: without_hack)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (2**33, 2**33))
    monkeypatch.setattr(gpu_candidates, "CHECK_LENGTHS", (150, 70))
    monkeypatch.setattr(gpu_candidates, "MIN_SET_BYTES", 1)
    cases = (Case(SHAPE, 2, 200), Case(SHAPE, 2, 150))
    options = gpu.GpuBenchOptions(
        cases, frozenset(cases[:1]), ("small",), 3, False, tmp_path / "run.jsonl", tmp_path / "plots"
    )
    console = Console(record=True, width=100, file=(tmp_path / "out.txt").open("w", encoding="utf-8"))
    rows = gpu.run(options, console)
    assert [json.loads(line) for line in options.record.read_text(encoding="utf-8").splitlines()] == rows
    measured = {(row["context"], row["candidate"]) for row in rows if row["kind"] == "decode"}
    assert measured >= {(200, name) for name in ("homkv small", "fp16", "sdpa flash", "fp8", "dequant small", "kivi")}
    assert {name for context, name in measured if context == 150} == {"homkv small", "fp16", "sdpa flash"}
    failed = {row["candidate"]: row["reason"] for row in rows if row["kind"] == "check" and row["status"] == "failed"}
    assert "cudnn" in failed["sdpa cudnn"]
    assert {row["candidate"] for row in rows if row["kind"] == "fit"} >= {"sdpa flash", "fp16"}
    assert all(row["floor_fraction"] > 0 for row in rows if row["kind"] == "decode")
    assert len(list((tmp_path / "plots").iterdir())) == 4
    assert "failed: sdpa cudnn" in console.export_text()
