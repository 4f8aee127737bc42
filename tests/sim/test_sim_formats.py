"""Bytes of formats are those of the code that stores them; names that mean nothing are refused."""

import json
from pathlib import Path

import pytest

from homkv.errors import FormatError, UnsupportedError
from homkv.formats import make_codec
from homkv.sim.formats import NAMES, make_format
from homkv.sim.hardware import find_gpu, find_model
from homkv.sim.roofline import HACK_FLASH, RooflineCosts
from homkv.spec import PRESETS

STORED = [
    *PRESETS,
    "k0220v2222",
    *(f"{base}:pi={pi},se={se}" for base in ("hack", "hack-2026") for pi in (32, 64, 128) for se in (0, 1)),
    "fp16",
]


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", STORED)
def test_bytes_are_the_codecs(name: str, head_dim: int) -> None:
    codec, model = make_codec(name, head_dim), make_format(name, head_dim)
    for tokens in (1, 63, 68, 131, 1000, 12_345):
        assert model.stored_bytes(tokens) == codec.kv_bytes(tokens)


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_smaller_than_16_bits_but_16_bits(name: str) -> None:
    kv = make_format(name, 128)
    ratio = kv.stored_bytes(16_384) * kv.wire_ratio / (512 * 16_384)
    assert ratio == 1 if name == "fp16" else 0.13 < ratio < 0.53


@pytest.mark.parametrize(
    "name",
    [
        "",
        "k4",
        "balanced:pi=64",
        "hack:pi=7",
        "hack:colour=1",
        "hack:prefill=7",
        "hack-2026:rqe=0",
        "dequant-hack",
        "k9999v2222",
    ],
)
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(FormatError):
        make_format(name, 128)


def test_head_dims_that_pages_do_not_cover_are_refused() -> None:
    with pytest.raises(UnsupportedError):
        make_format("balanced", 100)


def test_hack_computes_prompts_as_published_unless_it_says_exact() -> None:
    found = {name: make_format(name, 128).prefill for name in ("hack", "hack:prefill=int8", "hack:prefill=exact")}
    assert found == {"hack": "faster", "hack:prefill=int8": "int8", "hack:prefill=exact": "exact"}


def test_only_hack_that_says_int8_computes_prompts_on_codes_where_that_is_slower() -> None:
    shape = find_model("llama-3.1-8b")
    exact, hack, on_codes = (
        {gpu: RooflineCosts(shape, make_format(name, 128), find_gpu(gpu), find_gpu(gpu)) for gpu in ("h200", "a100")}
        for name in ("hack:prefill=exact", "hack", "hack:prefill=int8")
    )
    seconds = [costs["h200"].prefill_s(16_384, 0) for costs in (exact, hack, on_codes)]
    assert seconds[0] == seconds[1] < 0.7 * seconds[2]
    seconds = [costs["a100"].prefill_s(16_384, 0) for costs in (exact, hack, on_codes)]
    assert seconds[0] > seconds[1] == seconds[2]


def test_hacks_prefill_rate_is_the_stored_measurement() -> None:
    record = Path(__file__).parents[2] / "benchmarks" / "results" / "attention-h100-two-launches.jsonl"
    rows = [json.loads(line) for line in record.read_text().splitlines()]
    (found,) = [r for r in rows if (r["kind"], r.get("candidate"), r.get("size")) == ("prefill", "hack", "16,384")]
    assert found["rate"] / find_gpu("h100").tflops == pytest.approx(HACK_FLASH, rel=0.01)
