"""What the gateway shows of itself as JSON: one schema for the page, ``homkv trace`` and ``homkv doctor --url``.

No prompt, no answer and no key is in it: records hold counts and times only.
"""

from collections import defaultdict
from typing import Any

import msgspec

from homkv.serve.dispatch import Dispatcher
from homkv.serve.fleet import Member, Role
from homkv.serve.lifecycle import Record


class EventView(msgspec.Struct, frozen=True):
    """Something that happened, ``at_s`` seconds after the request was accepted."""

    name: str
    at_s: float
    detail: dict[str, Any]


class RequestView(msgspec.Struct, frozen=True):
    """One request, as `/v1/requests/ID` has it. Times in seconds, sizes in bytes; ``submitted_at`` since 1970."""

    request_id: str
    state: str
    submitted_at: float
    elapsed_s: float  # until its end, or until now
    phases_s: dict[str, float]  # in order; their sum is elapsed_s
    busy_s: dict[str, float]  # own times of pack, send, verify, hidden or not
    events: list[EventView]
    num_prompt_tokens: int
    num_tokens: int
    num_cached_tokens: int
    num_shared_pages: int
    num_attempts: int
    raw_bytes: int
    wire_bytes: int
    kv_bytes: int
    prefill: str | None  # instances of the last attempt
    decode: str | None
    ttft_s: float | None = None
    tpot_s: float | None = None
    jct_s: float | None = None
    reconstruction_error: float | None = None
    error: str | None = None


class InstanceView(msgspec.Struct, frozen=True):
    """One instance as the dispatcher sees it. ``gauges`` and ``counters``: of its last report; empty if it is away."""

    name: str
    role: Role
    is_up: bool
    last_error: str
    num_lost: int
    num_restarts: int
    num_requests: int
    load_tokens: int
    round_trip_s: float | None
    formats: list[str]
    gauges: dict[str, float]
    counters: dict[str, float]


class LinkView(msgspec.Struct, frozen=True):
    """Transfers between two instances, of the requests that are still recorded."""

    prefill: str
    decode: str
    num_transfers: int
    raw_bytes: int
    wire_bytes: int
    send_s: float  # own time of the bytes


class ServiceView(msgspec.Struct, frozen=True):
    """What is served, and how much of it waits."""

    model: str
    kv_cache_dtype: str
    policy: str
    up_s: float
    num_queued: int  # no instance knows of them
    num_accepted: int  # not ended
    max_requests: int


class Overview(msgspec.Struct, frozen=True):
    """`/v1/status`."""

    service: ServiceView
    instances: list[InstanceView]
    links: list[LinkView]
    requests: list[RequestView]  # newest first


def view_of(record: Record) -> RequestView:
    """A record as the API shows it."""
    return msgspec.convert(record.to_dict(), RequestView)


def instance_views(dispatcher: Dispatcher) -> list[InstanceView]:
    """All instances."""
    return [_instance(member) for member in dispatcher.members]


def _instance(member: Member) -> InstanceView:
    status = member.status
    return InstanceView(
        name=member.name,
        role=member.role,
        is_up=status is not None,
        last_error=member.last_error,
        num_lost=member.num_lost,
        num_restarts=member.num_restarts,
        num_requests=len(member.load),
        load_tokens=member.num_tokens,
        round_trip_s=member.round_trip_s,
        formats=[] if status is None else status.formats,
        gauges={} if status is None else status.gauges,
        counters={} if status is None else status.counters,
    )


def link_views(records: list[Record]) -> list[LinkView]:
    """What crossed between whom."""
    groups: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in records:
        if record.wire_bytes and record.prefill and record.decode:
            groups[record.prefill, record.decode].append(record)
    return [
        LinkView(
            prefill,
            decode,
            len(group),
            sum(r.raw_bytes for r in group),
            sum(r.wire_bytes for r in group),
            sum(r.busy_s.get("send", 0.0) for r in group),
        )
        for (prefill, decode), group in sorted(groups.items())
    ]
