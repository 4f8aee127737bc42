"""What a load sends, and when: traces, Poisson, a closed loop."""

import gzip
import itertools
import statistics
from pathlib import Path

import pytest

from homkv.bench.arrivals import LoadOptions, asks
from homkv.errors import ShapeError, TraceError


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


MOONCAKE = "".join(
    f'{{"timestamp": {1000 * i + 27000}, "input_length": {1200 + i}, "output_length": {20 + i}, '
    f'"hash_ids": [7, {i // 2}, {100 + i}]}}\n'
    for i in range(4)
)


def test_a_trace_is_sent_at_its_times_with_its_lengths_and_prefixes(tmp_path: Path) -> None:
    trace = write(tmp_path / "t.jsonl", MOONCAKE)
    found = list(asks(LoadOptions("http://x", trace=trace)))
    assert [ask.at_s for ask in found] == [0.0, 1.0, 2.0, 3.0]  # from its first request on
    assert [ask.max_tokens for ask in found] == [20, 21, 22, 23]
    words = [ask.prompt.split() for ask in found]
    assert [len(w) for w in words] == [1200, 1201, 1202, 1203]
    assert words[0][:1024] == words[1][:1024]  # blocks 7 and 0
    assert words[0][:512] == words[2][:512]
    assert words[0][512:1024] != words[2][512:1024]
    assert words[0][1024:1200] != words[1][1024:1200]


def test_a_trace_can_be_faster_shorter_and_cut(tmp_path: Path) -> None:
    trace = tmp_path / "t.jsonl.gz"
    trace.write_bytes(gzip.compress(MOONCAKE.encode()))
    found = list(asks(LoadOptions("http://x", trace=trace, speed=4.0, token_scale=0.1, num_requests=3)))
    assert [ask.at_s for ask in found] == [0.0, 0.25, 0.5]
    assert [(len(ask.prompt.split()), ask.max_tokens) for ask in found] == [(120, 2), (120, 2), (120, 2)]
    assert len(list(asks(LoadOptions("http://x", trace=trace, num_requests=3, duration_s=9.0)))) == 4  # time is the end


def test_a_trace_of_lengths_needs_a_rate(tmp_path: Path) -> None:
    trace = write(tmp_path / "t.csv", "num_prefill_tokens,num_decode_tokens\n30,4\n50,6\n")
    with pytest.raises(TraceError, match=r"t\.csv, line 2: .*rate"):
        asks(LoadOptions("http://x", trace=trace))
    found = list(asks(LoadOptions("http://x", trace=trace, rate=2.0)))
    assert [ask.max_tokens for ask in found] == [4, 6]
    assert found[0].at_s == 0.0 < found[1].at_s


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "empty"),
        ('{"timestamp": 0, "input_length": 5}\n', "line 1: .*output_length"),
        (MOONCAKE + '{"timestamp": 0, "input_length": 5, "output_length": 5}\n', "line 5: .*ascending"),
        (MOONCAKE + '{"timestamp": 1, "input_length": -5, "output_length": 5}\n', "line 5: .*input_length"),
        ("a,b\n1,2\n", "line 2: .*columns"),
    ],
)
def test_a_broken_trace_names_its_line_and_reason(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(TraceError, match=says):
        asks(LoadOptions("http://x", trace=write(tmp_path / "t", text)))


def test_poisson_arrivals_and_a_closed_loop() -> None:
    times = [ask.at_s for ask in asks(LoadOptions("http://x", num_requests=4000, rate=5.0, prompt_words=1))]
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert times[0] == 0.0
    assert statistics.mean(gaps) == pytest.approx(0.2, rel=0.05)
    assert statistics.stdev(gaps) == pytest.approx(0.2, rel=0.1)  # of an exponential: its mean
    closed = list(asks(LoadOptions("http://x", num_requests=3, prompt_words=9, shared_words=4)))
    assert [ask.at_s for ask in closed] == [0.0] * 3
    assert len({" ".join(ask.prompt.split()[:4]) for ask in closed}) == 1
    assert len({ask.prompt for ask in closed}) == 3
    endless = asks(LoadOptions("http://x", num_requests=3, duration_s=1.0))
    assert len(list(itertools.islice(endless, 10))) == 10


@pytest.mark.parametrize("name", ["rate", "speed", "token_scale", "duration_s", "sample_s"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
def test_numbers_that_mean_nothing_are_refused(name: str, value: float) -> None:
    with pytest.raises(ShapeError, match=name):
        LoadOptions("http://x", **{name: value})
