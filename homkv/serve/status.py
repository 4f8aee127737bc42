"""What an instance tells about itself when asked."""

import secrets
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from prometheus_client import ProcessCollector

from homkv.serve.messages import Status

PROCESS_GAUGES = ("resident_memory_bytes", "open_fds")
_PROCESS = ProcessCollector(registry=None)


class StatusBoard:
    """Counters of one instance, and the name of its incarnation, which no restart repeats."""

    def __init__(self, role: Literal["prefill", "decode"], model: str, formats: list[str]) -> None:
        self.role, self.model, self.formats = role, model, formats
        self.incarnation = secrets.token_hex(8)
        self.counters: Counter[str] = Counter()
        self._began_s, self._busy_s = time.monotonic(), 0.0

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Count the time of the block as busy."""
        start_s = time.monotonic()
        try:
            yield
        finally:
            self._busy_s += time.monotonic() - start_s

    def report(self, number: int, refused: Counter[str], gauges: dict[str, float]) -> Status:
        """Answer AskStatus. ``refused``: the listener's counts, reported as ``refused.REASON``."""
        now_s = time.monotonic()
        counters = {name: float(count) for name, count in self.counters.items()}
        counters |= {f"refused.{reason}": float(count) for reason, count in refused.items()}
        counters |= {"busy_seconds": self._busy_s, "up_seconds": now_s - self._began_s}
        gauges = gauges | process_gauges()
        return Status(number, self.role, self.incarnation, now_s, self.model, self.formats, counters, gauges)


def process_gauges() -> dict[str, float]:
    """Memory and open files of this process; empty where the system has no /proc."""
    found = {family.name: family.samples[0].value for family in _PROCESS.collect()}
    return {name: found[f"process_{name}"] for name in PROCESS_GAUGES if f"process_{name}" in found}
