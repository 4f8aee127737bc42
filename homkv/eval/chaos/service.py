"""A small service that faults are injected into: one prefill and one decode instance behind faulty links."""

import itertools
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, Self

import msgspec

from homkv.errors import TransferError
from homkv.models import LoadedModel, load_model
from homkv.serve.dispatch import Dispatcher
from homkv.serve.fleet import Address
from homkv.serve.links import SERVING
from homkv.serve.messages import AskStatus, Cancel, FromDecode, FromPrefill, Reserve, Status, Ticket
from homkv.serve.query import DispatchOptions, Policy
from homkv.testing.faults import Where
from homkv.testing.models import random_ids, save_tiny_model, tiny_model
from homkv.testing.names import PlainNames, SealedNames
from homkv.testing.proxy import FaultyLink
from homkv.transport.endpoint import LinkOptions
from homkv.transport.keys import Security
from homkv.transport.link import Peer

Service = Literal["threads", "keys", "processes"]
KV_CACHE_DTYPE = "balanced"
MAX_TOKENS = 1792
TINY = "tiny"


@dataclass(frozen=True)
class Subject:
    """What is served. ``source``: where a process loads it from.

    ``patience``: seconds in which an undisturbed request is answered; every limit of time is a multiple of it.
    """

    loaded: LoadedModel
    source: str
    patience: float = 1.0
    # A layer of the tiny model takes a third of a second, so that faults find transfers under way.
    link_gbps: float = 0.0006

    @property
    def options(self) -> LinkOptions:
        """Of the dispatcher's links, and of instances in threads."""
        p = self.patience
        return replace(SERVING, peer_timeout_s=1.5 * p, ack_timeout_s=2.0 * p, linger_s=0.2)

    @property
    def lease_s(self) -> float:
        """Without a sign of life."""
        return 1.0 * self.patience

    @property
    def request_timeout_s(self) -> float:
        """Of the dispatcher; leases end then as well."""
        return 6.0 * self.patience

    def patient(self, clean_s: float) -> "Subject":
        """The same on a machine that takes ``clean_s`` for an undisturbed request; never less patient than now."""
        return replace(self, patience=max(self.patience, clean_s))


@contextmanager
def open_subject(model: str) -> Iterator[Subject]:
    """The tiny model for "tiny", else what ``load_model`` finds."""
    if model != TINY:
        yield Subject(load_model(model), model, link_gbps=0.01)
        return
    with TemporaryDirectory(prefix="homkv-tiny-") as folder:
        save_tiny_model(Path(folder))
        yield Subject(tiny_model(), folder)


class Cell(ABC):
    """One prefill and one decode instance behind faulty links, and a dispatcher. A context manager.

    Belongs to one thread, but for :meth:`kill`, :meth:`terminate`, :meth:`pause` and :meth:`jump`.
    """

    def __init__(
        self, subject: Subject, reached: dict[Where, Address], security: Security, policy: Policy, start_s: float = 0.0
    ) -> None:
        """``start_s``: how long an instance may take to start again."""
        self.subject, self._reached, self._security = subject, reached, security
        self.request_timeout_s = subject.request_timeout_s + start_s
        self.links: dict[Where, FaultyLink] = {
            where: FaultyLink(address.endpoint, PlainNames if security.insecure else partial(SealedNames, where))
            for where, address in reached.items()
        }
        limits = DispatchOptions(
            policy,
            request_timeout_s=self.request_timeout_s,
            no_instance_timeout_s=4.0 * subject.patience + start_s,
        )
        prefill, decode = ([Address(self.links[w].endpoint, reached[w].key)] for w in ("prefill", "decode"))
        self.dispatcher = Dispatcher(prefill, decode, security, limits=limits, options=subject.options)
        self._witnesses: dict[Where, Peer] = {}
        self._numbers = itertools.count()

    # -- what is held and what was noticed ---------------------------------------------------------------------

    def look(self, where: Where) -> Status:
        """Ask an instance how it is, beside its faulty link. Raises TransferError if it does not answer."""
        peer = self._witnesses.pop(where, None) or self._reach(where)
        try:
            peer.send(AskStatus(next(self._numbers)))
            status = peer.recv(self.subject.options.peer_timeout_s)
        except TransferError:
            peer.close()
            raise
        assert isinstance(status, Status)  # nothing else was asked for
        self._witnesses[where] = peer
        return status

    def _reach(self, where: Where) -> Peer:
        messages, address = FromPrefill if where == "prefill" else FromDecode, self._reached[where]
        return Peer(address.endpoint, messages, self._security, address.key, self.subject.options)

    def held(self) -> dict[str, float]:
        """What is not free, by name; empty if nothing is held anywhere. Page blocks are ``blocks``."""
        try:
            prefill, decode = self.look("prefill").gauges, self.look("decode").gauges
        except TransferError:
            return {"not reachable": 1}
        found = {
            "prompts": sum(prefill[f"requests_{state}"] for state in ("waiting", "computing", "sending")),
            "requests": sum(decode[f"requests_{state}"] for state in ("waiting", "receiving", "running")),
            "blocks": decode["blocks_total"] - decode["blocks_free"],
            "accepted": self.dispatcher.num_accepted,
            "load": sum(len(member.load) for member in self.dispatcher.members),
        }
        return {name: count for name, count in found.items() if count}

    def noticed(self) -> Counter[str]:
        """How often something was refused, failed, expired or lost so far, by name."""
        counts: Counter[str] = Counter()
        for member in self.dispatcher.members:
            counts[f"lost {member.role}"], counts[f"restarts {member.role}"] = member.num_lost, member.num_restarts
        for where in self.links:
            try:
                counters = self.look(where).counters
            except TransferError:
                continue  # its restart, or its loss, is counted above
            named = ("refused.", "failed.", "leases_expired")
            counts.update({f"{where} {name}": int(n) for name, n in counters.items() if name.startswith(named)})
        return counts

    @property
    def is_connected(self) -> bool:
        """Whether the dispatcher has heard of both instances."""
        return self.dispatcher.is_running and all(member.status is not None for member in self.dispatcher.members)

    @abstractmethod
    def check(self) -> None:
        """Raise unless both instances run and, as far as can be seen from here, their books are intact."""

    # -- faults of processes -----------------------------------------------------------------------------------

    @abstractmethod
    def kill(self, where: Where) -> None:
        """An instance ends without a word."""

    def terminate(self, where: Where) -> None:
        """An instance is asked to stop at once."""
        self.kill(where)

    @abstractmethod
    def revive(self, where: Where) -> None:
        """Another process in the place of one that ended: it knows nothing of before."""

    @abstractmethod
    def pause(self, where: Where) -> None:
        """An instance stops computing, answering and sending."""

    @abstractmethod
    def resume(self, where: Where) -> None:
        """It goes on."""

    @abstractmethod
    def jump(self, seconds: float) -> None:
        """The clock of the decode instance jumps: that of its leases, or of the whole process."""

    def fill_pool(self) -> Peer:
        """Reserve all room for somebody who sends nothing. Close what is returned, after :meth:`empty_pool`."""
        hog = self._reach("decode")
        hog.send(Reserve("hog", KV_CACHE_DTYPE, random_ids(MAX_TOKENS - 8, seed=1), 8))
        said: msgspec.Struct = hog.recv(2.0)
        if not isinstance(said, Ticket):
            raise TransferError(f"expected a ticket for all room, found {said}")
        return hog

    def empty_pool(self, hog: Peer) -> None:
        """Give back what :meth:`fill_pool` took."""
        hog.send(Cancel("hog"))
        hog.recv(2.0)
        hog.close()

    def close(self) -> None:
        """End everything but the instances."""
        self.dispatcher.close()
        for peer in self._witnesses.values():
            peer.close()
        for link in self.links.values():
            link.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
