"""Long runs say how far they are and how long they will take, on a terminal and in a log."""

import io

import pytest
from rich.console import Console

from homkv.cli import progress


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)


def test_a_log_says_what_is_left_every_few_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, out = Clock(monkeypatch), io.StringIO()
    with progress.steps(Console(file=out, width=60)) as steps:
        steps.note("loading [a model]")
        steps.start(10)
        for i in range(10):
            steps.next(f"case {i}")
            clock.now += 6
    lines = [line.split(" ", 1)[1] for line in out.getvalue().splitlines()]  # without the time of day
    assert lines[0] == "loading [a model]"
    assert lines[1] == "2/10 after 12 s, about 48 s left: case 2"
    assert lines[-1] == "8/10 after 48 s, about 12 s left: case 8"
    assert len(lines) == 5  # not one for every case


def test_a_terminal_shows_a_bar() -> None:
    out = io.StringIO()
    with progress.steps(Console(file=out, force_terminal=True, width=100)) as steps:
        steps.start(3)
        steps.next("first")
        steps.next("second")
    assert "second" in out.getvalue()
    assert "1/3" in out.getvalue()
