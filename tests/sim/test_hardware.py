"""The tables say what their sources say, and the model that uses them scales as it must."""

import json
from pathlib import Path

import pytest

from homkv.errors import UnsupportedError
from homkv.sim.capacity import capacity
from homkv.sim.formats import make_format
from homkv.sim.hardware import data, find_gpu, find_model, gpus, kernel, models
from homkv.sim.roofline import Layout, RooflineCosts, capacity_bytes, smallest_layout
from homkv.sim.scenario import Scenario

ROOT = Path(__file__).parents[2]
OWN = {"small": "homkv small", "balanced": "homkv balanced", "dequant-small": "dequant small", "fp8": "fp8",
       "dequant-balanced": "dequant balanced", "kivi": "kivi", "hack": "hack", "hack-2026": "hack-2026"}  # fmt: skip


def test_gpu_rows_are_the_stored_measurements() -> None:
    checked = 0
    for row in data("kernels.json")["rows"]:
        if row["gpu"] not in ("h100", "h200") or row["kernel"].startswith("authors"):
            continue
        lines = [json.loads(line) for line in (ROOT / row["source"]).read_text().splitlines()]
        same = [
            r for r in lines if r["kind"] == "decode" and (r["batch"], r["context"]) == (row["batch"], row["context"])
        ]
        names = ("fp16", "sdpa flash", "sdpa cudnn") if row["kernel"] == "fp16" else (OWN[row["kernel"]],)
        found = min((r for r in same if r["candidate"] in names), key=lambda r: r["us"])
        assert row["us"] == pytest.approx(found["us"], abs=0.01)
        assert row["bytes"] == found["bytes"]
        checked += 1
    assert checked > 40


@pytest.mark.parametrize("gpu", ["h100", "h200"])
def test_fits_reproduce_what_was_measured(gpu: str) -> None:
    for row in data("kernels.json")["rows"]:
        if row["gpu"] == gpu and row["context"] >= 16_384:
            fitted = kernel(gpu, row["kernel"])
            us = fitted.fixed_us + row["bytes"] / fitted.bytes_per_s * 1e6
            assert us == pytest.approx(row["us"], rel=0.09)


def test_decode_steps_reproduce_the_8b_model() -> None:
    """Whole steps of homkv bench generate, which the tables were not fitted to but for one overhead per layer."""
    for gpu, record in (("h100", "generate-h100"), ("h200", "generate-h200-32-layers")):
        for line in (ROOT / f"benchmarks/results/{record}.jsonl").read_text().splitlines():
            row = json.loads(line)
            if row["kind"] != "generate":
                continue
            name = {"bf16": "fp16"}.get(row["format"], row["format"])
            costs = RooflineCosts(find_model("llama-3.1-8b"), make_format(name, 128), find_gpu(gpu), find_gpu(gpu))
            step = costs.step_s(row["batch"]) + costs.per_token_s * row["batch"] * row["context"]
            assert 1e3 * step == pytest.approx(row["step_ms"], rel=0.08), (gpu, name)


def test_every_number_has_a_source() -> None:
    known = set(data("gpus.json")["sources"])
    for gpu in gpus().values():
        assert set(gpu.source.values()) <= known
        assert "rest" in gpu.source
    assert all(row["source"] for row in data("kernels.json")["rows"])
    assert all(row["source"] for row in data("profiles.json")["profiles"].values())


def test_names() -> None:
    assert find_model("llama-70b").name == "llama-3.1-70b"
    assert find_gpu("H100").name == "h100"
    for call in (lambda: find_gpu("b200"), lambda: find_model("llama"), lambda: kernel("zen4-core", "kivi")):
        with pytest.raises(UnsupportedError, match="found"):
            call()
    assert {"mistral-7b", "phi-3-14b", "yi-34b", "llama-3.1-70b", "falcon-180b", "llama-3.1-8b"} <= set(models())


@pytest.mark.parametrize("gpu", ["a10g", "v100", "t4", "l4", "a100", "h100", "h200"])
@pytest.mark.parametrize("model", ["mistral-7b", "phi-3-14b", "yi-34b", "llama-3.1-70b", "falcon-180b"])
def test_every_pair_of_the_paper_has_costs(gpu: str, model: str) -> None:
    shape, machine = find_model(model), find_gpu(gpu)
    layout = smallest_layout(shape, machine, pipeline=True)
    costs = RooflineCosts(shape, make_format("balanced", shape.head_dim), machine, find_gpu("a100"), layout, Layout(8))
    exact = RooflineCosts(shape, make_format("fp16", shape.head_dim), machine, find_gpu("a100"), layout, Layout(8))
    assert capacity_bytes(shape, machine, layout) > 0
    assert 0 < exact.prefill_s(4000, 0) < exact.prefill_s(8000, 0) < 1000
    assert exact.prefill_s(8000, 4000) < exact.prefill_s(8000, 0)
    assert costs.per_token_s < exact.per_token_s / 3
    assert costs.wire_bytes(8000) < exact.wire_bytes(8000) / 5
    assert costs.dequantize_per_token_s < costs.per_token_s


def test_more_gpus_are_faster_and_hold_more() -> None:
    shape, gpu, kv = find_model("llama-70b"), find_gpu("a100"), make_format("fp16", 128)
    four, eight = (RooflineCosts(shape, kv, gpu, gpu, Layout(n), Layout(n)) for n in (4, 8))
    assert eight.prefill_s(8000, 0) < four.prefill_s(8000, 0)
    assert eight.per_token_s == pytest.approx(four.per_token_s / 2)
    assert capacity_bytes(shape, gpu, Layout(8)) > 2 * capacity_bytes(shape, gpu, Layout(4))
    with pytest.raises(UnsupportedError, match="141 GB of weights"):
        capacity_bytes(shape, gpu, Layout(1))


def test_capacity_is_where_the_simulated_queue_starts_to_grow() -> None:
    from homkv.sim.engine import simulate
    from homkv.sim.trace import Request, poisson_arrivals

    system = Scenario("llama-3.1-8b", "h100", "h100", "fp16", num_prefill=2, link_gbps=10).system()
    limit = capacity(system, 8000, 200)
    assert limit.rate == min(limit.prefill, limit.link, limit.decode)
    assert limit.bottleneck == "link"
    work = [Request(str(i), 0.0, 8000, 200) for i in range(3000)]
    calm, flooded = (
        simulate(system, poisson_arrivals(work, load * limit.rate, 1)).tally.column("jct_s") for load in (0.8, 1.2)
    )
    assert calm[-500:].mean() < 3 * calm[:100].mean()
    assert flooded[-500:].mean() > 10 * flooded[:100].mean()
