"""The instances that a dispatcher knows: connections that come back by themselves, load, clocks."""

import itertools
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec
import zmq

from homkv.errors import TransferError
from homkv.serve.logs import get_logger
from homkv.serve.messages import AskStatus, FromDecode, FromPrefill, Status
from homkv.transport.endpoint import LinkError, LinkOptions
from homkv.transport.keys import Security
from homkv.transport.link import Peer

log = get_logger(__name__)
Role = Literal["prefill", "decode"]
STATUS_EVERY_S = 1.0
FIRST_RETRY_S, LAST_RETRY_S = 0.1, 5.0


@dataclass(frozen=True)
class Address:
    """Where an instance listens, and its public key (None: without encryption)."""

    endpoint: str
    key: str | None


@dataclass(eq=False)
class Member:
    """One instance as the dispatcher sees it."""

    role: Role
    address: Address
    peer: Peer | None = None
    status: Status | None = None
    load: dict[str, int] = field(default_factory=dict)  # sequence -> tokens that it costs
    clock_offset_s: float = 0.0  # add to its times to get ours
    num_lost: int = 0  # connections
    num_restarts: int = 0
    last_error: str = ""
    _round_trip_s: float = float("inf")
    _asked: dict[int, float] = field(default_factory=dict)
    _numbers: Iterator[int] = field(default_factory=itertools.count)
    _ask_at_s: float = 0.0
    _retry_at_s: float = 0.0
    _retry_s: float = FIRST_RETRY_S
    _connecting: "Future[Peer] | None" = None
    _incarnation: str = ""

    @property
    def name(self) -> str:
        """For logs and metrics."""
        return f"{self.role}@{self.address.endpoint.removeprefix('tcp://')}"

    @property
    def num_tokens(self) -> int:
        """Tokens of the requests that it was given and has not finished."""
        return sum(self.load.values())

    @property
    def round_trip_s(self) -> float | None:
        """Shortest time in which this incarnation has answered; None before the first answer."""
        return None if self._round_trip_s == float("inf") else self._round_trip_s

    def offers(self, kv_cache_dtype: str) -> bool:
        """Whether it holds this format, as far as it has said."""
        return self.status is not None and kv_cache_dtype in self.status.formats

    def ask_status(self, now_s: float) -> None:
        """Ask how it is, once in a while. Raises LinkError."""
        if self.peer is not None and now_s >= self._ask_at_s:
            self._ask_at_s = now_s + STATUS_EVERY_S
            number = next(self._numbers) % 2**31
            self._asked = {number: now_s}  # an answer to an older question is of no use
            self.peer.send(AskStatus(number))

    def take_status(self, status: Status) -> None:
        """Learn its state, its clock, and whether it is another process than before."""
        now_s = time.monotonic()
        if self._incarnation and status.incarnation != self._incarnation:
            self.num_restarts += 1
            log.warning("instance restarted", instance=self.name, incarnation=status.incarnation)
        if status.incarnation != self._incarnation:
            self._incarnation, self._round_trip_s = status.incarnation, float("inf")
        self.status = status
        asked_s = self._asked.pop(status.number, None)
        if asked_s is not None:
            self._learn_clock((asked_s + now_s) / 2 - status.now_s, now_s - asked_s)

    def _learn_clock(self, offset_s: float, round_trip_s: float) -> None:
        """The quickest answer is the best, unless what it said cannot be so any more: then its clock has jumped."""
        has_jumped = abs(offset_s - self.clock_offset_s) > round_trip_s + self._round_trip_s
        if round_trip_s <= self._round_trip_s or has_jumped:
            self._round_trip_s = round_trip_s
            self.clock_offset_s = 0.0 if abs(offset_s) <= round_trip_s else offset_s  # one host: one clock


class Fleet:
    """All members. Belongs to the dispatcher's thread; only making a connection happens elsewhere."""

    def __init__(
        self, prefills: list[Address], decodes: list[Address], security: Security, options: LinkOptions
    ) -> None:
        self.prefills = [Member("prefill", address) for address in prefills]
        self.decodes = [Member("decode", address) for address in decodes]
        self._security, self._options = security, options
        self._connectors = ThreadPoolExecutor(8, thread_name_prefix="connect")
        self.poller = zmq.Poller()

    @property
    def members(self) -> list[Member]:
        """Prefill instances, then decode instances."""
        return self.prefills + self.decodes

    @property
    def missing(self) -> list[Role]:
        """Roles of which no instance is there."""
        groups: dict[Role, list[Member]] = {"prefill": self.prefills, "decode": self.decodes}
        return [role for role, group in groups.items() if not any(m.status for m in group)]

    @property
    def sources(self) -> list[str]:
        """Source formats of the prefill instances that are there; they should all have one."""
        return sorted({m.status.formats[0] for m in self.prefills if m.status})

    def choose_prefill(self, source: str) -> Member | None:
        """The least loaded prefill instance that keeps KV in ``source``; None if there is none."""
        there = [m for m in self.prefills if m.status and m.status.formats[0] == source]
        return min(there, key=lambda m: m.num_tokens, default=None)

    def choose_decode(self, kv_cache_dtype: str, waiting: "Counter[Member | None]", limit: int) -> Member | None:
        """The least loaded decode instance for a format where fewer than ``limit`` are ``waiting`` for room."""
        there = [m for m in self.decodes if m.status]
        offering = [m for m in there if m.offers(kv_cache_dtype)]  # none: let one say so itself
        return min((m for m in offering or there if waiting[m] < limit), key=lambda m: m.num_tokens, default=None)

    def connect(self, member: Member, now_s: float) -> bool:
        """Bring a connection about without waiting for it; whether it has just been made."""
        if member._connecting is None:
            if now_s >= member._retry_at_s:
                member._connecting = self._connectors.submit(self._open, member)
            return False
        if not member._connecting.done():
            return False
        future, member._connecting = member._connecting, None
        try:
            member.peer = future.result()
        except TransferError as error:
            self._retry_later(member, str(error))
            return False
        member._retry_s, member._ask_at_s, member.last_error = FIRST_RETRY_S, 0.0, ""
        for readable in member.peer.readable:
            self.poller.register(readable, zmq.POLLIN)
        log.info("connected", instance=member.name)
        return True

    def _open(self, member: Member) -> Peer:
        messages: Any = FromPrefill if member.role == "prefill" else FromDecode
        return Peer(member.address.endpoint, messages, self._security, member.address.key, self._options)

    def _retry_later(self, member: Member, why: str) -> None:
        if why != member.last_error:
            log.warning("cannot reach instance", instance=member.name, error=why)
        member.last_error = why
        member._retry_at_s = time.monotonic() + member._retry_s
        member._retry_s = min(2 * member._retry_s, LAST_RETRY_S)

    def lose(self, member: Member, error: TransferError) -> None:
        """A connection broke: close it and try again soon."""
        if member.peer is not None:
            for readable in member.peer.readable:
                self.poller.unregister(readable)
            member.peer.close()
        member.peer, member.status = None, None
        member.num_lost += 1
        self._retry_later(member, str(error))

    def receive(self, member: Member) -> list[msgspec.Struct]:
        """What a member said. Raises LinkError or TransferError if the connection is of no more use."""
        if member.peer is None:
            raise LinkError("closed", f"expected a connection to {member.name}, found none")
        return member.peer.poll(0.0)

    def close(self) -> None:
        """Close all connections."""
        self._connectors.shutdown(cancel_futures=True)
        for member in self.members:
            made = member._connecting  # finished or cancelled: shutdown() has waited
            if made is not None and not made.cancelled() and made.exception() is None:
                member.peer = made.result()
            if member.peer is not None:
                member.peer.close()
                member.peer = None
