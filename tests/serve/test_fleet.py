"""What the dispatcher knows of an instance: here, the instance's clock."""

import time

import pytest

from homkv.serve.fleet import Address, Member
from homkv.serve.messages import Status


def answer(member: Member, clock_s: float, round_trip_s: float) -> None:
    """A Status that was asked for ``round_trip_s`` ago, by an instance whose clock is ``clock_s`` ahead of ours."""
    now_s = time.monotonic()
    member._asked = {1: now_s - round_trip_s}
    taken_s = now_s - round_trip_s / 2 + clock_s
    member.take_status(Status(1, "decode", "one", taken_s, "model", ["balanced"], {}, {}))


def test_the_quickest_answer_tells_the_clock_until_it_jumps() -> None:
    member = Member("decode", Address("tcp://host:1", None))
    answer(member, 50.0, round_trip_s=0.5)
    assert member.clock_offset_s == pytest.approx(-50.0, abs=0.25)
    answer(member, 50.1, round_trip_s=0.01)
    assert member.clock_offset_s == pytest.approx(-50.1, abs=0.01)
    answer(member, 50.3, round_trip_s=0.6)  # may be the same clock
    assert member.clock_offset_s == pytest.approx(-50.1, abs=0.01)
    answer(member, 3650.0, round_trip_s=0.6)  # may not
    assert member.clock_offset_s == pytest.approx(-3650.0, abs=0.3)
    assert member.round_trip_s == pytest.approx(0.6, abs=0.1)
