"""Whose turn it is: nobody starves."""

from hypothesis import given
from hypothesis import strategies as st

from homkv.serve.turns import Turns


def play(
    jobs: list[tuple[str, int]], arrivals: dict[int, tuple[str, int]] | None = None, max_open: int = 4
) -> list[str]:
    """Run all jobs to their end; returns who had each turn. ``arrivals``: turn number -> a job that comes then."""
    turns: Turns[str] = Turns(max_open)
    left: dict[str, int] = {}
    order: list[str] = []

    def add(name: str, num_turns: int) -> None:
        left[name] = num_turns
        turns.add(name, num_turns)

    for name, num_turns in jobs:
        add(name, num_turns)
    while True:
        if arrivals and len(order) in arrivals:
            add(*arrivals.pop(len(order)))
        job = turns.next()
        if job is None:
            assert not any(left.values())
            return order
        order.append(job)
        left[job] -= 1
        if left[job] == 0:
            turns.remove(job)


def test_a_short_prompt_waits_for_one_turn_of_a_long_one() -> None:
    order = play([("long", 50)], {10: ("short", 1)})
    assert order.index("short") <= 11


def test_a_flood_of_short_prompts_does_not_stop_a_long_one() -> None:
    order = play([("long", 5), *((f"s{i}", 1) for i in range(20))])
    assert order[:10].count("long") == 5


def test_long_prompts_go_round() -> None:
    assert play([("a", 2), ("b", 3), ("c", 2)]) == ["a", "b", "c", "a", "b", "c", "b"]


def test_only_a_few_are_half_done_at_a_time() -> None:
    order = play([(name, 3) for name in "abcdef"], max_open=2)
    assert order[:6] == ["a", "b", "a", "b", "a", "b"]


def test_short_ones_are_served_in_order() -> None:
    assert play([("a", 1), ("b", 1), ("c", 1)]) == ["a", "b", "c"]


@given(st.lists(st.integers(1, 5), max_size=12), st.integers(1, 4))
def test_everyone_has_all_turns(lengths: list[int], max_open: int) -> None:
    order = play([(f"j{i}", n) for i, n in enumerate(lengths)], max_open=max_open)
    assert [order.count(f"j{i}") for i in range(len(lengths))] == lengths


def test_a_job_can_leave_from_anywhere() -> None:
    turns: Turns[str] = Turns(max_open=1)
    for name, count in (("short", 1), ("open", 2), ("long", 2)):
        turns.add(name, count)
    assert turns.next() == "short"
    assert turns.next() == "open"
    for name in ("short", "open", "long"):
        turns.remove(name)
    assert len(turns) == 0
    assert turns.next() is None
