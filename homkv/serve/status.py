"""What an instance tells about itself when asked."""

import resource
import secrets
import sys
import time
from collections import Counter
from typing import Literal

from homkv.serve.messages import Status


class StatusBoard:
    """Counters of one instance, and the name of its incarnation, which no restart repeats."""

    def __init__(self, role: Literal["prefill", "decode"], model: str, formats: list[str]) -> None:
        self.role, self.model, self.formats = role, model, formats
        self.incarnation = secrets.token_hex(8)
        self.counters: Counter[str] = Counter()

    def report(self, number: int, refused: Counter[str], gauges: dict[str, float]) -> Status:
        """Answer AskStatus. ``refused``: the listener's counts, reported as ``refused.REASON``."""
        counters = {name: float(count) for name, count in self.counters.items()}
        counters |= {f"refused.{reason}": float(count) for reason, count in refused.items()}
        return Status(number, self.role, self.incarnation, time.monotonic(), self.model, self.formats, counters, gauges)


def peak_rss_bytes() -> float:
    """Most memory that this process has held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak if sys.platform == "darwin" else peak * 1024)
