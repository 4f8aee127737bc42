"""The network: every prefill instance sends its requests one after the other, every decode NIC is shared fairly."""

import heapq
import math
from collections import deque
from collections.abc import Callable

import simpy

from homkv.sim.alarm import Alarm
from homkv.sim.job import Job


class Nic:
    """A decode instance's network interface: processor sharing among the senders that send to it.

    Each of k transfers runs at ``min(egress, ingress / k)`` bytes/s, which is max-min fair, since a sender has one
    transfer at a time. In virtual time, ``V = integral of that rate``, a transfer of b bytes ends at ``V(start) + b``
    whoever comes and goes, so an arrival or a departure costs O(log k).
    """

    def __init__(self, env: simpy.Environment, egress: float, ingress: float) -> None:
        self.env = env
        self.egress = egress  # bytes/s of one sender
        self.ingress = ingress  # bytes/s
        self.received_bytes = 0
        self._virtual = 0.0  # bytes that a transfer running since the start would have moved
        self._since = 0.0  # time of _virtual
        self._transfers: list[tuple[float, int, Job, Callable[[Job], None]]] = []
        self._count = 0
        self._alarm = Alarm(env, self._complete)

    def send(self, job: Job, done: Callable[[Job], None]) -> None:
        """Move the job's bytes, then call ``done``."""
        if math.isinf(self.egress) and math.isinf(self.ingress):
            self.received_bytes += job.wire_bytes
            done(job)
            return
        self._advance()
        self._count += 1
        heapq.heappush(self._transfers, (self._virtual + job.wire_bytes, self._count, job, done))
        self._schedule()

    def _rate(self) -> float:
        return min(self.egress, self.ingress / len(self._transfers))

    def _advance(self) -> None:
        if self._transfers:
            self._virtual += (self.env.now - self._since) * self._rate()
        self._since = self.env.now

    def _schedule(self) -> None:
        if self._transfers:
            self._alarm.set((self._transfers[0][0] - self._virtual) / self._rate())

    def _complete(self) -> None:
        end, _, job, done = heapq.heappop(self._transfers)
        self._virtual, self._since = end, self.env.now  # exactly: rounding must not add up
        self.received_bytes += job.wire_bytes
        self._schedule()
        done(job)


class Sender:
    """A prefill instance's side: requests leave in order, one at a time."""

    def __init__(self, deliver: Callable[[Job], None]) -> None:
        self.sent_bytes = 0
        self._deliver = deliver
        self._queue: deque[tuple[Job, Nic]] = deque()
        self._busy = False

    def put(self, job: Job, nic: Nic) -> None:
        """Send as soon as everything before is sent."""
        self._queue.append((job, nic))
        if not self._busy:
            self._next()

    def _next(self) -> None:
        self._busy = bool(self._queue)
        if self._busy:
            job, nic = self._queue.popleft()
            nic.send(job, self._sent)

    def _sent(self, job: Job) -> None:
        self.sent_bytes += job.wire_bytes
        self._next()
        self._deliver(job)


def overlapped_start(start: float, end: float, num_layers: int, bytes_: int, rate: float) -> float:
    """When to start sending KV that is produced layer by layer between ``start`` and ``end``.

    Sending can begin with the first layer, and cannot end before the last layer has been produced and sent:
    ``max(start + T/L, end + b/(L r) - b/r)``. Sending in one piece from then on ends when a link that follows the
    layers would, as long as nobody else uses it; with others it ends later (what was idle before is lost).
    """
    whole = bytes_ / rate
    return max(start + (end - start) / num_layers, end + whole / num_layers - whole)
