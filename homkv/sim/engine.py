"""The simulation: arrivals, prefill instances, links, decode instances. See docs/sim.md for the model.

arrival -> one queue -> prefill instance -> pack -> room at decode -> sender, NIC -> unpack -> decode instance
"""

import math
from collections import deque
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import Literal

import simpy

from homkv.errors import TraceError, UnsupportedError
from homkv.sim.alarm import call_in
from homkv.sim.costs import Costs
from homkv.sim.decode import DecodeInstance
from homkv.sim.job import Job, Tally
from homkv.sim.link import Network, overlapped_start
from homkv.sim.prefix import PrefixCache
from homkv.sim.room import Room
from homkv.sim.sharing import SharedWork, sent_early
from homkv.sim.trace import PREFIX_BLOCK_TOKENS, Request

BYTES_PER_GBIT = 1e9 / 8


@dataclass(frozen=True)
class System:
    """Instances and links around one model and one format.

    ``egress_gbps`` of every prefill instance, ``ingress_gbps`` of every decode instance; None: unlimited.
    ``overlap``: layers are sent while the next ones compute, if there is room at decode when prefill starts.
    ``background_pack``: packing takes no time of prefill's machine. ``reserves_early``: prefill does not start before
    there is room at decode. ``when_full``: ``wait``: KV stays at the prefill host until there is room; ``swap``: it
    crosses at once, waits in the decode host's memory and is loaded at ``swap_gbps``. ``capacity_bytes``: of KV per
    decode instance, ``prefix_bytes``: of a prefix cache; None: unlimited, and no cache. ``seal_per_token_s``: that a
    sequence's token takes between steps, where full windows become pages there and not in the step. ``prefill_beside
    decode_beside``: above 1 where all instances share one machine, how many times longer a prompt takes while something
    decodes, and a decode step while a prompt is computed.
    """

    costs: Costs
    num_prefill: int = 1
    num_decode: int = 1
    egress_gbps: float | None = None
    ingress_gbps: float | None = None
    latency_s: float = 0.0
    overlap: bool = True
    background_pack: bool = False
    reserves_early: bool = False
    when_full: Literal["wait", "swap"] = "wait"
    swap_gbps: float = 200.0  # PCIe 4.0 x16 carries some 25 GB/s
    capacity_bytes: int | None = None
    max_batch: int | None = None
    prefix_bytes: int | None = None
    seal_per_token_s: float = 0.0
    prefill_beside: float = 1.0
    decode_beside: float = 1.0

    @property
    def is_shared(self) -> bool:
        """Whether prefill and decode slow one another down."""
        return self.prefill_beside != 1 or self.decode_beside != 1


@dataclass(frozen=True)
class Outcome:
    """What a simulation counted. ``tally``: phases of every request."""

    tally: Tally
    end_s: float  # the last request's end
    sent_bytes: int
    received_bytes: int
    decoded_tokens: int
    cached_tokens: int
    prefill_busy_s: float
    decode_busy_s: float
    peak_kv_bytes: int


def simulate(system: System, requests: Iterable[Request], on_done: Callable[[int], None] | None = None) -> Outcome:
    """Run the requests, which must come in the order of arrival, to the last token.

    A pure function of its arguments. ``on_done`` hears how many have finished, after each. Raises TraceError for an
    arrival before the one above it or for no request at all, CapacityError for a request that never fits,
    UnsupportedError for a pipeline on a shared machine.
    """
    if system.is_shared and system.costs.stages != 1:
        raise UnsupportedError(f"expected one stage on a shared machine, found {system.costs.stages}; use one")
    cluster = _Cluster(simpy.Environment(), system, on_done)
    cluster.env.process(cluster.arrivals(requests))
    cluster.env.run()
    if not len(cluster.tally):
        raise TraceError("expected at least one request, found none")
    return cluster.outcome()


class _Prefill:
    """A prefill instance: a pipeline of stages, and a packer."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.done = 0.0  # when the newest prompt leaves the pipeline
        self.packed = 0.0  # when the newest prompt is packed

    def compute(self, job: Job, now: float, system: System) -> float:
        """Enter a prompt; sets ``started``, ``computed`` and ``packed``. Returns seconds until the next may enter."""
        work, pack = work_s(job, system)
        stage = work / system.costs.stages
        self.done = max(now + work, self.done + stage)  # prompts do not overtake one another
        job.prefill_id, job.started = self.index, now
        self.pack(job, pack, system)
        return stage

    def pack(self, job: Job, pack: float, system: System) -> None:
        """Set ``computed`` and ``packed`` of the prompt that ends at ``done``; packing takes ``pack`` seconds."""
        if not system.background_pack:
            job.computed, job.packed = self.done - pack, self.done
            return
        job.computed = self.done
        layer = 1 / system.costs.num_layers if system.overlap else 1.0  # of the work, packed behind the last layer
        first = job.started + (self.done - job.started) * layer
        self.packed = max(self.done + pack * layer, max(first, self.packed) + pack)
        job.packed = self.packed


def work_s(job: Job, system: System) -> tuple[float, float]:
    """What a prompt takes of its prefill instance, and packing of that or of another core."""
    costs, tokens = system.costs, job.request.prompt_tokens
    compute, pack = costs.prefill_s(tokens, job.cached_tokens), costs.pack_s(tokens)
    return (compute if system.background_pack else compute + pack), pack


class _Cluster:
    def __init__(self, env: simpy.Environment, system: System, on_done: Callable[[int], None] | None) -> None:
        self.env = env
        self.system = system
        self.costs = system.costs
        self.on_done = on_done
        self.tally = Tally()
        egress, ingress = _bytes_per_s(system.egress_gbps), _bytes_per_s(system.ingress_gbps)
        self.rate = min(egress, ingress)
        capacity = math.inf if system.capacity_bytes is None else system.capacity_bytes
        max_batch = math.inf if system.max_batch is None else system.max_batch
        decode_ids = range(system.num_decode)
        self.rooms = [Room(capacity) for _ in decode_ids]
        self.network = Network(env, egress, ingress, self._arrived)
        self.decodes = [
            DecodeInstance(env, self.costs, max_batch, self._finish, self._decoding_changed, system.seal_per_token_s)
            for _ in decode_ids
        ]
        self.unpacked = [0.0 for _ in decode_ids]  # when the newest KV is unpacked: one after the other
        self.idle = deque(_Prefill(i) for i in range(system.num_prefill))
        self.queue: deque[Job] = deque()
        self.prefill_busy_s = 0.0
        self.works: list[SharedWork] = []  # prompts that are computed on a shared machine
        self.num_decoding = 0  # instances that decode
        self.newest: dict[int, Job] = {}  # by prefill instance, put on the network last
        self.link_free = [0.0] * system.num_prefill  # when a prefill instance's newest transfer ended
        self.prefix: PrefixCache | None = None
        if system.prefix_bytes is not None:
            self.prefix = PrefixCache(system.prefix_bytes, self.costs.kv_bytes(PREFIX_BLOCK_TOKENS))

    def arrivals(self, requests: Iterable[Request]) -> Generator[simpy.Event]:
        """Let every request arrive in its time."""
        for number, request in enumerate(requests, 1):
            if request.arrival_s < self.env.now:
                raise TraceError(
                    f"request {number}: expected arrivals in ascending order, found {request.arrival_s:g} s after "
                    f"{self.env.now:g} s; sort the trace by its arrival times"
                )
            if request.arrival_s > self.env.now:
                yield simpy.Timeout(self.env, request.arrival_s - self.env.now)
            tokens = request.prompt_tokens + request.output_tokens
            self.queue.append(Job(request, self.costs.wire_bytes(request.prompt_tokens), self.costs.kv_bytes(tokens)))
            self._dispatch()

    def _dispatch(self) -> None:
        while self.idle and self.queue:
            job = self.queue[0]
            if self.system.reserves_early and not job.has_room and not self._reserve(job):
                return
            self.queue.popleft()
            self._prefill(self.idle.popleft(), job)

    def _reserve(self, job: Job) -> bool:
        """Take room before prefill, or wait for it once; the queue stands still meanwhile."""
        if job.decode_id < 0:
            self._choose(job)
            if not self.rooms[job.decode_id].take(job):
                self.rooms[job.decode_id].wait(job, lambda _: self._dispatch())
        return job.has_room

    def _choose(self, job: Job) -> None:
        """The decode instance with the least KV, held and waited for."""
        job.decode_id = min(range(len(self.rooms)), key=lambda i: self.rooms[i].load_bytes)

    def _prefill(self, prefill: _Prefill, job: Job) -> None:
        now, system = self.env.now, self.system
        if self.prefix is not None:
            job.cached_tokens = self.prefix.lookup(job.request.prefix_blocks, job.request.prompt_tokens)
        if system.overlap and not job.has_room:
            self._choose(job)
            self.rooms[job.decode_id].take(job)
        if system.is_shared:
            self._compute_shared(prefill, job)
            return
        stage = prefill.compute(job, now, system)
        self.prefill_busy_s += stage
        call_in(self.env, stage, lambda _: self._next_prompt(prefill))
        if system.overlap and job.has_room:
            start = overlapped_start(now, job.packed, self.costs.num_layers, job.wire_bytes, self.rate)
            call_in(self.env, start - now, lambda _: self.network.put(job))
        else:
            call_in(self.env, job.packed - now, lambda _: self._packed(job))

    def _compute_shared(self, prefill: _Prefill, job: Job) -> None:
        """Compute a prompt beside what decodes; when it ends depends on that."""
        system, start = self.system, self.env.now
        work, pack = work_s(job, system)
        job.prefill_id, job.started = prefill.index, start

        def done() -> None:
            self.works.remove(shared)
            self._slow_decodes()
            prefill.done = self.env.now
            slower = 1.0 if system.background_pack else (self.env.now - start) / work
            prefill.pack(job, pack * slower, system)
            self.prefill_busy_s += self.env.now - start
            call_in(self.env, job.packed - self.env.now, lambda _: self._packed_shared(job))
            self._next_prompt(prefill)

        shared = SharedWork(self.env, work, system.prefill_beside if self.num_decoding else 1.0, done)
        self.works.append(shared)
        self._slow_decodes()

    def _packed_shared(self, job: Job) -> None:
        if not (self.system.overlap and job.has_room):
            self._packed(job)
            return
        index = job.prefill_id
        job.sent_early = sent_early(job, self.costs.num_layers, self.rate, self.link_free[index])
        self.newest[index], self.link_free[index] = job, math.inf
        self.network.put(job)

    def _slow_decodes(self) -> None:
        for decode in self.decodes:
            decode.slow(self.system.decode_beside if self.works else 1.0)

    def _decoding_changed(self, is_busy: bool) -> None:
        self.num_decoding += 1 if is_busy else -1
        for work in self.works:
            work.slow(self.system.prefill_beside if self.num_decoding else 1.0)

    def _next_prompt(self, prefill: _Prefill) -> None:
        self.idle.append(prefill)
        self._dispatch()

    def _packed(self, job: Job) -> None:
        """Send what is packed if there is room at decode, or to wait in its host's memory, or keep it here."""
        if not job.has_room:
            self._choose(job)
        room = self.rooms[job.decode_id]
        if job.has_room or room.take(job) or self.system.when_full == "swap":
            self.network.put(job)
        else:
            room.wait(job, self._send_late)

    def _send_late(self, job: Job) -> None:
        job.room_wait_s = self.env.now - job.packed
        self.network.put(job)

    def _arrived(self, job: Job) -> None:
        """The last byte has left."""
        job.arrived = self.env.now + self.system.latency_s
        if self.newest.get(job.prefill_id) is job:
            self.link_free[job.prefill_id] = self.env.now
        ready = max(job.arrived, self.unpacked[job.decode_id])
        unpack_s = self.costs.unpack_s(job.request.prompt_tokens)
        job.unpacked = self.unpacked[job.decode_id] = ready + unpack_s
        if job.unpacked > self.env.now:
            call_in(self.env, job.unpacked - self.env.now, lambda _: self._unpacked(job))
        else:
            self._unpacked(job)

    def _unpacked(self, job: Job) -> None:
        if job.has_room or self.rooms[job.decode_id].take(job):
            self.decodes[job.decode_id].admit(job)
        else:
            self.rooms[job.decode_id].wait(job, self._swap_in)

    def _swap_in(self, job: Job) -> None:
        delay_s = job.kv_bytes / _bytes_per_s(self.system.swap_gbps)
        call_in(self.env, delay_s, lambda _: self.decodes[job.decode_id].admit(job))

    def _finish(self, job: Job) -> None:
        self.tally.add(job, self.env.now)
        self.rooms[job.decode_id].release(job)
        if self.on_done is not None:
            self.on_done(len(self.tally))

    def outcome(self) -> Outcome:
        """Sums over all instances."""
        return Outcome(
            tally=self.tally,
            end_s=self.env.now,
            sent_bytes=self.network.sent_bytes,
            received_bytes=self.network.received_bytes,
            decoded_tokens=sum(decode.decoded_tokens for decode in self.decodes),
            cached_tokens=self.prefix.hit_tokens if self.prefix is not None else 0,
            prefill_busy_s=self.prefill_busy_s,
            decode_busy_s=sum(decode.busy_s for decode in self.decodes),
            peak_kv_bytes=max(room.peak_bytes for room in self.rooms),
        )


def _bytes_per_s(gbps: float | None) -> float:
    return math.inf if gbps is None else gbps * BYTES_PER_GBIT
