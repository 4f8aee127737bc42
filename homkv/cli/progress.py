"""Progress of a long run: a bar with the time that is left, or lines of a log where there is no terminal."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

SECONDS_PER_LINE = 10.0


class Steps:
    """Counts steps of a run; ``show`` draws ``(what, done, total)``."""

    def __init__(self, show: Callable[[str, int, int | None], None]) -> None:
        self._show = show
        self._done, self._total = 0, None  # type: int, int | None

    def note(self, what: str) -> None:
        """Say what is being done outside the counted steps."""
        self._show(what, self._done, self._total)

    def start(self, total: int) -> None:
        """Count ``total`` steps from now on."""
        self._done, self._total = -1, total

    def next(self, what: str) -> None:
        """Begin the next step."""
        self._done += 1
        self._show(what, self._done, self._total)


@contextmanager
def steps(console: Console) -> Iterator[Steps]:
    """Show progress on a console while the block runs."""
    if not console.is_terminal:
        yield Steps(_Lines(console))
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
        bar = progress.add_task("loading", total=None)
        yield Steps(lambda what, done, total: progress.update(bar, description=what, completed=done, total=total))


class _Lines:
    """A line every few seconds, with the time that is left if steps go on taking as long as they did."""

    def __init__(self, console: Console) -> None:
        self._console, self._last = console, -SECONDS_PER_LINE
        self._begun, self._total = time.monotonic(), None  # type: float, int | None

    def __call__(self, what: str, done: int, total: int | None) -> None:
        now = time.monotonic()
        if total != self._total:
            self._begun, self._total = now, total
        if now - self._last < SECONDS_PER_LINE:
            return
        self._last, elapsed = now, now - self._begun
        text = what
        if total is not None:
            left = f", about {elapsed * (total - done) / done:.0f} s left" if done else ""
            text = f"{done}/{total} after {elapsed:.0f} s{left}: {what}"
        self._console.print(f"{time.strftime('%H:%M:%S')} {text}", soft_wrap=True, highlight=False, markup=False)
