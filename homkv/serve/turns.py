"""Whose turn it is to be computed: prompts of one chunk and longer ones alternate, so that neither starves the other.

No clock, no model: a pure queue.
"""

from collections import deque
from typing import Generic, TypeVar

Job = TypeVar("Job")


class Turns(Generic[Job]):
    """Jobs that need one turn (*short*) and jobs that need several (*long*).

    Every other turn goes to a short job, first come first served; the turns between go round the ``max_open`` oldest
    long jobs. So a short job waits for at most one turn of a long one before each short job ahead of it, and long
    jobs have at least every other turn. ``max_open`` bounds the memory of jobs that are half done.
    """

    def __init__(self, max_open: int = 4) -> None:
        self._max_open = max_open
        self._short: deque[Job] = deque()
        self._open: deque[Job] = deque()  # in the round, next one first
        self._long: deque[Job] = deque()  # not begun
        self._short_next = True

    def __len__(self) -> int:
        return len(self._short) + len(self._open) + len(self._long)

    def __iter__(self):  # type: ignore[no-untyped-def]  # of Job
        return iter([*self._short, *self._open, *self._long])

    def add(self, job: Job, num_turns: int) -> None:
        """Queue a job that needs so many turns."""
        (self._short if num_turns <= 1 else self._long).append(job)

    def remove(self, job: Job) -> None:
        """Forget a job. It must be queued."""
        queue = next(q for q in (self._short, self._open, self._long) if job in q)
        queue.remove(job)

    def next(self) -> Job | None:
        """The job whose turn it is, None if there is none. It stays queued until it is removed."""
        while self._long and len(self._open) < self._max_open:
            self._open.append(self._long.popleft())
        if self._short and (self._short_next or not self._open):
            self._short_next = False
            return self._short[0]
        self._short_next = True
        if not self._open:
            return None
        self._open.rotate(-1)
        return self._open[-1]
