"""`homkv bench jct --real` on a tiny model: every request once per format, times that add up, a record that reads."""

import itertools
import sys
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from homkv.bench.jct.markdown import markdown
from homkv.bench.jct.plots import plot
from homkv.bench.jct.replay import Prompt, cut_prompts
from homkv.bench.jct.report import print_report
from homkv.bench.jct.run import ABLATIONS, JctBench, JctOptions, step_lengths, trace_requests, uniform_requests
from homkv.bench.jct.steps import overlapping
from homkv.bench.jct.summary import Summary, rate_at_p99, rates_at_p99, ratio_interval, summarize, tails
from homkv.cli import main
from homkv.cli.bench_jct import parse_range
from homkv.errors import FormatError, ShapeError, TraceError, TransferError
from homkv.serve.messages import PrefillTimes
from homkv.sim.fitted import fit
from homkv.sim.record import PHASES, RequestRecord, Run, RunInfo
from homkv.sim.trace import Request, write_trace

FORMATS = ("fp16", "balanced", "cachegen", "kivi", "hack:se=0")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model on disk; its tokenizer knows no word of the essays, so that each is the same token."""
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=64, max_position_embeddings=2048, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    words = Tokenizer(WordLevel({"w0": 0}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(path)
    return path


def test_every_format_gets_the_same_requests(folder: Path, tmp_path: Path) -> None:
    requests = uniform_requests(3, (280, 320), (2, 4), 20.0, seed=0)
    record = tmp_path / "jct.jsonl"
    options = JctOptions(tuple(requests), record, model=str(folder), formats=FORMATS, links=(1.0,), repetitions=1)
    bench = JctBench(options, Console(quiet=True))
    runs = bench.run()
    assert bench.skipped == []
    assert [run.info.kv_cache_dtype for run in runs] == list(FORMATS)
    for run in runs:
        assert run.info.num_layers == 2
        assert {(r.prompt_tokens, r.output_tokens) for r in run.requests} == {
            (r.prompt_tokens, r.output_tokens) for r in requests
        }
        assert {step.stage for step in run.steps} >= {"prefill", "pack", "unpack", "handoff", "decode"}
        for r in run.requests:
            assert sum(getattr(r, phase) for phase in PHASES) == pytest.approx(r.jct_s, abs=1e-6)
            assert r.ttft_s <= r.jct_s
        assert 0 < (run.info.peak_kv_bytes or 0) <= sum(r.kv_bytes for r in run.requests)
    exact, ours, cachegen, *_ = (sum(r.wire_bytes for r in run.requests) for run in runs)
    assert ours < exact
    assert cachegen < exact
    check_overhead(runs)
    check_report(runs, tmp_path)


def check_overhead(runs: list) -> None:
    """16 bits, and what is restored on arrival, have none; ours does not tell it apart; others pay while decoding."""
    overhead = {run.info.kv_cache_dtype: [r.dequantize_s for r in run.requests] for run in runs}
    assert overhead["fp16"] == overhead["cachegen"] == [0.0] * 3
    assert overhead["balanced"] == [None] * 3
    for name in ("kivi", "hack:se=0"):
        for run in runs:
            if run.info.kv_cache_dtype == name:
                assert all(0 < r.dequantize_s < r.decode_s for r in run.requests)


def check_report(runs: list, tmp_path: Path) -> None:
    summaries = summarize(runs)
    console = Console(width=140, record=True, quiet=True)
    print_report(summaries, console)
    for file in plot(summaries, tmp_path, "jct", "test"):
        assert file.stat().st_size > 1000
    assert summaries[0].mean("jct_s") == pytest.approx(sum(summaries[0].shares().values()), abs=1e-6)
    assert summaries[0].throughput_rps > 0
    header, _, *rows = markdown(summaries, runs, fit)
    assert len(rows) == len(runs)
    assert {row.count("|") for row in rows} == {header.count("|")}
    assert rows[1].split(" | ")[1] == "balanced"
    assert rows[0].split(" | ")[10:12] == ["1.00", ""]  # x 16 bits, x fp8, which did not run
    assert rows[0].endswith(" %) |")


def test_time_that_is_used_up_leaves_runs_out(folder: Path, tmp_path: Path) -> None:
    requests = tuple(uniform_requests(2, (80, 90), (2, 3), 20.0, seed=0))
    options = JctOptions(
        requests, tmp_path / "r.jsonl", model=str(folder), formats=("fp16",), links=(1.0,), repetitions=1, budget_s=1e-3
    )
    bench = JctBench(options, Console(quiet=True))
    assert bench.run() == []
    assert bench.skipped == ["1gbps/fp16/0: the time was used up"]


def test_prompts_are_cut_one_behind_the_other() -> None:
    requests = [Request("a", 0.0, 3, 2), Request("b", 1.0, 2, 2)]
    assert cut_prompts(range(9), requests) == [Prompt([0, 1, 2], [3, 4]), Prompt([5, 6], [7, 8])]
    with pytest.raises(TransferError, match="at least 9 tokens, found 8"):
        cut_prompts(range(8), requests)


def test_traces_are_scaled(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl.gz"
    write_trace([Request(str(i), float(i), 1000 + i, 10) for i in range(5)], trace)
    found = trace_requests(trace, 3, 2.0, 0.1, seed=0)
    assert [(r.prompt_tokens, r.output_tokens) for r in found] == [(100, 2)] * 3
    assert all(b.arrival_s > a.arrival_s for a, b in itertools.pairwise(found))
    longer = trace_requests(trace, 3, 2.0, 0.1, seed=0, answers=1.5)
    assert [(r.prompt_tokens, r.output_tokens) for r in longer] == [(100, 15)] * 3
    with pytest.raises(TraceError):
        trace_requests(tmp_path / "missing.jsonl", 3, 2.0, 0.1, seed=0)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"links": (0.0,)}, ShapeError),
        ({"links": (float("inf"),)}, ShapeError),
        ({"formats": ()}, ShapeError),
        ({"formats": ("nonsense",)}, FormatError),
        ({"repetitions": 0}, ShapeError),
        ({"budget_s": -1.0}, ShapeError),
        ({"requests": ()}, ShapeError),
    ],
)
def test_what_cannot_be_replayed_is_refused(change: dict, error: type[Exception]) -> None:
    usual = {"requests": (Request("a", 0.0, 3, 2),), "record": Path("unused")}
    with pytest.raises(error):
        JctOptions(**{**usual, **change})


@pytest.mark.parametrize("bad", [(0, (1, 2), (2, 3)), (1, (0, 2), (2, 3)), (1, (3, 2), (2, 3)), (1, (1, 2), (1, 3))])
def test_lengths_that_make_no_sense_are_refused(bad: tuple) -> None:
    with pytest.raises(ShapeError):
        uniform_requests(*bad, requests_per_s=1.0, seed=0)
    with pytest.raises(TraceError):
        uniform_requests(1, (1, 2), (2, 3), float("nan"), seed=0)


def test_ranges() -> None:
    assert parse_range("3-5") == (3, 5)
    assert parse_range("7") == (7, 7)
    for text in ("", "a-b", "3-x", "-3"):
        with pytest.raises(ShapeError, match="expected a range"):
            parse_range(text)


def test_the_command_says_what_it_needs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["homkv", "bench", "jct"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    assert "expected --real" in capsys.readouterr().err


def run_of(name: str, turn: int, times: list[float]) -> Run:
    info = RunInfo(run_id=f"{name}/{turn}", source="replay", model="m", kv_cache_dtype=name, command="", machine="")
    zero = dict.fromkeys([*PHASES, "arrival_s", "ttft_s", "tpot_s"], 0.0)
    counts = dict.fromkeys(["prompt_tokens", "output_tokens", "wire_bytes", "kv_bytes"], 1)
    requests = [
        RequestRecord(run_id=info.run_id, request_id=str(i), jct_s=jct_s, **zero, **counts)
        for i, jct_s in enumerate(times)
    ]
    return Run(info, tuple(requests))


def test_intervals_are_of_pairs() -> None:
    """Half of everything is half whichever requests are drawn; unequal gains leave a range around the mean."""
    base = Summary("c", "fp16", tuple(run_of("fp16", turn, [1.0, 5.0, 2.0]) for turn in range(2)))
    half = Summary("c", "a", tuple(run_of("a", turn, [0.5, 2.5, 1.0]) for turn in range(2)))
    assert ratio_interval(half, base) == pytest.approx((0.5, 0.5))
    mixed = Summary("c", "b", (run_of("b", 0, [1.0, 2.5, 1.0]),))
    low, high = ratio_interval(mixed, base) or (0.0, 0.0)
    assert 0.5 <= low < 4.5 / 8 < high <= 1.0
    assert ratio_interval(Summary("c", "b", (run_of("b", 0, [1.0, 2.0]),)), base) is None


def test_steps_are_timed_at_the_ends_and_between_them_where_they_are_far_apart() -> None:
    assert step_lengths([516, 632, 581]) == (516, 632)
    assert step_lengths([100, 700, 300]) == (100, 400, 700)
    assert step_lengths([300]) == (300,)


def test_steps_beside_a_prompt_are_told_apart() -> None:
    """Steps of 1/8 s, of 1/2 s from 1 to 3 s on, while a prompt of 500 tokens was computed."""
    moments = [i / 8 for i in range(9)] + [1.5, 2.0, 2.5, 3.0] + [3 + i / 8 for i in range(1, 9)]
    times = PrefillTimes(0.0, 1.0, 3.0, 3.0, 3.0, 0.0, 0.0, 0.0)
    decode, prefill = overlapping(moments, 100, times, 500, 4)
    assert (decode.stage, decode.tokens, decode.seconds) == ("decode", 110, 0.5)
    assert (prefill.stage, prefill.tokens, prefill.seconds) == ("prefill", 500, 2.0)
    assert decode.beside
    assert prefill.beside
    assert overlapping(moments, 100, times, 500, 5) == []
    assert overlapping(moments[:12], 100, times, 500, 2) == []  # it had ended before the prompt


def test_rates_at_equal_p99() -> None:
    points = [(1.0, 2.0), (2.0, 4.0), (3.0, 10.0)]
    middle = rate_at_p99(points, 3.0, "x")
    assert middle is not None
    assert (middle.rate_rps, middle.is_bound) == (1.5, False)
    bound = rate_at_p99(points, 11.0, "x")
    assert bound is not None
    assert (bound.rate_rps, bound.is_bound) == (3.0, True)
    assert rate_at_p99(points, 1.0, "x") is None
    assert rate_at_p99([], 1.0, "x") is None


def test_rates_are_compared_at_the_baselines_tail() -> None:
    """bf16's P99 at load 0.8 is 3 s; the other reaches it halfway between its two rates."""

    def at(name: str, load: str, rate_rps: str, jct_s: float) -> Summary:
        run = run_of(name, 0, [jct_s])
        options = {"load": load, "rate_rps": rate_rps}
        case = f"long, 25 Gb/s, {rate_rps} req/s (load {load})"
        return Summary(case, name, (Run(msgspec.structs.replace(run.info, options=options), run.requests),))

    found = rates_at_p99(
        tails(
            [
                at("bf16", "0.8", "1", 3.0),
                at("bf16", "1.6", "2", 9.0),
                at("fp8", "0.8", "1", 2.0),
                at("fp8", "1.6", "2", 4.0),
            ]
        ),
        "0.8",
    )
    assert [(place, rate.name, rate.rate_rps) for place, rate in found] == [
        ("long, 25 Gb/s", "bf16", 1.0),
        ("long, 25 Gb/s", "fp8", 1.5),
    ]


def test_the_command_line_becomes_options(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[JctOptions] = []
    monkeypatch.setattr("homkv.cli.bench_jct.show", lambda options, plots, console: seen.append(options))
    monkeypatch.setattr(
        sys, "argv", ["homkv", "bench", "jct", "--real", "--ablations", "--requests", "3", "--rate", "2", "--no-steps"]
    )
    with pytest.raises(SystemExit):
        main()
    requests = tuple(uniform_requests(3, (256, 768), (16, 48), 2.0, seed=0))
    usual = JctOptions(requests, Path("runs/jct.jsonl"), steps=False)
    assert seen == [replace(usual, formats=usual.formats + ABLATIONS)]


def test_records_are_reported(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(__file__).parent.parent.parent / "benchmarks" / "results"
    monkeypatch.setattr(sys, "argv", ["homkv", "bench", "report", str(folder / "pd-h100x2.jsonl")])
    monkeypatch.setenv("COLUMNS", "140")
    with pytest.raises(SystemExit):
        main()
    lines = capsys.readouterr().out.splitlines()
    at_10 = next(i for i, line in enumerate(lines) if "10 Gb/s" in line)
    small = next(line for line in lines[at_10:] if line.strip().startswith("small"))
    assert small.split()[1:4] == ["3.18", "3.33", "4.14"]
    assert small.split()[-2:] == ["0.61", "0.88"]


@pytest.mark.parametrize(("gpu", "code"), [("h100", 0), ("abacus", 2)])
def test_records_become_a_table_for_a_page(
    gpu: str, code: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    record = Path(__file__).parent.parent.parent / "benchmarks" / "results" / "pd-h100x2.jsonl"
    monkeypatch.setattr(sys, "argv", ["homkv", "bench", "report", str(record), "--markdown", "--simulate", gpu])
    with pytest.raises(SystemExit) as caught:
        main()
    assert (caught.value.code or 0) == code
    said = capsys.readouterr()
    if code:
        assert "expected a GPU out of" in said.err
    else:
        assert any(
            line.startswith("|  | bf16 | 1888 | 5.21 |") and "(+1.3 %)" in line for line in said.out.splitlines()
        )


def test_rivals_on_one_gpu_are_reported_and_predicted(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    record = Path(__file__).parent.parent.parent / "benchmarks" / "results" / "pd-one-gpu-rivals.jsonl"
    monkeypatch.setattr(sys, "argv", ["homkv", "bench", "report", str(record), "--markdown", "--simulate", "h200"])
    with pytest.raises(SystemExit):
        main()
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("|  | balanced | 309 |") for line in lines) == 3
    assert any(line.startswith("|  | kivi | 378 | 5.27 |") and "(-4.3 %)" in line for line in lines)
    assert any(line.startswith("|  | hack:prefill=int8 | 321 | 4.84 |") and "(-1.2 %)" in line for line in lines)
