"""What Prometheus is told, all of it from records of requests and reports of instances.

Times are seconds, sizes bytes. docs/serving.md lists every name.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from homkv.errors import HomkvError
from homkv.serve.dispatch import Dispatcher
from homkv.serve.fleet import Member
from homkv.serve.lifecycle import PHASES, Record
from homkv.transport.endpoint import LinkError
from homkv.transport.wire import FrameError

FAST = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 300.0)
PER_TOKEN = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
RATIOS = (0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 12.0, 20.0, 50.0)
ERRORS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 1.0)


class Metrics:
    """Metrics of one gateway, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        at: dict[str, Any] = {"registry": self.registry}
        self._ttft = Histogram("homkv_ttft_seconds", "Time to first token", buckets=FAST, **at)
        self._tpot = Histogram("homkv_tpot_seconds", "Time per output token behind the first", buckets=PER_TOKEN, **at)
        self._jct = Histogram("homkv_jct_seconds", "Job completion time", buckets=FAST, **at)
        self._phase = Histogram(
            "homkv_phase_seconds", "What a phase added to a request's time", ["phase"], buckets=FAST, **at
        )
        self._busy = Histogram("homkv_busy_seconds", "Own time of a transfer's work", ["work"], buckets=FAST, **at)
        self._bytes = Counter("homkv_transfer_bytes", "KV moved: in 16 bits, and on the wire", ["kind"], **at)
        self._ratio = Histogram("homkv_compression_ratio", "raw / wire bytes of a transfer", buckets=RATIOS, **at)
        self._error = Histogram(
            "homkv_reconstruction_error", "|x - dense(x)| / |x| of sampled layers", buckets=ERRORS, **at
        )
        self._requests = Counter("homkv_requests", "Requests that ended", ["state"], **at)
        self._failures = Counter("homkv_failures", "Requests that failed or were cancelled", ["reason"], **at)
        self._retries = Counter("homkv_recomputed_attempts", "Attempts behind the first", **at)
        self._tokens = Counter("homkv_tokens", "Tokens of ended requests", ["kind"], **at)
        self._refusals = Counter("homkv_http_refusals", "HTTP requests that were not accepted", ["reason"], **at)
        self.slow_clients = Counter("homkv_slow_clients", "Clients cut off because they took no bytes", **at)
        for phase in PHASES:
            self._phase.labels(phase)
        ProcessCollector(registry=self.registry)

    def ended(self, record: Record, error: HomkvError | None) -> None:
        """Count a request that ended. Called in the dispatcher's thread."""
        self._requests.labels(record.state.value).inc()
        self._tokens.labels("prompt").inc(record.num_prompt_tokens)
        self._tokens.labels("cached").inc(record.num_cached_tokens)
        self._tokens.labels("generated").inc(record.num_tokens)
        self._retries.inc(max(record.num_attempts - 1, 0))
        if record.wire_bytes:
            self._bytes.labels("raw").inc(record.raw_bytes)
            self._bytes.labels("wire").inc(record.wire_bytes)
            self._ratio.observe(record.raw_bytes / record.wire_bytes)
            for work, seconds in record.busy_s.items():
                self._busy.labels(work).observe(seconds)
        if record.reconstruction_error is not None:
            self._error.observe(record.reconstruction_error)
        if error is not None:
            self._failures.labels(reason_of(error) if record.state == "failed" else "cancelled").inc()
            return
        self._times(record)

    def _times(self, record: Record) -> None:
        for histogram, seconds in ((self._ttft, record.ttft_s), (self._tpot, record.tpot_s), (self._jct, record.jct_s)):
            if seconds is not None:
                histogram.observe(seconds)
        for phase, seconds in record.phases_s().items():
            self._phase.labels(phase).observe(seconds)

    def refused(self, reason: str) -> None:
        """Count an HTTP request that was not accepted."""
        self._refusals.labels(reason).inc()

    def watch(self, dispatcher: Dispatcher) -> None:
        """Report what the dispatcher and its instances say of themselves at every scrape."""
        Gauge("homkv_requests_queued", "Not given to an instance", registry=self.registry).set_function(
            lambda: dispatcher.num_queued
        )
        Gauge("homkv_requests_accepted", "Not ended", registry=self.registry).set_function(
            lambda: dispatcher.num_accepted
        )
        self.registry.register(_Instances(dispatcher))

    def render(self) -> bytes:
        """Prometheus' text."""
        return generate_latest(self.registry)


def reason_of(error: HomkvError) -> str:
    """One word for a failure: of the transport if it has one, else the error's class."""
    return error.reason if isinstance(error, LinkError | FrameError) else type(error).__name__


# What people look for by name: family, help, key in the instances' reports.
NAMED_COUNTERS = (
    ("homkv_leases_expired", "Room freed because no sign of life came, or no KV in time", "leases_expired"),
    ("homkv_digest_mismatches", "Frames refused because their digest was wrong", "refused.digest"),
    ("homkv_refused_peers", "Handshakes refused because of the key", "refused.untrusted_key"),
    ("homkv_instance_busy_seconds", "Time spent computing", "busy_seconds"),
    ("homkv_instance_up_seconds", "Time since the start", "up_seconds"),
)
NAMED_GAUGES = (
    ("homkv_page_blocks_free", "Blocks of pages that a new request can have", "blocks_free"),
    ("homkv_page_blocks", "Blocks of pages", "blocks_total"),
    ("homkv_leases_open", "Reservations whose KV has not come whole", "requests_receiving"),
    ("homkv_link_bytes_per_second", "What the link carried at its best, which it carries at least", "link_bytes_per_s"),
    ("homkv_prefix_pages_asked", "Pages of prompts that were looked up", "prefix_pages_asked"),
    ("homkv_prefix_pages_found", "Of them, pages that were there", "prefix_pages_found"),
)


class _Instances(Collector):
    """Counters and gauges of instances, from their last report."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher

    def collect(self) -> Iterator[Metric]:
        """Build the families anew: instances come, go and restart."""
        members = self._dispatcher.members
        yield _family("homkv_instance_up", "Connected and reporting", members, lambda m: float(m.status is not None))
        yield _family("homkv_instance_lost_connections", "Connections that broke", members, lambda m: m.num_lost)
        yield _family("homkv_instance_restarts", "Restarts that were noticed", members, lambda m: m.num_restarts)
        yield _family("homkv_instance_load_tokens", "Tokens of requests that it was given", members, _load)
        yield from self._named(members)
        gauge = GaugeMetricFamily("homkv_instance", "State of an instance", labels=["instance", "name"])
        counter = CounterMetricFamily("homkv_instance_events", "Events of an instance", labels=["instance", "name"])
        for member in members:
            status = member.status
            if status is not None:
                for name, value in status.gauges.items():
                    gauge.add_metric([member.name, name], value)
                for name, value in status.counters.items():
                    counter.add_metric([member.name, name], value)
        yield from (gauge, counter)

    def _named(self, members: Iterable[Member]) -> Iterator[Metric]:
        statuses = [(member.name, member.status) for member in members if member.status is not None]
        for name, text, key in NAMED_COUNTERS:
            counter = CounterMetricFamily(name, text, labels=["instance"])
            for instance, status in statuses:
                counter.add_metric([instance], status.counters.get(key, 0.0))
            yield counter
        for name, text, key in NAMED_GAUGES:
            gauge = GaugeMetricFamily(name, text, labels=["instance"])
            for instance, status in statuses:
                if key in status.gauges:
                    gauge.add_metric([instance], status.gauges[key])
            yield gauge


def _load(member: Member) -> float:
    return float(member.num_tokens)


def _family(name: str, text: str, members: Iterable[Member], value: Any) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text, labels=["instance"])
    for member in members:
        family.add_metric([member.name], value(member))
    return family
