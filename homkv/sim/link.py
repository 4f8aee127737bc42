"""The network: a connection from every prefill to every decode instance; all share the interfaces fairly."""

import math
from collections import deque
from collections.abc import Callable

import simpy

from homkv.sim.alarm import Alarm
from homkv.sim.job import Job

Pair = tuple[int, int]  # prefill instance, decode instance


class Transfer:
    """KV on a connection: bytes left, and the rate of now in bytes/s."""

    __slots__ = ("job", "left", "pair", "rate")

    def __init__(self, pair: Pair, job: Job) -> None:
        self.pair = pair
        self.job = job
        self.left = float(job.wire_bytes - job.sent_early)
        self.rate = 0.0


class Network:
    """Connections on which requests follow one another. Rates are max-min fair (`share`) and change at every event.

    ``egress ingress``: bytes/s of every prefill and of every decode instance. ``deliver`` hears of a job whose last
    byte has left. One transfer per pair of instances is under way, however many wait: that bounds what an event costs.
    """

    def __init__(self, env: simpy.Environment, egress: float, ingress: float, deliver: Callable[[Job], None]) -> None:
        self.env = env
        self.egress = egress
        self.ingress = ingress
        self.deliver = deliver
        self.sent_bytes = self.received_bytes = 0
        self._waiting: dict[Pair, deque[Job]] = {}
        self._running: dict[Pair, Transfer] = {}
        self._next: Transfer | None = None  # the first to end
        self._since = 0.0  # time for which every ``left`` holds
        self._alarm = Alarm(env, self._complete)

    def put(self, job: Job) -> None:
        """Send a job's KV behind what waits on its connection."""
        self.sent_bytes += job.wire_bytes
        if math.isinf(self.egress) and math.isinf(self.ingress):
            self._deliver(job)
            return
        pair = job.prefill_id, job.decode_id
        if pair in self._running:
            self._waiting.setdefault(pair, deque()).append(job)
            return
        self._advance()
        self._running[pair] = Transfer(pair, job)
        self._plan()

    def _advance(self) -> None:
        elapsed = self.env.now - self._since
        self._since = self.env.now
        for transfer in self._running.values():
            transfer.left = max(0.0, transfer.left - elapsed * transfer.rate)

    def _plan(self) -> None:
        if not self._running:
            return
        share(list(self._running.values()), self.egress, self.ingress)
        self._next = min(self._running.values(), key=lambda transfer: transfer.left / transfer.rate)
        self._alarm.set(self._next.left / self._next.rate)

    def _complete(self) -> None:
        ended = self._next
        assert ended is not None
        self._advance()
        del self._running[ended.pair]
        if waiting := self._waiting.get(ended.pair):
            self._running[ended.pair] = Transfer(ended.pair, waiting.popleft())
        self._plan()
        self._deliver(ended.job)

    def _deliver(self, job: Job) -> None:
        self.received_bytes += job.wire_bytes
        self.deliver(job)


def share(transfers: list[Transfer], egress: float, ingress: float) -> None:
    """Set max-min fair rates: fill all equally, fix those on the interface that is full first, go on with the rest."""
    if len(transfers) == 1:
        transfers[0].rate = min(egress, ingress)
        return
    left: dict[tuple[int, int], float] = {}  # (side, instance) -> bytes/s not given away
    while transfers:
        users: dict[tuple[int, int], int] = {}
        for transfer in transfers:
            for side, limit in ((0, egress), (1, ingress)):
                link = side, transfer.pair[side]
                users[link] = users.get(link, 0) + 1
                left.setdefault(link, limit)
        full = min(users, key=lambda link: left[link] / users[link])
        rate = left[full] / users[full]
        side, instance = full
        rest = []
        for transfer in transfers:
            if transfer.pair[side] != instance:
                rest.append(transfer)
                continue
            transfer.rate = rate
            for end in (0, 1):
                left[end, transfer.pair[end]] -= rate
        transfers = rest


def overlapped_start(start: float, end: float, num_layers: int, bytes_: int, rate: float) -> float:
    """When to start sending KV that is produced layer by layer between ``start`` and ``end``.

    Sending can begin with the first layer, and cannot end before the last layer has been produced and sent:
    ``max(start + T/L, end + b/(L r) - b/r)``. Sending in one piece from then on ends when a link that follows the
    layers would, as long as nobody else uses it; with others it ends later (what was idle before is lost).
    """
    whole = bytes_ / rate
    return max(start + (end - start) / num_layers, end + whole / num_layers - whole)
