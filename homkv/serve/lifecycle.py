"""A request's life as a table of moves, and its record: what happened when. No sockets, no threads.

queued -> reserving -> prefilling -> decoding -> done
any of these -> failed | cancelled;  reserving, prefilling, decoding -> queued (policy recompute)
"""

import copy
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from homkv.errors import HomkvError
from homkv.serve.messages import DecodeTimes, PrefillTimes


class State(StrEnum):
    """Where a request is."""

    QUEUED = "queued"  # accepted, no instance knows of it
    RESERVING = "reserving"  # waits for room at its decode instance
    PREFILLING = "prefilling"  # its prompt waits, computes or is under way
    DECODING = "decoding"  # every layer was verified; tokens stream
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


ENDS = frozenset({State.DONE, State.FAILED, State.CANCELLED})
_LOST = frozenset({State.FAILED, State.CANCELLED})
MOVES: dict[State, frozenset[State]] = {
    State.QUEUED: _LOST | {State.RESERVING},
    State.RESERVING: _LOST | {State.PREFILLING, State.QUEUED},
    State.PREFILLING: _LOST | {State.DECODING, State.QUEUED},
    State.DECODING: _LOST | {State.DONE, State.QUEUED},
    **dict.fromkeys(ENDS, frozenset()),
}
# What the time to first token and the time behind it consist of, in order.
PHASES = ("queue", "wait", "turn", "prefill", "pack", "send", "verify", "first_token", "decode")
# Where the time goes of a request that has not got any further. What of "prefill" was turn, pack, send or verify is
# known when its instance reports that everything was delivered.
OPEN_PHASES = {
    State.QUEUED: "queue",
    State.RESERVING: "wait",
    State.PREFILLING: "prefill",
    State.DECODING: "first_token",
}


@dataclass(frozen=True)
class Event:
    """Something that happened, ``at_s`` seconds after the request was accepted."""

    name: str
    at_s: float
    detail: dict[str, Any]


@dataclass
class Record:
    """Everything that happened to one request; good for metrics and for drawing a trace."""

    request_id: str
    num_prompt_tokens: int
    clock: Callable[[], float] = time.monotonic
    submitted_at: float = field(default_factory=time.time)  # seconds since 1970
    state: State = State.QUEUED
    events: list[Event] = field(default_factory=list)
    num_tokens: int = 0
    num_cached_tokens: int = 0  # restored by the prefill instance
    num_shared_pages: int = 0  # that the decode instance had
    num_attempts: int = 0
    raw_bytes: int = 0
    wire_bytes: int = 0
    kv_bytes: int = 0
    reconstruction_error: float | None = None
    error: str | None = None
    busy_s: dict[str, float] = field(default_factory=dict)  # pack, send, verify: whole times, hidden or not
    moments: dict[str, float] = field(default_factory=dict)  # phase -> when it ended, seconds after acceptance
    submitted_s: float = field(init=False)

    def __post_init__(self) -> None:
        self.submitted_s = self.clock()
        self.note("accepted")

    @property
    def has_ended(self) -> bool:
        """Whether it is done, failed or cancelled."""
        return self.state in ENDS

    def note(self, name: str, **detail: Any) -> None:
        """Write an event down."""
        self.events.append(Event(name, self.clock() - self.submitted_s, detail))

    def move(self, state: State, **detail: Any) -> None:
        """Go to another state. Raises HomkvError for a move that is not in the table: an end is final."""
        if state not in MOVES[self.state]:
            raise HomkvError(f"expected a move from {self.state} to {sorted(MOVES[self.state])}, found {state}; a bug")
        self.state = state
        if state is State.QUEUED:  # another attempt: what the last one took becomes waiting
            self.moments = {name: at_s for name, at_s in self.moments.items() if name == "first_token"}
        self.note(state.value, **detail)

    def end_phase(self, phase: str, at_s: float | None = None) -> None:
        """A phase ended now, or at ``at_s`` of our clock."""
        self.moments[phase] = (self.clock() if at_s is None else at_s) - self.submitted_s

    def take_prefill(self, times: PrefillTimes, offset_s: float) -> None:
        """Moments of the prefill instance, whose clock is ``offset_s`` behind ours."""
        parts = {"turn": times.start_s, "prefill": times.computed_s, "pack": times.packed_s, "send": times.sent_s}
        for phase, at_s in parts.items():
            self.end_phase(phase, at_s + offset_s)
        self.busy_s = {"pack": times.pack_busy_s, "send": times.send_busy_s, "verify": times.verify_busy_s}

    def take_decode(self, times: DecodeTimes, offset_s: float) -> None:
        """Moments of the decode instance."""
        self.end_phase("verify", times.verified_s + offset_s)

    @property
    def ttft_s(self) -> float | None:
        """Time to first token."""
        return self.moments.get("first_token")

    @property
    def jct_s(self) -> float | None:
        """Job completion time."""
        return self.moments.get("decode")

    @property
    def tpot_s(self) -> float | None:
        """Mean time per token behind the first; None with fewer than two."""
        if self.num_tokens < 2 or self.ttft_s is None or self.jct_s is None:
            return None
        return (self.jct_s - self.ttft_s) / (self.num_tokens - 1)

    @property
    def elapsed_s(self) -> float:
        """Time until its end, whatever that was, or until now."""
        jct_s = self.jct_s
        return self.clock() - self.submitted_s if jct_s is None else jct_s

    @property
    def prefill(self) -> str | None:
        """Prefill instance of the last attempt."""
        return self._instance(State.PREFILLING)

    @property
    def decode(self) -> str | None:
        """Decode instance of the last attempt."""
        return self._instance(State.RESERVING)

    def _instance(self, state: State) -> str | None:
        found = [event.detail.get("instance") for event in list(self.events) if event.name == state]
        return found[-1] if found else None

    def phases_s(self) -> dict[str, float]:
        """How long each phase kept the request, in order; they sum to its elapsed time.

        Packing, sending and verifying overlap the computation: a phase is only what was left of it when the one before
        had ended. Times of other hosts are mapped to our clock within a round trip.
        """
        out, last, moments = dict.fromkeys(PHASES, 0.0), 0.0, self.moments
        for phase in PHASES[:-1]:
            now = min(max(moments.get(phase, last), last), moments.get("first_token", float("inf")))
            out[phase], last = now - last, now
        live = [OPEN_PHASES[State(e.name)] for e in list(self.events) if e.name in OPEN_PHASES]
        rest = "decode" if "first_token" in moments else live[-1] if live else "queue"
        out[rest] += max(self.elapsed_s - last, 0.0)
        return out

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON. Any thread may ask while the dispatcher's goes on writing."""
        still = copy.copy(self)
        still.events, still.moments, still.busy_s = list(self.events), dict(self.moments), dict(self.busy_s)
        plain = asdict(still)
        del plain["clock"], plain["submitted_s"]
        names = ("ttft_s", "tpot_s", "jct_s", "elapsed_s", "prefill", "decode")
        return plain | {name: getattr(still, name) for name in names} | {"phases_s": still.phases_s()}


class RecordBook:
    """The newest records by request id. Written by one thread, read by any."""

    def __init__(self, max_records: int) -> None:
        self._records: OrderedDict[str, Record] = OrderedDict()
        self._max_records = max_records

    def add(self, record: Record) -> None:
        """Keep a record; the oldest that has ended goes if there are too many."""
        self._records[record.request_id] = record
        if len(self._records) > self._max_records:
            oldest = next((r for r in list(self._records.values()) if r.has_ended), None)
            if oldest is not None:
                del self._records[oldest.request_id]

    def get(self, request_id: str) -> Record | None:
        """The record of a request, None if it is unknown or too old."""
        return self._records.get(request_id)

    def newest(self, count: int) -> list[Record]:
        """The last records, newest first."""
        return list(reversed(list(self._records.values())[-count:]))
