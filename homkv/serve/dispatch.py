"""The dispatcher: chooses instances, follows every request to its end, and tells its owner.

One thread owns all connections and all requests; ``submit`` and ``cancel`` only queue. A request's sink is called in
that thread and must not block.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Self

import msgspec
import zmq

from homkv.errors import HomkvError, TransferError
from homkv.serve.fleet import Address, Fleet, Member
from homkv.serve.ledger import Ledger
from homkv.serve.lifecycle import Record, State
from homkv.serve.links import SERVING
from homkv.serve.logs import get_logger
from homkv.serve.messages import (
    Cancel,
    Done,
    Failed,
    FinishReason,
    PrefillDone,
    Progress,
    Renew,
    Status,
    Ticket,
    Token,
)
from homkv.serve.query import DispatchOptions, Query, Request, Sink
from homkv.transport.endpoint import LinkError, LinkOptions, Receipt, Wake
from homkv.transport.keys import Security

log = get_logger(__name__)
TICK_S, MAX_ATTEMPTS = 0.1, 3


class Dispatcher:
    """Sends requests through ``prefills`` and ``decodes``. Use as a context manager."""

    def __init__(
        self,
        prefills: list[Address],
        decodes: list[Address],
        security: Security,
        *,
        limits: DispatchOptions | None = None,
        options: LinkOptions = SERVING,
        on_end: Callable[[Record, HomkvError | None], None] = lambda record, error: None,
    ) -> None:
        self.limits = limits or DispatchOptions()
        self._ledger = Ledger(self.limits, on_end, lambda member, sequence: self._say(member, Cancel(sequence)))
        self.records = self._ledger.records
        self._fleet = Fleet(prefills, decodes, security, options)
        self._commands: deque[Callable[[], None]] = deque()
        self._wake = Wake()
        self._fleet.poller.register(self._wake.reader, zmq.POLLIN)
        self._lock = threading.Lock()  # between close() and whoever rings
        self._renew_at_s, self._blocked_since_s = 0.0, float("inf")
        self._stop = self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="dispatch", daemon=True)
        self._thread.start()

    # -- any thread --------------------------------------------------------------------------------------------

    @property
    def members(self) -> list[Member]:
        """The instances. Read only."""
        return self._fleet.members

    @property
    def is_running(self) -> bool:
        """Whether it takes requests."""
        return not self._stop

    @property
    def num_queued(self) -> int:
        """Requests that no instance knows of yet."""
        return len(self._ledger.queue)

    @property
    def num_accepted(self) -> int:
        """Requests that have not ended."""
        return self._ledger.num_accepted

    def submit(self, query: Query, sink: Sink, request_id: str | None = None) -> str:
        """Accept a request; returns its id. Raises CapacityError (too many) or TransferError (id in use, closed)."""
        with self._lock:
            if self._stop:
                raise TransferError("expected a running dispatcher, found it closed; make a new one")
            request = self._ledger.open(query, sink, request_id)
            self._commands.append(lambda: self._ledger.accept(request))
            self._wake.ring()
        return request.record.request_id

    def cancel(self, request_id: str, why: str = "cancelled by its client") -> None:
        """End a request; everything it holds is freed. Nothing happens if it has ended."""
        self._command(lambda: self._cancel(request_id, why))

    def finish(self, request_id: str, reason: FinishReason = "stop") -> None:
        """The owner has seen enough: end a request as done, and free what it holds."""
        self._command(lambda: self._finish(request_id, reason))

    def close(self) -> None:
        """Cancel what runs, end the thread, close all connections. Once is enough, twice does no harm."""
        with self._lock:
            self._stop = True
            if not self._is_closed:
                self._wake.ring()
            was_closed, self._is_closed = self._is_closed, True
        if not was_closed:
            self._thread.join()
            self._wake.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _command(self, command: Callable[[], None]) -> None:
        with self._lock:  # close() must not take the bell away in between
            if not self._stop:
                self._commands.append(command)
                self._wake.ring()

    # -- the thread --------------------------------------------------------------------------------------------

    def _run(self) -> None:
        state, error = State.CANCELLED, TransferError("expected to finish, found the gateway stopping; ask again")
        try:
            while not self._stop:
                self._turn()
        except Exception:  # a bug of ours: whoever waits must be told, and health checks must see it
            log.exception("the dispatcher failed")
            state, error = State.FAILED, TransferError("expected a sound dispatcher, found a bug in it; see its log")
        finally:
            with self._lock:
                self._stop = True  # nothing is accepted from here on
            self._take_commands()
            for request in self._ledger.all():
                self._ledger.end(request, state, error)
            self._fleet.close()

    def _turn(self) -> None:
        self._fleet.poller.poll(int(TICK_S * 1000))
        self._wake.drain()
        self._take_commands()
        now_s = time.monotonic()
        for member in self._fleet.members:
            self._visit(member, now_s)
        self._start_queued(now_s)
        self._renew(now_s)
        for request in [r for r in self._ledger.all() if now_s > r.deadline_s]:
            why = f"expected an answer within {self.limits.request_timeout_s} s, found none; is an instance overloaded?"
            self._ledger.end(request, State.FAILED, LinkError("timeout", why))

    def _take_commands(self) -> None:
        while self._commands:
            self._commands.popleft()()

    def _visit(self, member: Member, now_s: float) -> None:
        """Hear what an instance says, or try to reach it."""
        if member.peer is None and not self._fleet.connect(member, now_s):
            return
        try:
            member.ask_status(now_s)
            for message in self._fleet.receive(member):
                self._hear(member, message)
        except TransferError as error:
            self._lose(member, error)

    def _hear(self, member: Member, message: msgspec.Struct) -> None:
        if isinstance(message, Status):
            member.take_status(message)
        elif isinstance(message, Receipt):
            if message.reason:
                raise TransferError(f"expected our messages to be accepted, found: {message.detail}")
        else:
            request = self._ledger.attempt(getattr(message, "request_id", ""), member)
            if request is not None:  # else of an attempt that is over
                self._advance(request, member, message)

    def _advance(self, request: Request, member: Member, message: msgspec.Struct) -> None:
        match message:
            case Ticket():
                self._order(request, message)
            case Progress():
                request.sink(message)
            case Token():
                self._take_token(request, message)
            case PrefillDone():
                self._take_prefill(request, member, message)
            case Done():
                self._take_done(request, member, message)
            case Failed():
                self._attempt_failed(request, message.to_error(), member)

    # -- beginning ---------------------------------------------------------------------------------------------

    def _start_queued(self, now_s: float) -> None:
        """Ask decode instances for room for what waits, oldest first."""
        queue = self._ledger.queue
        while queue:
            waiting, limit = self._ledger.num_reserving(), self.limits.reservations_per_instance
            decode = self._fleet.choose_decode(queue[0].query.kv_cache_dtype, waiting, limit)
            sources = self._fleet.sources
            if decode is None or not sources:
                self._fail_if_stuck(now_s)
                return
            self._blocked_since_s = float("inf")
            request, ask = self._ledger.begin_attempt(decode, sources[0])
            self._say(decode, ask, request)

    def _fail_if_stuck(self, now_s: float) -> None:
        """Fail what waits if, for too long, there has been no instance of a kind at all."""
        missing = self._fleet.missing
        self._blocked_since_s = min(self._blocked_since_s, now_s) if missing else float("inf")
        if now_s - self._blocked_since_s > self.limits.no_instance_timeout_s:
            errors = {m.last_error for m in self._fleet.members if m.last_error}
            error = LinkError(
                "vanished",
                f"expected a {missing[0]} instance within {self.limits.no_instance_timeout_s} s, found none connected "
                f"({'; '.join(sorted(errors))}); start it or look at its log",
            )
            for request in list(self._ledger.queue):
                self._ledger.end(request, State.FAILED, error)

    def _order(self, request: Request, ticket: Ticket) -> None:
        """There is room: let the least loaded prefill instance compute the prompt."""
        if request.record.state != State.RESERVING:
            return
        if (prefill := self._fleet.choose_prefill(request.source)) is None:
            self._attempt_failed(request, LinkError("vanished", "expected a prefill instance, found none left"), None)
            return
        record, order = request.record, request.order(prefill, ticket)
        prefill.load[request.sequence] = len(order.prompt_ids)
        record.num_shared_pages = ticket.first_page
        record.move(State.PREFILLING, instance=prefill.name, epoch=ticket.epoch, first_page=ticket.first_page)
        record.end_phase("wait")
        self._say(prefill, order, request)

    def _say(self, member: Member, message: msgspec.Struct, request: Request | None = None) -> None:
        """Send; a connection that is gone is handled as one that breaks, a message that cannot be sent fails alone."""
        try:
            if member.peer is None:
                raise LinkError("vanished", f"expected a connection to {member.name}, found none")
            member.peer.send(message)
        except LinkError as error:
            self._lose(member, error)
        except HomkvError as error:
            if request is not None:
                self._ledger.end(request, State.FAILED, error)

    # -- going on ----------------------------------------------------------------------------------------------

    def _take_token(self, request: Request, token: Token) -> None:
        record = request.record
        if token.index != len(request.tokens) or request.ticket is None:
            awaited = "a ticket" if request.ticket is None else f"token {len(request.tokens)}"
            why = f"expected {awaited} of {request.sequence}, found token {token.index}; nothing was used"
            self._attempt_failed(request, TransferError(why), request.decode)
            return
        if record.state == State.PREFILLING:
            record.move(State.DECODING)
        if not request.tokens:
            record.end_phase("first_token")
        request.tokens.append(token.choice.token)
        record.num_tokens, request.reason = len(request.tokens), token.reason
        request.sink(token)

    def _take_prefill(self, request: Request, member: Member, done: PrefillDone) -> None:
        record, request.prefill_done = request.record, done
        member.load.pop(request.sequence, None)
        record.take_prefill(done.times, member.clock_offset_s)
        record.raw_bytes += done.raw_bytes
        record.wire_bytes += done.wire_bytes
        record.num_cached_tokens, record.reconstruction_error = done.num_cached_tokens, done.reconstruction_error
        record.note("delivered", wire_bytes=done.wire_bytes, cached_tokens=done.num_cached_tokens)
        self._end_if_complete(request)

    def _take_done(self, request: Request, member: Member, done: Done) -> None:
        if done.num_tokens != len(request.tokens) or request.record.state != State.DECODING:
            state = request.record.state
            why = f"expected {done.num_tokens} tokens, found {len(request.tokens)} and the request {state}; ask again"
            self._attempt_failed(request, TransferError(why), member)
        else:
            request.record.take_decode(done.times, member.clock_offset_s)
            request.done, request.record.kv_bytes = done, done.kv_bytes
            self._end_if_complete(request)

    def _renew(self, now_s: float) -> None:
        """Tell decode instances what is still wanted, well before any lease ends."""
        if now_s < self._renew_at_s:
            return
        held = [r for r in self._ledger.running(State.PREFILLING) if r.ticket is not None]
        self._renew_at_s = now_s + min([r.ticket.lease_s for r in held if r.ticket], default=3.0) / 3
        for member in self._fleet.decodes:
            names = [r.sequence for r in held if r.decode is member]
            if names:
                self._say(member, Renew(names))

    # -- ending ------------------------------------------------------------------------------------------------

    def _end_if_complete(self, request: Request) -> None:
        """Done when the answer is whole and, unless its instance vanished, the prefill has reported."""
        if request.done is not None and (request.prefill is None or request.prefill_done is not None):
            self._ledger.end(request, State.DONE, None, request.done.reason)

    def _finish(self, request_id: str, reason: FinishReason) -> None:
        if (request := self._ledger.get(request_id)) is not None and request.record.state == State.DECODING:
            self._ledger.end(request, State.DONE, None, reason)

    def _cancel(self, request_id: str, why: str) -> None:
        request = self._ledger.get(request_id)
        if request is not None:
            error = TransferError(f"expected {request_id!r} to finish, found it {why}; ask again")
            self._ledger.end(request, State.CANCELLED, error)

    def _lose(self, member: Member, error: TransferError) -> None:
        """A connection broke: what depends on it fails or is tried again, everything else goes on."""
        log.warning("lost instance", instance=member.name, error=str(error))
        self._fleet.lose(member, error)
        for request in self._ledger.running():
            if request.decode is member:
                self._attempt_failed(request, error, member)
            elif request.prefill is member and request.record.state == State.DECODING:
                request.prefill = None  # its work is done
                self._end_if_complete(request)
            elif request.prefill is member and request.prefill_done is None:
                self._attempt_failed(request, error, member)
        member.load.clear()

    def _attempt_failed(self, request: Request, error: HomkvError, member: Member | None) -> None:
        """Instances failed a request: the policy says whether it is tried again."""
        record = request.record
        record.note("attempt_failed", instance=member.name if member else None, error=str(error))
        may_help = isinstance(error, TransferError) and record.num_attempts < MAX_ATTEMPTS and request.reason is None
        if self.limits.policy == "fail" or not may_help:
            self._ledger.end(request, State.FAILED, error)
            return
        log.warning("recomputes", request_id=record.request_id, attempt=record.num_attempts, error=str(error))
        self._ledger.requeue(request)
