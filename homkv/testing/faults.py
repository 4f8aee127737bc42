"""Faults that a test can inject into a running service: what, where, at which message. Plans follow from a seed.

>>> from homkv.testing.faults import Fault
>>> from homkv.testing.proxy import FaultyLink
>>> with FaultyLink(decode_endpoint) as link:        # doctest: +SKIP
...     link.arm(Fault("flip", "decode", "frame", nth=1))
...     ...                                          # peers connect to link.endpoint instead

A fault waits for the ``nth`` message of one name on one link. Faults of a link change that message or what follows it,
and homkv.testing.proxy applies them. Faults of a process happen when the message passes; whoever owns the process
applies them (homkv.eval.chaos).
"""

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from homkv.errors import UnsupportedError

Where = Literal["prefill", "decode"]  # in front of which instance
LinkKind = Literal["delay", "drop", "duplicate", "reorder", "truncate", "flip", "cut", "half_open", "stall"]
ProcessKind = Literal["kill", "stop", "restart", "full_pool", "slow_client", "clock_jump"]
Kind = LinkKind | ProcessKind
LINK_KINDS: tuple[LinkKind, ...] = get_args(LinkKind)
PROCESS_KINDS: tuple[ProcessKind, ...] = get_args(ProcessKind)
KINDS: tuple[Kind, ...] = (*LINK_KINDS, *PROCESS_KINDS)

# Every message of the protocol, by the listener whose link it crosses (docs/wire.md). "frame-receipt" is a receipt on a
# connection that has carried a frame, "receipt" one on a connection of the dispatcher.
MESSAGES: dict[Where, tuple[str, ...]] = {
    "prefill": ("Prefill", "Progress", "PrefillDone", "Cancel", "Failed", "AskStatus", "Status", "receipt"),
    "decode": (
        "Reserve",
        "Ticket",
        "Renew",
        "frame",
        "frame-receipt",
        "Finish",
        "Token",
        "Done",
        "Cancel",
        "Failed",
        "AskStatus",
        "Status",
        "receipt",
    ),
}
# Faults of the pool and of the lease clock exist where pages are held; a slow client is slow to take its tokens.
_ONLY_AT: dict[str, dict[Where, tuple[str, ...]]] = {
    "full_pool": {"decode": ("Reserve",)},  # full when it comes
    "clock_jump": {"decode": ("Ticket", "frame", "frame-receipt", "Finish", "Token", "Done")},
    "slow_client": {"decode": ("Token",)},
}
# Never the first one on its link: those before belong to other messages of the same request.
_MANY = {"frame": 2, "frame-receipt": 2, "Token": 6, "Progress": 2, "receipt": 3, "Status": 2, "AskStatus": 2}


@dataclass(frozen=True)
class Fault:
    """One fault: ``kind`` happens at the ``nth`` (from 0) ``message`` on the link of instance ``where``.

    ``seed`` chooses the damaged bit and the length that is kept. ``duration_s``: of delays, stalls, stops and slow
    clients; how long a reordered message waits for a later one at most; how far a clock jumps.

    Raises UnsupportedError for a combination that does not exist.
    """

    kind: Kind
    where: Where
    message: str
    nth: int = 0
    seed: int = 0
    duration_s: float = 0.3

    def __post_init__(self) -> None:
        if self.kind not in KINDS or self.message not in messages_for(self.kind, self.where):
            raise UnsupportedError(
                f"expected a fault of {', '.join(KINDS)} at a message of its link, found "
                f"{self.kind!r} at {self.where}:{self.message}; see homkv.testing.faults.MESSAGES"
            )
        if self.nth < 0 or self.duration_s < 0:
            raise UnsupportedError(f"expected nth and duration_s from 0 on, found {self.nth} and {self.duration_s}")

    @property
    def is_of_link(self) -> bool:
        """Whether a proxy applies it."""
        return self.kind in LINK_KINDS

    def damage(self, data: bytes) -> bytes:
        """``data`` as this fault leaves it: one bit flipped, or a shorter piece of it; other kinds change nothing."""
        draw = random.Random(self.seed)
        if not data or self.kind not in ("flip", "truncate"):
            return data
        if self.kind == "truncate":
            return data[: draw.randrange(len(data))]
        damaged = bytearray(data)
        damaged[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        return bytes(damaged)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def messages_for(kind: str, where: str) -> tuple[str, ...]:
    """Messages at which a kind of fault can happen on the link of an instance; none for unknown words."""
    if kind in _ONLY_AT:
        return next((names for place, names in _ONLY_AT[kind].items() if place == where), ())
    return next((names for place, names in MESSAGES.items() if place == where), ())


def combinations(kinds: Sequence[Kind] = ()) -> list[tuple[Kind, Where, str]]:
    """Every kind, or each of ``kinds``, at every message. Raises UnsupportedError for a kind that does not exist."""
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise UnsupportedError(f"expected faults of {', '.join(KINDS)}, found {', '.join(unknown)}")
    return [(kind, where, name) for kind in kinds or KINDS for where in MESSAGES for name in messages_for(kind, where)]


def random_plan(seed: int, count: int, kinds: Sequence[Kind] = ()) -> list[Fault]:
    """``count`` faults that follow from ``seed``: all combinations in random order, then all again, and so on."""
    draw = random.Random(seed)
    plan: list[Fault] = []
    while len(plan) < count:
        everything = combinations(kinds)
        draw.shuffle(everything)
        for kind, where, message in everything[: count - len(plan)]:
            nth = draw.randrange(_MANY.get(message, 1))
            plan.append(Fault(kind, where, message, nth, draw.randrange(2**31), _duration_s(kind, draw)))
    return plan


def _duration_s(kind: Kind, draw: random.Random) -> float:
    """Short against every time limit of the service, or long against them: both must be survived."""
    if kind == "clock_jump":
        return round(draw.choice((30.0, 3600.0)), 3)
    return round(draw.choice((0.05, 0.3, 2.0)) if kind in ("stall", "stop") else draw.uniform(0.05, 0.4), 3)
