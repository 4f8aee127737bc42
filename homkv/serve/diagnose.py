"""What bounds a service, and whether compressing KV helps it, from its Prometheus text alone.

All times are means over the requests that were done: seconds on the critical path, as `homkv_phase_seconds` has them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from prometheus_client.parser import text_string_to_metric_families

from homkv.errors import UnsupportedError
from homkv.serve.units import duration

Bound = Literal["queue", "prefill", "link", "decode"]
Helps = Literal["yes", "no", "unclear"]
GROUPS: dict[Bound, tuple[str, ...]] = {
    "queue": ("queue", "wait"),
    "prefill": ("turn", "prefill"),
    "link": ("pack", "send", "verify", "first_token"),
    "decode": ("decode",),
}
WORTH = 0.02  # of the completion time: what is won or lost below that is nothing to speak of
BUSY = 0.9  # of the time: an instance that computes more than that is at its limit


class Readings:
    """Samples of a Prometheus text. Raises UnsupportedError if the text is none, or not of a homkv gateway."""

    def __init__(self, text: str) -> None:
        self._samples: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
        try:
            for family in text_string_to_metric_families(text):
                for sample in family.samples:
                    self._samples[sample.name, frozenset(sample.labels.items())] = sample.value
        except ValueError as error:
            raise UnsupportedError(f"expected Prometheus' text at /metrics, found something else: {error}") from error
        if not any(name == "homkv_jct_seconds_count" for name, _ in self._samples):
            raise UnsupportedError("expected the metrics of a homkv gateway, found others; is the address right?")

    def since(self, before: "Readings") -> "Readings":
        """What counters gained since an earlier reading; gauges stay. A counter that fell has started again."""
        made = object.__new__(Readings)
        made._samples = {
            key: value - before._samples.get(key, 0.0)
            if key[0].endswith(("_total", "_sum", "_count", "_bucket")) and value >= before._samples.get(key, 0.0)
            else value
            for key, value in self._samples.items()
        }
        return made

    def total(self, name: str, **labels: str) -> float:
        """Sum over all samples of a name with these labels among theirs; 0 without any."""
        return sum(self.by("", name, **labels).values())

    def by(self, label: str, name: str, **labels: str) -> dict[str, float]:
        """Samples of a name with these labels among theirs, summed by one more label."""
        out: dict[str, float] = {}
        for (found, pairs), value in self._samples.items():
            if found == name and frozenset(labels.items()) <= pairs:
                key = dict(pairs).get(label, "")
                out[key] = out.get(key, 0.0) + value
        return out

    def mean(self, name: str, **labels: str) -> float:
        """Mean of a histogram; 0 if it is empty."""
        count = self.total(f"{name}_count", **labels)
        return self.total(f"{name}_sum", **labels) / count if count else 0.0


@dataclass(frozen=True)
class Compression:
    """One mean transfer with its bytes and with 16 bits, on the same link. Seconds and bytes.

    ``gain_least gain_most``: what the completion time would lose if KV travelled in 16 bits: if as much of it were
    hidden behind the prefill as can be, and if nothing were. Packing that was waited for is taken off.
    """

    helps: Helps
    link_bytes_per_s: float
    is_measured: bool  # the link's rate is the best that was seen, thus a lower bound; else it was given
    raw_bytes: float
    wire_bytes: float
    raw_link_s: float
    wire_link_s: float
    pack_s: float  # own times
    verify_s: float
    gain_least_s: float
    gain_most_s: float


@dataclass(frozen=True)
class Diagnosis:
    """Where the time of requests goes. ``bound`` is None if none was done."""

    bound: Bound | None
    why: str
    remedy: str
    num_done: int
    num_failed: int
    jct_s: float
    ttft_s: float
    tpot_s: float
    phases_s: dict[str, float]
    groups_s: dict[Bound, float]
    busy: dict[str, float]  # share of its time that an instance computed
    warnings: list[str]
    compression: Compression | None  # None: nothing was transferred


def diagnose(found: Readings, link_gbps: float | None = None) -> Diagnosis:
    """Say what bounds a service. ``link_gbps``: its link's rate, where it is known; else the best that was seen."""
    names = [phase for group in GROUPS.values() for phase in group]
    phases = {name: found.mean("homkv_phase_seconds", phase=name) for name in names}
    groups = {group: sum(phases[name] for name in members) for group, members in GROUPS.items()}
    num_done = int(found.total("homkv_jct_seconds_count"))
    bound = _largest(groups) if num_done else None
    up = found.by("instance", "homkv_instance_up_seconds_total")
    work = found.by("instance", "homkv_instance_busy_seconds_total")
    busy = {name: min(work.get(name, 0.0) / seconds, 1.0) for name, seconds in up.items() if seconds > 0}
    why, remedy = _explain(bound, found, phases, busy)
    return Diagnosis(
        bound=bound,
        why=why,
        remedy=remedy,
        num_done=num_done,
        num_failed=int(found.total("homkv_requests_total", state="failed")),
        jct_s=found.mean("homkv_jct_seconds"),
        ttft_s=found.mean("homkv_ttft_seconds"),
        tpot_s=found.mean("homkv_tpot_seconds"),
        phases_s=phases,
        groups_s=groups,
        busy=busy,
        warnings=list(_warnings(found)),
        compression=_compression(found, phases, link_gbps),
    )


def _largest(groups: dict[Bound, float]) -> Bound:
    return max(groups, key=lambda group: groups[group])


def _explain(bound: Bound | None, found: Readings, phases: dict[str, float], busy: dict[str, float]) -> tuple[str, str]:
    """The numbers behind a verdict in words, and what to do."""
    if bound is None:
        return "no request was done", "send some, or look at a longer time"
    if bound == "queue":
        free, blocks = found.total("homkv_page_blocks_free"), found.total("homkv_page_blocks")
        why = f"requests wait {duration(phases['wait'])} for room at decode instances and "
        why += f"{duration(phases['queue'])} before that; "
        return why + f"{free:,.0f} of {blocks:,.0f} page blocks are free now", (
            "more decode instances, or more --max-tokens and --max-sequences where they have memory; a smaller format "
            "makes room as well"
        )
    if bound == "prefill":
        why = f"prompts compute for {duration(phases['prefill'])} and wait {duration(phases['turn'])} for their turn; "
        is_full = phases["turn"] > phases["prefill"]
        remedy = "more prefill instances" if is_full else "shorter prompts or shared beginnings, or faster prefill"
        return why + _busiest(busy, "prefill"), remedy
    if bound == "link":
        own = found.mean("homkv_busy_seconds", work="send")
        why = f"a transfer holds a request up for {duration(phases['send'])}, and for "
        why += f"{duration(phases['pack'])} of packing, {duration(phases['verify'])} of verifying, "
        why += f"{duration(phases['first_token'])} until its first token; its bytes alone take {duration(own)}"
        return why, "a smaller format, a faster link, or fewer hops between them"
    per_token, tokens = found.mean("homkv_tpot_seconds"), found.total("homkv_tokens_total", kind="generated")
    mean_tokens = tokens / max(found.total("homkv_requests_total"), 1.0)
    why = f"an answer has {mean_tokens:,.0f} tokens on average, {duration(per_token)} each; "
    is_full = max((share for name, share in busy.items() if name.startswith("decode")), default=0.0) > BUSY
    remedy = "more decode instances" if is_full else "shorter answers, or faster steps: instances still have time left"
    return why + _busiest(busy, "decode"), remedy


def _busiest(busy: dict[str, float], role: str) -> str:
    shares = [f"{100 * share:.0f} %" for name, share in sorted(busy.items()) if name.startswith(role)]
    return f"{role} instances computed {', '.join(shares)} of the time" if shares else f"no {role} instance is there"


def _warnings(found: Readings) -> Iterator[str]:
    """What should be 0 and is not."""
    for reason, count in sorted(found.by("reason", "homkv_failures_total").items()):
        if count and reason != "cancelled":
            yield f"{count:,.0f} requests failed: {reason}"
    kinds = {
        "homkv_leases_expired_total": "leases expired: a prefill instance is gone or too slow",
        "homkv_digest_mismatches_total": "frames came with a wrong digest: the link or a memory damages bytes",
        "homkv_refused_peers_total": "connections with a key that is not trusted were refused",
        "homkv_slow_clients_total": "clients were cut off because they took no bytes",
    }
    for name, text in kinds.items():
        if count := found.total(name):
            yield f"{count:,.0f} {text}"
    away = [name for name, is_up in found.by("instance", "homkv_instance_up").items() if not is_up]
    if away:
        yield f"instances that do not answer: {', '.join(sorted(away))}"


def _compression(found: Readings, phases: dict[str, float], link_gbps: float | None) -> Compression | None:
    count = found.total("homkv_compression_ratio_count")
    best = max(found.by("instance", "homkv_link_bytes_per_second").values(), default=0.0)
    rate = best if link_gbps is None else link_gbps * 1e9 / 8
    if not count or not rate:
        return None
    raw, wire = (found.total("homkv_transfer_bytes_total", kind=kind) / count for kind in ("raw", "wire"))
    raw_s, jct_s = raw / rate, found.mean("homkv_jct_seconds")
    paid_s = phases["send"] + phases["pack"]
    least, most = max(raw_s - phases["prefill"], 0.0) - paid_s, raw_s - paid_s
    helps: Helps = "yes" if least >= WORTH * jct_s else "no" if most < WORTH * jct_s else "unclear"
    return Compression(
        helps=helps,
        link_bytes_per_s=rate,
        is_measured=link_gbps is None,
        raw_bytes=raw,
        wire_bytes=wire,
        raw_link_s=raw_s,
        wire_link_s=wire / rate,
        pack_s=found.mean("homkv_busy_seconds", work="pack"),
        verify_s=found.mean("homkv_busy_seconds", work="verify"),
        gain_least_s=least,
        gain_most_s=most,
    )
