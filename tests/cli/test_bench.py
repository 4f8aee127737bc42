"""`homkv bench` hands its options on to the benchmark of the chosen device, and to no other."""

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from homkv.bench import cpu, gpu
from homkv.bench.cpu import LARGE_MODEL
from homkv.bench.gpu_candidates import Case
from homkv.cli import app, bench
from homkv.errors import ShapeError
from homkv.plan import LayerPlan
from homkv.spec import DEFAULT_FORMAT


@pytest.fixture
def received(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the benchmarks were called with."""
    calls: dict[str, Any] = {}
    monkeypatch.setattr(cpu, "run", lambda options, console: calls.update(cpu=options))
    monkeypatch.setattr(gpu, "run", lambda options, console: calls.update(gpu=options))
    return calls


def invoke(*arguments: str) -> None:
    result = CliRunner().invoke(app, ["bench", "attention", *arguments])
    assert result.exit_code == 0, result.output


def test_the_cpu_benchmark_gets_its_options(received: dict[str, Any]) -> None:
    invoke("--device", "cpu", "--batch", "2", "--context", "64", "--context", "128", "--no-pack", "--isa", "portable")
    options = received["cpu"]
    assert (options.batches, options.contexts, options.formats) == ((2,), (64, 128), (DEFAULT_FORMAT,))
    assert (options.isa, options.pack, options.repetitions, options.max_gib) == ("portable", False, 5, 10.0)
    assert "gpu" not in received


@pytest.mark.parametrize("size", ["--batch", "--context"])
def test_sizes_of_nothing_are_refused(size: str) -> None:
    result = CliRunner().invoke(app, ["bench", "attention", size, "0"])
    assert isinstance(result.exception, ShapeError)
    assert size in str(result.exception)


def test_the_gpu_benchmark_gets_its_options(received: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "choose_device", lambda device: "cuda")
    invoke(
        "--batch", "2", "--context", "4096", "--kv-cache-dtype", "small", "--rounds", "5", "--json", "x", "--plots", "y"
    )
    options = received["gpu"]
    assert options.cases == (Case(LARGE_MODEL, 2, 4096),)
    assert (options.formats, options.rounds, options.rates) == (("small",), 5, True)
    assert (options.record, options.plots) == (Path("x"), Path("y"))
    invoke("--quick", "--no-pack")
    assert received["gpu"].cases == gpu.make_options(quick=True).cases
    assert received["gpu"].rates is False


def test_the_layers_of_a_plan_are_measured_once(
    received: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(bench, "choose_device", lambda device: "cuda")
    layers = ("k4420v2222w192", "k2200v2222w192", "k4420v2222w192")
    LayerPlan("0" * 32, layers, "mine").save(tmp_path / "plan.json")
    invoke("--kv-cache-dtype", "small", "--kv-cache-dtype", str(tmp_path / "plan.json"), "--no-peers")
    options = received["gpu"]
    assert options.formats == ("small", "k4420v2222w192", "k2200v2222w192")
    assert options.plans == {"homkv plan mine": layers}
    assert options.full == frozenset()


def test_auto_takes_a_gpu_if_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    for there, chosen in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert bench.choose_device("auto") == chosen
        assert bench.choose_device("cpu") == "cpu"


def test_help_says_what_a_plan_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    result = CliRunner().invoke(app, ["bench", "pd", "--help"])
    assert "TOML file of [[leg]]s" in result.output
