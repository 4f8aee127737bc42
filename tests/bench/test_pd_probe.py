"""Steps beside the other stage, from what workers said of two requests."""

import pytest

from homkv.bench.pd.cell import Life, Outcome
from homkv.bench.pd.messages import Closed, Finished, Prefilled
from homkv.bench.pd.probe import beside
from homkv.sim.trace import Request

STEPS = [(1, 100 + i, 0.25 if 8 <= i < 16 else 0.125) for i in range(24)]  # the middle third beside a prompt


def outcome_of(start_s: float, end_s: float) -> tuple[Life, Life, Outcome]:
    done_s = 10.0 + sum(seconds for *_, seconds in STEPS)
    decoding = Life(Request("0", 0.0, 100, 25), 9.0, finished=Finished(0, 9.5, 10.0, done_s, []))
    computed = Life(Request("1", 1.0, 300, 2), 11.0, prefilled=Prefilled(1, start_s, end_s, end_s, 0))
    return decoding, computed, Outcome([decoding, computed], {}, {1: Closed(0, 0, 0.0, 0, STEPS)}, 1.0)


def test_steps_within_the_prompt_are_averaged() -> None:
    decode, prefill = beside(*outcome_of(11.0, 13.0), decode_rank=1)
    assert (decode.stage, decode.batch, decode.tokens, decode.seconds) == ("decode", 1, 112, pytest.approx(0.25))
    assert (prefill.stage, prefill.tokens, prefill.seconds) == ("prefill", 300, pytest.approx(2.0))
    assert decode.beside
    assert prefill.beside


@pytest.mark.parametrize("window", [(11.0, 11.6), (13.5, 20.0)], ids=["too few steps", "decoding ended first"])
def test_no_sample_where_they_did_not_overlap(window: tuple[float, float]) -> None:
    assert beside(*outcome_of(*window), decode_rank=1) == []
