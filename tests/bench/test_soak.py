"""Growth of what a service holds: found where it is, and not where it is not."""

import json
import random
from dataclasses import asdict
from pathlib import Path

import pytest

from homkv.bench.soak import MIN_SAMPLES, Sample, draw, growth, held, left_behind, read_samples, save
from homkv.errors import FormatError

MEMORY, FILES = "decode@a:1 resident_memory_bytes", "gateway open_fds"


def run(per_hour: float, *, noise: float = 0.0, warm: float = 0.0, count: int = 180, seed: int = 0) -> list[Sample]:
    """Half an hour of 1e9 bytes that grow, with correlated noise, and ``warm`` more of them over the first half."""
    draw_number, out, wander = random.Random(seed), [], 0.0
    for i in range(count + 1):
        at_s = 1800 * i / count
        wander = 0.8 * wander + draw_number.gauss(0, noise)
        value = 1e9 + per_hour * at_s / 3600 + warm * min(2 * i / count, 1.0) + wander
        out.append(Sample(at_s, {MEMORY: value, FILES: 30.0, "gateway requests_accepted": float(i % 7)}))
    return out


def test_a_slope_is_found_and_named() -> None:
    memory, files = growth(run(100e6, noise=1e6))
    assert memory.name == MEMORY
    assert memory.low < 100e6 < memory.high
    assert memory.per_hour == pytest.approx(100e6, rel=0.2)
    assert memory.change == pytest.approx(25e6, rel=0.2)
    assert memory.grows
    assert not files.grows
    assert (files.per_hour, files.change) == pytest.approx((0.0, 0.0), abs=1e-6)


def test_what_fills_in_the_first_half_does_not_grow() -> None:
    assert not growth(run(0.0, noise=1e6, warm=300e6))[0].grows
    assert not growth(run(-100e6, noise=1e6))[0].grows
    assert not growth(run(1e6))[0].grows  # certain, and nothing to speak of


def test_noise_is_seldom_taken_for_growth() -> None:
    """Samples that wander: most intervals hold the true slope, 0."""
    fits = [growth(run(0.0, noise=1e6, seed=seed))[0] for seed in range(60)]
    assert sum(fit.low <= 0 <= fit.high for fit in fits) >= 51
    assert not any(fit.grows for fit in fits)


def test_open_files_are_judged_at_equal_load() -> None:
    """A busier second half opens more files and leaks none; one file a minute beside the same load is a leak."""
    for leak, grows in ((0.0, False), (1.0, True)):
        samples = []
        for i in range(181):
            load = float(i % 9 + i // 10)
            files = 30 + 2 * load + leak * i / 6
            samples.append(Sample(10.0 * i, {FILES: files, "gateway requests_accepted": load}))
        (fit,) = growth(samples)
        assert fit.grows == grows
        assert fit.per_hour == pytest.approx(60 * leak, abs=1e-6)


def test_too_few_samples_say_nothing() -> None:
    assert growth([]) == []
    assert growth(run(100e6, count=2 * MIN_SAMPLES - 4)) == []
    with_gaps = [s if i % 3 else Sample(s.at_s, {}) for i, s in enumerate(run(100e6))]
    assert growth(with_gaps)[0].grows  # a sample that could not be taken is left out


def test_what_is_held_at_rest() -> None:
    samples = run(0.0)
    assert left_behind([]) == {}
    assert left_behind(samples) == {"gateway requests_accepted": 5.0}  # 180 % 7
    assert left_behind([*samples, Sample(1803.0, samples[0].values)]) == {}


TEXT = """\
process_resident_memory_bytes 5e8
process_open_fds 40.0
homkv_requests_accepted 3.0
homkv_instance{instance="decode@a:1",name="blocks_total"} 64.0
homkv_instance{instance="decode@a:1",name="blocks_free"} 60.0
homkv_instance{instance="decode@a:1",name="requests_receiving"} 2.0
homkv_instance{instance="decode@a:1",name="resident_memory_bytes"} 1e9
homkv_instance{instance="prefill@b:2",name="open_fds"} 20.0
homkv_instance{instance="prefill@b:2",name="prompt_tokens_left"} 7.0
"""


def test_metrics_become_a_sample() -> None:
    assert held("") == {}
    assert held(TEXT) == {
        "gateway resident_memory_bytes": 5e8,
        "gateway open_fds": 40.0,
        "gateway requests_accepted": 3.0,
        "decode@a:1 requests_receiving": 2.0,
        "decode@a:1 resident_memory_bytes": 1e9,
        "decode@a:1 pages_in_use": 4.0,
        "prefill@b:2 open_fds": 20.0,
    }


def test_samples_are_read_back_and_drawn(tmp_path: Path) -> None:
    file, samples = tmp_path / "soak.jsonl", run(0.0)
    rows = [{"kind": "serve-sample"} | asdict(s) for s in (*run(9.0)[:5], *samples)]  # two runs: the last one counts
    file.write_text("\n".join(json.dumps(row) for row in [*rows, {"kind": "serve-load"}]))
    assert read_samples(file) == samples
    paths = save(samples, tmp_path / "plots")
    assert [path.name for path in paths] == ["serve-soak.png", "serve-soak.svg"]
    assert all(path.stat().st_size > 10_000 for path in paths)
    memory = draw(samples).axes[0]
    assert len(memory.lines) == 2  # samples and their line
    assert memory.get_ylabel() == "resident memory, MiB"


@pytest.mark.parametrize("text", ["", "{", '{"kind": "serve-load"}', '{"kind": "serve-sample"}', "[]", "1"])
def test_files_without_samples_are_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "soak.jsonl"
    file.write_text(text)
    with pytest.raises(FormatError, match="samples"):
        read_samples(file)
