"""A prompt on a machine that it shares with decoding: its speed changes whenever decoding begins or ends."""

import math
from collections.abc import Callable

import simpy

from homkv.sim.alarm import Alarm
from homkv.sim.job import Job


class SharedWork:
    """Work of ``seconds`` at full speed; ``slower``: times longer that it takes now. Calls ``done`` when it is done."""

    def __init__(self, env: simpy.Environment, seconds: float, slower: float, done: Callable[[], None]) -> None:
        self._env, self._left_s, self._slower = env, seconds, slower
        self._since = env.now
        self._alarm = Alarm(env, done)
        self._alarm.set(seconds * slower)

    def slow(self, times: float) -> None:
        """Go on at another speed."""
        self._left_s = max(0.0, self._left_s - (self._env.now - self._since) / self._slower)
        self._since, self._slower = self._env.now, times
        self._alarm.set(self._left_s * times)


def sent_early(job: Job, num_layers: int, rate: float, free_s: float) -> float:
    """Bytes of a job's layers that left before its last layer was packed, on a link that was free from ``free_s`` on.

    r (packed - max(first layer's end, free))    at most all layers but the last
    """
    if math.isinf(rate):
        return 0.0  # nothing waits for such a link
    first = job.started + (job.packed - job.started) / num_layers
    most = job.wire_bytes * (1 - 1 / num_layers)
    return max(0.0, min(most, rate * (job.packed - max(first, free_s))))
