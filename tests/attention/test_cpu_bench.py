"""The benchmark compares like with like and reports what it ran."""

import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from homkv.attention import cpu
from homkv.bench import cpu as bench
from homkv.bench.cpu import CpuBenchOptions, HeadShape

pytestmark = pytest.mark.skipif(not cpu.is_available(), reason="native kernel not built")

SHAPE = HeadShape(64, 6, 2)


def test_a_run_prints_and_records_every_row(tmp_path: Path) -> None:
    record = tmp_path / "runs" / "attention.jsonl"
    options = CpuBenchOptions((SHAPE,), (2,), (256,), ("balanced",), repetitions=2, seconds=0.0, record=record)
    console = Console(record=True, width=200, file=(tmp_path / "out.txt").open("w", encoding="utf-8"))
    rows = bench.run(options, console)
    assert [json.loads(line) for line in record.read_text(encoding="utf-8").splitlines()] == rows
    attention, packs = rows[0], rows[1:]
    assert attention["best_ratio"] == min(attention["ratios"].values()) > 0
    assert set(attention["ratios"]) == {"sdpa bf16", "sdpa fp32", "matmul bf16", "matmul fp32"}
    assert [row["tokens"] for row in packs] == [64, 2048]
    assert all(row["best_ratio"] > 0 and row["isa"] == cpu.best_isa() for row in rows)
    assert "balanced" in console.export_text()


def test_peers_compute_the_same_attention() -> None:
    torch.manual_seed(1)
    candidates = bench.peers(torch.randn(2, 6, 1, 64), SHAPE, 100, torch.float32, "fp32", 0.125)
    sdpa, matmul = (candidates[name]() for name in ("sdpa fp32", "matmul fp32"))
    assert isinstance(sdpa, torch.Tensor)
    assert isinstance(matmul, torch.Tensor)
    torch.testing.assert_close(sdpa.reshape(-1), matmul.reshape(-1))


def test_memory_limits_the_batch_and_the_table_says_so() -> None:
    each = 2 * SHAPE.num_kv_heads * 256 * 64 * 4
    assert bench.peer_batch(SHAPE, 8, 256, torch.float32, 3.5 * each / bench.GIB) == 3
    assert bench.peer_batch(SHAPE, 2, 256, torch.float32, 3.5 * each / bench.GIB) == 2
    with pytest.raises(bench.UnsupportedError, match="max-gib"):
        bench.peer_batch(SHAPE, 1, 256, torch.float32, 0.5 * each / bench.GIB)
    assert bench.at_batch("1.0", {"batch": 3}, {"batch": 8}) == "1.0 (batch 3)"
    assert bench.at_batch("1.0", {"batch": 8}, {"batch": 8}) == "1.0"


def test_threads_are_put_back() -> None:
    before = torch.get_num_threads()
    with bench.one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


def test_a_ratio_is_taken_inside_a_repetition() -> None:
    assert bench.paired_ratio([2.0, 40.0, 6.0], [1.0, 10.0, 2.0]) == 3.0
