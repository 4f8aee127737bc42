"""A request's life: only declared moves, one end, phases that sum up."""

import pytest

from homkv.errors import HomkvError
from homkv.serve.lifecycle import ENDS, MOVES, PHASES, Record, RecordBook, State
from homkv.serve.messages import DecodeTimes, PrefillTimes


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def record(request_id: str = "r") -> tuple[Record, Clock]:
    clock = Clock()
    return Record(request_id, 10, clock), clock


@pytest.mark.parametrize("first", list(State))
@pytest.mark.parametrize("second", list(State))
def test_only_moves_of_the_table_are_possible(first: State, second: State) -> None:
    made, _ = record()
    made.state = first
    if second in MOVES[first]:
        made.move(second)
        assert (made.state, made.events[-1].name) == (second, second.value)
    else:
        with pytest.raises(HomkvError, match="expected a move"):
            made.move(second)
        assert made.state == first


def test_an_end_is_final_and_every_state_can_fail() -> None:
    assert all(not MOVES[end] for end in ENDS)
    assert all({State.FAILED, State.CANCELLED} <= MOVES[state] for state in set(State) - ENDS)
    assert [state for state in State if State.DONE in MOVES[state]] == [State.DECODING]  # never done without KV


def finished() -> Record:
    made, clock = record()
    for moment, phase in ((100.5, "queue"), (101.0, "wait")):
        clock.now_s = moment
        made.end_phase(phase)
    made.take_prefill(PrefillTimes(51.0, 51.5, 53.0, 53.2, 53.1, 0.4, 0.2, 0.1), offset_s=50.0)
    clock.now_s = 103.6
    made.end_phase("first_token")
    made.take_decode(DecodeTimes(93.4, 93.5, 95.0), offset_s=10.0)
    made.num_tokens, clock.now_s = 5, 105.6
    made.end_phase("decode")
    return made


def test_phases_map_clocks_and_sum_to_the_completion_time() -> None:
    made = finished()
    expected = {
        "queue": 0.5,
        "wait": 0.5,
        "turn": 0.5,
        "prefill": 1.5,
        "pack": 0.2,
        "send": 0.0,  # its last byte left before the last layer was noted as packed
        "verify": 0.2,
        "first_token": 0.2,
        "decode": 2.0,
    }
    assert made.phases_s() == pytest.approx(expected)
    assert list(made.phases_s()) == list(PHASES)
    assert made.jct_s == pytest.approx(5.6)
    assert made.ttft_s == pytest.approx(3.6)
    assert made.tpot_s == pytest.approx(0.5)


def test_a_record_is_plain_data() -> None:
    plain = finished().to_dict()
    assert plain["request_id"] == "r"
    assert plain["events"][0] == {"name": "accepted", "at_s": 0.0, "detail": {}}
    assert sum(plain["phases_s"].values()) == pytest.approx(plain["jct_s"])


def test_the_book_forgets_the_oldest_that_ended() -> None:
    book, made = RecordBook(max_records=2), [record(name)[0] for name in "abc"]
    made[1].state = State.DONE
    for each in made:
        book.add(each)
    assert [r.request_id for r in book.newest(5)] == ["c", "a"]  # a still runs
    assert book.get("b") is None
    assert book.get("c") is made[2]
