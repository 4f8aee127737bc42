"""Room at a decode instance: who waits for it, who has it, and that it is freed. Nothing here is sent or computed."""

import itertools
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from homkv.errors import CapacityError, HomkvError, TransferError
from homkv.models import LoadedModel
from homkv.serve.engine import Engine, plan_sequence
from homkv.serve.inbox import check_reserve
from homkv.serve.messages import Reserve
from homkv.serve.prefix import page_keys
from homkv.transport.assemble import SequenceAssembler
from homkv.transport.lease import Lease

MAX_WAITING = 4096  # reservations without room


@dataclass(eq=False)
class DecodeRequest:
    """One request from its room to its last token."""

    client: bytes
    ask: Reserve
    engine: Engine
    seq: int
    keys: list[bytes]  # of the prompt's pages
    assembler: SequenceAssembler
    lease: Lease  # until the next sign of life, or the first token behind the last layer
    sender: bytes | None = None  # the connection whose frame came first; no other may feed this request
    verified_s: float = 0.0
    first_token_s: float = 0.0
    overhead_s: float = 0.0  # of the engine, at the first token
    next_token: int = 0
    num_sent: int = 0

    @property
    def running(self) -> bool:
        """Whether everything has arrived: its KV is decoded, and the prefill instance may go."""
        return self.num_sent > 0

    @property
    def epoch(self) -> int:
        """Of its reservation."""
        return self.assembler.plan.epoch

    @property
    def lacks(self) -> str:
        """What has not arrived, for errors."""
        missing = sorted(self.assembler.missing)
        return f"layers {', '.join(map(str, missing))} missing" if missing else "the first token missing"


@dataclass(frozen=True)
class LeaseTerms:
    """Of a Lease on room that waits for KV; see there."""

    lease_s: float = 30.0
    max_lease_s: float = 600.0
    clock: Callable[[], float] = time.monotonic

    def start(self) -> Lease:
        """A lease from now on."""
        return Lease(self.lease_s, self.max_lease_s, self.clock)

    def ended_after_s(self, lease: Lease) -> float:
        """Which of the two limits it met."""
        return self.max_lease_s if lease.expires_at_s == lease.ends_at_s else self.lease_s


class Rooms:
    """Reservations that wait, in order, and requests that have room in one of the ``engines``, by id."""

    def __init__(
        self, loaded: LoadedModel, engines: Mapping[str, Engine], terms: LeaseTerms, share_prefixes: bool
    ) -> None:
        self.terms, self.waiting = terms, deque[tuple[bytes, Reserve]]()
        self._loaded, self._engines, self._share_prefixes = loaded, engines, share_prefixes
        self._given: dict[str, DecodeRequest] = {}
        self._may_fit = False  # something came or went since the last look at those who wait
        # A restarted instance starts elsewhere, so frames meant for its predecessor never match.
        self._epochs = itertools.count(secrets.randbits(48) << 8)

    def __len__(self) -> int:
        return len(self._given) + len(self.waiting)

    def __iter__(self) -> Iterator[DecodeRequest]:
        """Requests that have room, as they are now."""
        return iter(list(self._given.values()))

    def get(self, request_id: str) -> DecodeRequest | None:
        """The request of this id that has room."""
        return self._given.get(request_id)

    def running(self, engine: Engine | None = None) -> list[DecodeRequest]:
        """Requests that are decoded, of one engine or of all."""
        return [r for r in self._given.values() if r.running and engine in (None, r.engine)]

    def expired(self) -> list[DecodeRequest]:
        """Requests for which nothing came in time."""
        return [r for r in self._given.values() if not r.running and r.lease.expired]

    def ask(self, client: bytes, ask: Reserve) -> None:
        """Let a reservation wait its turn. Raises HomkvError for one that can never have room."""
        if ask.request_id in self._given or any(ask.request_id == w.request_id for _, w in self.waiting):
            raise TransferError(f"expected a new request id, found {ask.request_id!r} in use; choose another")
        check_reserve(ask, self._engines, self._loaded)
        if len(self.waiting) >= MAX_WAITING:
            raise CapacityError(f"expected fewer than {MAX_WAITING} waiting requests, found more; try again later")
        self.waiting.append((client, ask))
        self._may_fit = True

    def give(self) -> Iterator[tuple[bytes, Reserve, DecodeRequest | HomkvError]]:
        """Give room to those who wait, in order; of each format, the first that does not fit stops the others."""
        if not self._may_fit:
            return
        self._may_fit = False
        full: set[Engine] = set()
        for client, ask in list(self.waiting):
            engine = self._engines[ask.kv_cache_dtype]
            if engine in full:
                continue
            result: DecodeRequest | HomkvError
            try:
                result = self._given[ask.request_id] = self._open(client, ask, engine)
            except CapacityError:
                full.add(engine)
                continue
            except HomkvError as error:
                result = error
            self.waiting.remove((client, ask))
            yield client, ask, result

    def _open(self, client: bytes, ask: Reserve, engine: Engine) -> DecodeRequest:
        """Set a request's room aside. Raises CapacityError without changing anything."""
        root = f"{self._loaded.fingerprint}/{engine.codec.layout_id}/{ask.source}"
        keys = page_keys(root, engine.codec, ask.prompt_ids) if self._share_prefixes else []
        num_tokens = len(ask.prompt_ids)
        seq, first_page = engine.reserve(num_tokens + ask.max_new_tokens, keys)
        plan = plan_sequence(
            self._loaded,
            engine.codec,
            ask.request_id,
            next(self._epochs),
            num_tokens,
            source=ask.source,
            first_page=first_page,
        )
        return DecodeRequest(client, ask, engine, seq, keys, SequenceAssembler(plan), self.terms.start())

    def renew(self, client: bytes, request_ids: Iterable[str]) -> None:
        """Start the leases of a client's requests again."""
        for request_id in request_ids:
            if (request := self._given.get(request_id)) is not None and request.client == client:
                request.lease.renew()

    def forget(self, client: bytes, request_id: str | None = None) -> list[Reserve]:
        """Remove what a client has waiting, or one of it."""
        gone = [w for w in self.waiting if w[0] == client and request_id in (None, w[1].request_id)]
        self.waiting = deque(w for w in self.waiting if w not in gone)
        return [ask for _, ask in gone]

    def close(self, request: DecodeRequest) -> None:
        """Free everything a request holds; the only place that does."""
        del self._given[request.ask.request_id]
        request.engine.free(request.seq)
        self._may_fit = True
