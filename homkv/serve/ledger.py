"""Every accepted request until its one end: in the queue, or given to instances. Nothing is sent from here."""

import secrets
import threading
from collections import Counter, deque
from collections.abc import Callable

from homkv.errors import CapacityError, HomkvError, TransferError
from homkv.serve.fleet import Member
from homkv.serve.lifecycle import Record, RecordBook, State
from homkv.serve.messages import FinishReason, Reserve
from homkv.serve.query import DispatchOptions, Ended, Query, Request, Sink


class Ledger:
    """Belongs to the dispatcher's thread, but for :meth:`open` and what only reads.

    ``on_end`` is called at each request's end, before its owner is told. ``forget(member, sequence)`` is called where
    an instance still holds something of an attempt that is over.
    """

    def __init__(
        self,
        limits: DispatchOptions,
        on_end: Callable[[Record, HomkvError | None], None],
        forget: Callable[[Member, str], None],
    ) -> None:
        self.records = RecordBook(limits.max_records)
        self.queue: deque[Request] = deque()  # accepted, not given to instances
        self.num_accepted = 0  # and not ended; guarded by the lock
        self._limits, self._on_end, self._forget = limits, on_end, forget
        self._running: dict[str, Request] = {}  # by sequence
        self._by_id: dict[str, Request] = {}
        self._lock = threading.Lock()

    # -- beginning ---------------------------------------------------------------------------------------------

    def open(self, query: Query, sink: Sink, request_id: str | None) -> Request:
        """A new request. From any thread. Raises CapacityError (too many) or TransferError (id in use)."""
        request_id = request_id or secrets.token_hex(12)
        record = Record(request_id, len(query.prompt_ids))
        with self._lock:
            if (known := self.records.get(request_id)) is not None and not known.has_ended:
                raise TransferError(f"expected a new request id, found {request_id!r} in use; choose another")
            if self.num_accepted >= self._limits.max_requests:
                limit = self._limits.max_requests
                raise CapacityError(f"expected fewer than {limit} requests at a time, found more; try again later")
            self.records.add(record)
            self.num_accepted += 1
        return Request(query, sink, record, record.submitted_s + self._limits.request_timeout_s)

    def accept(self, request: Request) -> None:
        """Put an opened request at the end of the queue."""
        self._by_id[request.record.request_id] = request
        self.queue.append(request)

    def begin_attempt(self, decode: Member, source: str) -> tuple[Request, Reserve]:
        """Give the queue's first request to a decode instance; what has to be asked of that."""
        request = self.queue.popleft()
        ask = request.begin_attempt(decode, source)
        self._running[request.sequence] = request
        decode.load[request.sequence] = len(ask.prompt_ids) + ask.max_new_tokens
        request.record.move(State.RESERVING, instance=decode.name, attempt=request.record.num_attempts)
        request.record.end_phase("queue")
        return request, ask

    # -- looking up --------------------------------------------------------------------------------------------

    def get(self, request_id: str) -> Request | None:
        """A request that has not ended."""
        return self._by_id.get(request_id)

    def attempt(self, sequence: str, member: Member) -> Request | None:
        """The request whose present attempt has this name and runs at this instance."""
        request = self._running.get(sequence)
        return request if request is not None and member in (request.prefill, request.decode) else None

    def all(self) -> list[Request]:
        """Requests that have not ended."""
        return list(self._by_id.values())

    def running(self, state: State | None = None) -> list[Request]:
        """Requests that instances know of, in one state or in all."""
        return [r for r in self._running.values() if state in (None, r.record.state)]

    def num_reserving(self) -> Counter[Member | None]:
        """How many requests wait for room, by decode instance."""
        return Counter(r.decode for r in self.running(State.RESERVING))

    # -- ending ------------------------------------------------------------------------------------------------

    def requeue(self, request: Request) -> None:
        """An attempt is over, the request is not: it comes next."""
        self._leave(request)
        request.record.move(State.QUEUED)
        self.queue.appendleft(request)

    def _leave(self, request: Request) -> None:
        """Both instances forget this attempt."""
        sequence, members = request.sequence, (request.prefill, request.decode)
        self._running.pop(sequence, None)
        request.prefill = request.decode = None
        for member in members:
            if member is not None and member.load.pop(sequence, None) is not None and member.peer is not None:
                self._forget(member, sequence)

    def end(self, request: Request, state: State, error: HomkvError | None, reason: FinishReason | None = None) -> None:
        """The one place where a request ends: freed on both sides, recorded, and its owner told."""
        record = request.record
        if record.has_ended:
            return
        if state == State.FAILED and request.reason is not None:  # every token was told: what failed came behind them
            state, error, reason = State.DONE, None, request.reason
        if request.done is not None and request.decode is not None:
            request.decode.load.pop(request.sequence, None)  # it has freed everything by itself
        record.error = None if error is None else f"{type(error).__name__}: {error}"
        record.move(state, reason=reason, error=record.error)
        record.end_phase("decode")
        if request in self.queue:
            self.queue.remove(request)
        self._leave(request)
        self._by_id.pop(record.request_id, None)
        with self._lock:
            self.num_accepted -= 1
        try:
            self._on_end(record, error)
        finally:  # a bug in there ends the dispatcher, but not before this owner is told
            request.sink(Ended(record, error, reason, request.prefill_done, request.done))
