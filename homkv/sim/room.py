"""Memory of a decode instance: who gets room, and who waits for it."""

from collections import deque
from collections.abc import Callable

from homkv.errors import CapacityError
from homkv.sim.job import Job


class Room:
    """Bytes of KV that one decode instance can hold, first come, first served.

    A request takes room for its prompt and its answer at once, so that nothing that decodes is ever thrown out.
    """

    def __init__(self, capacity_bytes: float) -> None:
        self.capacity_bytes = capacity_bytes
        self.load_bytes = 0  # held and waited for
        self.used_bytes = 0
        self.peak_bytes = 0
        self._waiting: deque[tuple[Job, Callable[[Job], None]]] = deque()

    def take(self, job: Job) -> bool:
        """Take room if there is some and nobody waits."""
        if self._waiting or self.used_bytes + job.kv_bytes > self.capacity_bytes:
            return False
        self.load_bytes += job.kv_bytes
        self._give(job)
        return True

    def wait(self, job: Job, then: Callable[[Job], None]) -> None:
        """Call ``then`` when there is room, which is taken. Raises CapacityError if there never will be."""
        if job.kv_bytes > self.capacity_bytes:
            raise CapacityError(
                f"expected requests of at most {self.capacity_bytes:,.0f} bytes of KV, found "
                f"{job.request.request_id!r} with {job.kv_bytes:,} ({job.request.prompt_tokens} + "
                f"{job.request.output_tokens} tokens); give decode more memory, more GPUs, or a smaller format"
            )
        self.load_bytes += job.kv_bytes
        self._waiting.append((job, then))

    def release(self, job: Job) -> None:
        """Give a finished request's room back, and serve those who wait."""
        self.used_bytes -= job.kv_bytes
        self.load_bytes -= job.kv_bytes
        while self._waiting and self.used_bytes + self._waiting[0][0].kv_bytes <= self.capacity_bytes:
            job, then = self._waiting.popleft()
            self._give(job)
            then(job)

    def _give(self, job: Job) -> None:
        job.has_room = True
        self.used_bytes += job.kv_bytes
        self.peak_bytes = max(self.peak_bytes, self.used_bytes)
