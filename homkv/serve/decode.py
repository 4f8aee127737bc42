"""The decode instance: gives out room, receives and verifies pages, attends on them, streams tokens.

One thread, one loop: whatever arrived is handled, then every running sequence takes one step. A token is only
produced from KV whose digest, request, epoch, format and model were checked, layer by layer, on arrival. Nothing a
peer sends ends the loop; at worst its own request fails.
"""

import itertools
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch

from homkv.errors import CapacityError, HomkvError, TransferError
from homkv.generate.loop import attention_of
from homkv.models import LoadedModel
from homkv.serve.choose import choose
from homkv.serve.engine import Engine, plan_sequence
from homkv.serve.exact import make_engine
from homkv.serve.inbox import check_reserve, content_of
from homkv.serve.links import SERVING
from homkv.serve.logs import get_logger
from homkv.serve.messages import (
    AskStatus,
    Cancel,
    Choice,
    DecodeTimes,
    Done,
    Failed,
    Finish,
    FinishReason,
    Renew,
    Reserve,
    Ticket,
    ToDecode,
    Token,
)
from homkv.serve.prefix import page_keys
from homkv.serve.status import StatusBoard
from homkv.transport.assemble import SequenceAssembler
from homkv.transport.endpoint import LinkOptions
from homkv.transport.keys import Security
from homkv.transport.lease import Lease
from homkv.transport.link import Arrival, Event, Listener, Message
from homkv.transport.wire import FrameError

log = get_logger(__name__)
MAX_ROUNDS = 4  # of polling before a decode step, so that a busy link cannot starve the running sequences
MAX_WAITING = 4096  # reservations without room


@dataclass
class _Request:
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
    def lacks(self) -> str:
        missing = sorted(self.assembler.missing)
        return f"layers {', '.join(map(str, missing))} missing" if missing else "the first token missing"


class DecodeInstance:
    """Decodes on pages that prefill instances send. ``formats``: names of ``--kv-cache-dtype`` that it accepts.

    ``max_tokens``: room for KV, in tokens, per format. ``lease_s``, ``max_lease_s``, ``clock``: of a Lease on room that
    waits for KV. Raises FormatError or UnsupportedError for a format that this model cannot use.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        formats: list[str],
        endpoint: str,
        security: Security,
        *,
        max_tokens: int,
        max_sequences: int = 64,
        share_prefixes: bool = True,
        lease_s: float = 30.0,
        max_lease_s: float = 600.0,
        options: LinkOptions = SERVING,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.loaded, self.lease_s, self.max_lease_s, self._clock = loaded, lease_s, max_lease_s, clock
        self.share_prefixes = share_prefixes
        self.engines = {name: make_engine(loaded, name, max_tokens, max_sequences) for name in formats}
        self.listener = Listener(endpoint, ToDecode, security, options)
        self.status = StatusBoard("decode", loaded.fingerprint, formats)
        self.is_draining = False
        self._requests: dict[str, _Request] = {}
        self._waiting: deque[tuple[bytes, Reserve]] = deque()  # for room, in order
        self._may_fit = False  # something came or went since the last look at those who wait
        # A restarted instance starts elsewhere, so frames meant for its predecessor never match.
        self._epochs = itertools.count(secrets.randbits(48) << 8)
        self._attention = attention_of(loaded.model)
        self._attention.__enter__()

    @property
    def num_requests(self) -> int:
        """Requests that wait for room, wait for KV, or run."""
        return len(self._requests) + len(self._waiting)

    def close(self) -> None:
        """Fail what has not finished, close the listener and restore the model's attention."""
        error = TransferError("expected the answer to finish, found the decode instance stopping; ask another one")
        try:
            for client, ask in self._waiting:
                self.listener.send(client, Failed.of(ask.request_id, error))
            self._waiting.clear()
            for request in list(self._requests.values()):
                self._fail(request, error)
            self.listener.poll(0.0)  # sends what is queued
        finally:
            self._attention.__exit__(None, None, None)
            self.listener.close()

    def run(self, stop: threading.Event, drain_s: float = 0.0) -> None:
        """Serve until ``stop`` is set; then take nothing new, and go on for up to ``drain_s`` while requests run."""
        while not stop.is_set():
            self.turn()
        self.is_draining, deadline_s = True, time.monotonic() + drain_s
        while self.num_requests and time.monotonic() < deadline_s:
            self.turn()

    def turn(self, idle_s: float = 0.2) -> None:
        """Handle what arrived, expire leases, give out room, take one decode step."""
        busy = any(r.running for r in self._requests.values())
        self._listen(0.0 if busy else idle_s)
        self._expire()
        self._admit()
        with self.status.computing():
            for engine in self.engines.values():
                self._step(engine)

    def _listen(self, timeout_s: float) -> None:
        """Handle what arrived. Receipts leave with the next poll, which must not wait for a decode step."""
        for _ in range(MAX_ROUNDS):
            events = self.listener.poll(timeout_s)
            for event in events:
                self._handle(event)
            if not events:
                return
            self._admit()
            timeout_s = 0.0

    def _expire(self) -> None:
        for request in [r for r in self._requests.values() if not r.running and r.lease.expired]:
            ended = self.max_lease_s if request.lease.expires_at_s == request.lease.ends_at_s else self.lease_s
            error = TransferError(
                f"expected the KV of {request.ask.request_id!r} within {ended} s, found {request.lacks}; the prefill "
                "instance is gone or too slow: try again or raise --lease-s"
            )
            self.status.counters["leases_expired"] += 1
            self._fail(request, error)

    # -- arriving ----------------------------------------------------------------------------------------------

    def _handle(self, event: Event) -> None:
        if isinstance(event, Arrival):
            self._take(event)
        elif not isinstance(event, Message):
            self._lose(event.peer)
        elif isinstance(event.body, Reserve):
            self._reserve(event.peer, event.body)
        elif isinstance(event.body, Finish):
            self._finish(event.peer, event.body)
        elif isinstance(event.body, Renew):
            self._renew(event.peer, event.body)
        elif isinstance(event.body, Cancel):
            self._cancel(event.peer, event.body.request_id)
        elif isinstance(event.body, AskStatus):
            report = self.status.report(event.body.number, self.listener.refused, self._gauges())
            self.listener.send(event.peer, report)

    def _gauges(self) -> dict[str, float]:
        engines = self.engines.values()
        return {
            "requests_running": sum(r.running for r in self._requests.values()),
            "requests_receiving": sum(not r.running for r in self._requests.values()),
            "requests_waiting": len(self._waiting),
            "blocks_free": sum(e.num_free_blocks for e in engines),
            "blocks_total": sum(e.num_blocks for e in engines),
            "prefix_pages_asked": sum(e.prefixes.num_asked for e in engines),
            "prefix_pages_found": sum(e.prefixes.num_found for e in engines),
            "prefix_pages_damaged": sum(e.num_damaged for e in engines),
            "prefix_pages_held": sum(len(e.prefixes) for e in engines),
        }

    def _reserve(self, client: bytes, ask: Reserve) -> None:
        try:
            if ask.request_id in self._requests or any(ask.request_id == w.request_id for _, w in self._waiting):
                raise TransferError(f"expected a new request id, found {ask.request_id!r} in use; choose another")
            if self.is_draining:
                raise TransferError("expected to take a request, found the decode instance stopping; ask another one")
            check_reserve(ask, self.engines, self.loaded)
            if len(self._waiting) >= MAX_WAITING:
                raise CapacityError(f"expected fewer than {MAX_WAITING} waiting requests, found more; try again later")
        except HomkvError as error:
            self.listener.send(client, Failed.of(ask.request_id, error))
            return
        self._waiting.append((client, ask))
        self._may_fit = True

    def _admit(self) -> None:
        """Give room to those who wait, in order; of each format, the first that does not fit stops the others."""
        if not self._may_fit:
            return
        self._may_fit = False
        full: set[Engine] = set()
        for client, ask in list(self._waiting):
            engine = self.engines[ask.kv_cache_dtype]
            if engine in full:
                continue
            try:
                request = self._open(client, ask, engine)
            except CapacityError:
                full.add(engine)
                continue
            except HomkvError as error:
                self._waiting.remove((client, ask))
                self.listener.send(client, Failed.of(ask.request_id, error))
                continue
            self._waiting.remove((client, ask))
            self._requests[ask.request_id] = request
            plan = request.assembler.plan
            self.listener.send(client, Ticket(ask.request_id, plan.epoch, self.lease_s, plan.first_page))

    def _open(self, client: bytes, ask: Reserve, engine: Engine) -> _Request:
        """Set a request's room aside. Raises CapacityError without changing anything."""
        root = f"{self.loaded.fingerprint}/{engine.codec.layout_id}/{ask.source}"
        keys = page_keys(root, engine.codec, ask.prompt_ids) if self.share_prefixes else []
        num_tokens = len(ask.prompt_ids)
        seq, first_page = engine.reserve(num_tokens + ask.max_new_tokens, keys)
        plan = plan_sequence(
            self.loaded,
            engine.codec,
            ask.request_id,
            next(self._epochs),
            num_tokens,
            source=ask.source,
            first_page=first_page,
        )
        lease = Lease(self.lease_s, self.max_lease_s, self._clock)
        return _Request(client, ask, engine, seq, keys, SequenceAssembler(plan), lease)

    def _renew(self, client: bytes, renew: Renew) -> None:
        for request_id in renew.request_ids:
            if (request := self._requests.get(request_id)) is not None and request.client == client:
                request.lease.renew()

    def _cancel(self, client: bytes, request_id: str) -> None:
        error = TransferError("expected to finish, found the request cancelled by its client; ask again")
        request = self._requests.get(request_id)
        if request is not None and request.client == client:
            self._fail(request, error)
        for waiting in [w for w in self._waiting if w[0] == client and w[1].request_id == request_id]:
            self._waiting.remove(waiting)
            self.listener.send(client, Failed.of(request_id, error))

    def _take(self, arrival: Arrival) -> None:
        """Store a verified frame, or refuse it."""
        try:
            request = self._request_of(arrival)
            layer = request.assembler.add(arrival.frame)
        except FrameError as error:
            self.listener.nack(arrival, error)
            return
        request.sender = arrival.peer
        try:
            if layer is not None:
                plan = request.assembler.plan
                request.engine.load(request.seq, layer.layer, content_of(plan, layer), plan.first_page)
                request.verified_s = time.monotonic()
                request.lease.renew()
        except HomkvError as error:
            self.listener.nack(arrival, TransferError(str(error)))
            self._fail(request, error)
            return
        self.listener.ack(arrival)

    def _request_of(self, arrival: Arrival) -> _Request:
        """The request that a frame may feed. Raises FrameError."""
        name = arrival.frame.header.sequence
        request = self._requests.get(name)
        if request is None or request.running:
            raise FrameError("sequence", f"expected a sequence that waits for KV, found {name!r}; reserve first")
        if request.sender not in (None, arrival.peer):
            raise FrameError(
                "sequence",
                f"expected the frames of {name!r} from the connection that sent its first, found another; send each "
                "request to one prefill instance, once",
            )
        return request

    def _finish(self, peer: bytes, finish: Finish) -> None:
        """Take the first token, which comes behind every layer, and emit it."""
        request = self._requests.get(finish.request_id)
        if request is None or request.running or (peer, finish.epoch) != (request.sender, request.assembler.plan.epoch):
            log.warning("ignored a late Finish", request_id=finish.request_id)
            return
        if not request.assembler.complete or finish.choice.token >= self.loaded.vocab_size:
            error = TransferError(
                f"expected every layer of {finish.request_id!r} and a first token of the vocabulary, found "
                f"{request.lacks} and token {finish.choice.token}; nothing was used: see the prefill instance's log"
            )
            self._fail(request, error)
            return
        request.engine.publish(request.seq, request.keys)
        request.first_token_s, request.overhead_s = time.monotonic(), request.engine.overhead_s() or 0.0
        self._emit(request, finish.choice, None)

    def _lose(self, peer: bytes) -> None:
        """A connection ended. Its requests cannot go on, except those that already have all they need from it."""
        self._waiting = deque(w for w in self._waiting if w[0] != peer)
        for request in list(self._requests.values()):
            if peer == request.client:
                self._close(request)
            elif peer == request.sender and not request.running:
                error = TransferError(
                    f"expected all of {request.ask.request_id!r}, found the prefill instance gone and {request.lacks}; "
                    "nothing of it was used: try again"
                )
                self._fail(request, error)

    # -- decoding ----------------------------------------------------------------------------------------------

    def _step(self, engine: Engine) -> None:
        """One token for every running sequence of an engine."""
        batch = [r for r in self._requests.values() if r.engine is engine and r.running]
        if not batch:
            return
        try:
            logits = engine.step([r.seq for r in batch], [r.next_token for r in batch])
        except HomkvError as error:  # some layers have the token and some have not: none of the batch may go on
            for request in batch:
                self._fail(request, error)
            return
        self.status.counters.update(steps=1, tokens=len(batch))
        for request, row in zip(batch, logits, strict=True):
            try:
                choice = choose(row, request.ask.sampling, request.ask.first_index + request.num_sent)
            except HomkvError as error:
                self._fail(request, error)
            else:
                self._emit(request, choice, row)

    def _emit(self, request: _Request, choice: Choice, logits: torch.Tensor | None) -> None:
        """Stream a token; end the request at its last one."""
        ask, index, at = request.ask, request.num_sent, request.ask.first_index + request.num_sent
        data = logits.numpy().tobytes() if ask.return_logits and logits is not None else None
        evidence = request.engine.evidence(request.seq) if ask.return_evidence and index == 0 else None
        stop = ask.forced_ids is None and not ask.ignore_eos and choice.token in self._stop_tokens()
        last: FinishReason | None = "stop" if stop else "length" if index + 1 == ask.max_new_tokens else None
        self.listener.send(request.client, Token(ask.request_id, at, choice, data, evidence, last))
        request.next_token = choice.token if ask.forced_ids is None else ask.forced_ids[index]
        request.num_sent += 1
        if last is not None:
            kv_bytes, overhead_s = request.engine.kv_bytes(request.seq), request.engine.overhead_s(request.overhead_s)
            times = DecodeTimes(request.verified_s, request.first_token_s, time.monotonic(), overhead_s)
            self._close(request)
            self.listener.send(request.client, Done(ask.request_id, at + 1, kv_bytes, times, last))

    def _stop_tokens(self) -> set[int]:
        stop = self.loaded.model.generation_config.eos_token_id
        return set(stop) if isinstance(stop, list) else {stop}

    def _fail(self, request: _Request, error: HomkvError) -> None:
        self._close(request)
        log.warning("failed", request_id=request.ask.request_id, error=type(error).__name__, detail=str(error))
        self.status.counters[f"failed.{type(error).__name__}"] += 1
        self.listener.send(request.client, Failed.of(request.ask.request_id, error))

    def _close(self, request: _Request) -> None:
        """Free everything a request holds; the only place that does."""
        del self._requests[request.ask.request_id]
        request.engine.free(request.seq)
        self._may_fit = True
