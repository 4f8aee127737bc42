"""The decode instance: gives out room, receives and verifies pages, attends on them, streams tokens.

One thread, one loop: whatever arrived is handled, then every running sequence takes one step. A token is only
produced from KV whose digest, request, epoch, format and model were checked, layer by layer, on arrival. Nothing a
peer sends ends the loop; at worst its own request fails.
"""

import threading
import time
from collections.abc import Callable

import torch

from homkv.errors import HomkvError, TransferError
from homkv.generate.loop import attention_of
from homkv.models import LoadedModel
from homkv.serve.choose import choose
from homkv.serve.engine import Engine
from homkv.serve.exact import make_engine
from homkv.serve.inbox import content_of
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
from homkv.serve.rooms import DecodeRequest, LeaseTerms, Rooms
from homkv.serve.status import StatusBoard
from homkv.transport.endpoint import LinkOptions
from homkv.transport.keys import Security
from homkv.transport.link import Arrival, Event, Listener, Message
from homkv.transport.wire import FrameError

log = get_logger(__name__)
MAX_ROUNDS = 4  # of polling before a decode step, so that a busy link cannot starve the running sequences


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
        self.loaded = loaded
        self.engines = {name: make_engine(loaded, name, max_tokens, max_sequences) for name in formats}
        self.listener = Listener(endpoint, ToDecode, security, options)
        self.status = StatusBoard("decode", loaded.fingerprint, formats)
        self.is_draining = False
        self._rooms = Rooms(loaded, self.engines, LeaseTerms(lease_s, max_lease_s, clock), share_prefixes)
        self._attention = attention_of(loaded.model)
        self._attention.__enter__()

    @property
    def num_requests(self) -> int:
        """Requests that wait for room, wait for KV, or run."""
        return len(self._rooms)

    def close(self) -> None:
        """Fail what has not finished, close the listener and restore the model's attention."""
        error = TransferError("expected the answer to finish, found the decode instance stopping; ask another one")
        try:
            for client, ask in self._rooms.waiting:
                self.listener.send(client, Failed.of(ask.request_id, error))
            self._rooms.waiting.clear()
            for request in self._rooms:
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
        self._listen(0.0 if self._rooms.running() else idle_s)
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
        for request in self._rooms.expired():
            ended_s = self._rooms.terms.ended_after_s(request.lease)
            error = TransferError(
                f"expected the KV of {request.ask.request_id!r} within {ended_s} s, found {request.lacks}; the prefill "
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
            self._rooms.renew(event.peer, event.body.request_ids)
        elif isinstance(event.body, Cancel):
            self._cancel(event.peer, event.body.request_id)
        elif isinstance(event.body, AskStatus):
            report = self.status.report(event.body.number, self.listener.refused, self._gauges())
            self.listener.send(event.peer, report)

    def _gauges(self) -> dict[str, float]:
        engines, num_running, num_waiting = self.engines.values(), len(self._rooms.running()), len(self._rooms.waiting)
        return {
            "requests_running": num_running,
            "requests_receiving": len(self._rooms) - num_waiting - num_running,
            "requests_waiting": num_waiting,
            "blocks_free": sum(e.num_free_blocks for e in engines),
            "blocks_total": sum(e.num_blocks for e in engines),
            "prefix_pages_asked": sum(e.prefixes.num_asked for e in engines),
            "prefix_pages_found": sum(e.prefixes.num_found for e in engines),
            "prefix_pages_damaged": sum(e.num_damaged for e in engines),
            "prefix_pages_held": sum(len(e.prefixes) for e in engines),
        }

    def _reserve(self, client: bytes, ask: Reserve) -> None:
        try:
            if self.is_draining:
                raise TransferError("expected to take a request, found the decode instance stopping; ask another one")
            self._rooms.ask(client, ask)
        except HomkvError as error:
            self.listener.send(client, Failed.of(ask.request_id, error))

    def _admit(self) -> None:
        for client, ask, result in self._rooms.give():
            if isinstance(result, HomkvError):
                self.listener.send(client, Failed.of(ask.request_id, result))
            else:
                lease_s, first_page = self._rooms.terms.lease_s, result.assembler.plan.first_page
                self.listener.send(client, Ticket(ask.request_id, result.epoch, lease_s, first_page))

    def _cancel(self, client: bytes, request_id: str) -> None:
        error = TransferError("expected to finish, found the request cancelled by its client; ask again")
        request = self._rooms.get(request_id)
        if request is not None and request.client == client:
            self._fail(request, error)
        for ask in self._rooms.forget(client, request_id):
            self.listener.send(client, Failed.of(ask.request_id, error))

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

    def _request_of(self, arrival: Arrival) -> DecodeRequest:
        """The request that a frame may feed. Raises FrameError."""
        name = arrival.frame.header.sequence
        request = self._rooms.get(name)
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
        request = self._rooms.get(finish.request_id)
        if request is None or request.running or (peer, finish.epoch) != (request.sender, request.epoch):
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
        self._rooms.forget(peer)
        for request in self._rooms:
            if peer == request.client:
                self._rooms.close(request)
            elif peer == request.sender and not request.running:
                error = TransferError(
                    f"expected all of {request.ask.request_id!r}, found the prefill instance gone and {request.lacks}; "
                    "nothing of it was used: try again"
                )
                self._fail(request, error)

    # -- decoding ----------------------------------------------------------------------------------------------

    def _step(self, engine: Engine) -> None:
        """One token for every running sequence of an engine."""
        if not (batch := self._rooms.running(engine)):
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

    def _emit(self, request: DecodeRequest, choice: Choice, logits: torch.Tensor | None) -> None:
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
            self._rooms.close(request)
            self.listener.send(request.client, Done(ask.request_id, at + 1, kv_bytes, times, last))

    def _stop_tokens(self) -> set[int]:
        stop = self.loaded.model.generation_config.eos_token_id
        return set(stop) if isinstance(stop, list) else {stop}

    def _fail(self, request: DecodeRequest, error: HomkvError) -> None:
        self._rooms.close(request)
        log.warning("failed", request_id=request.ask.request_id, error=type(error).__name__, detail=str(error))
        self.status.counters[f"failed.{type(error).__name__}"] += 1
        self.listener.send(request.client, Failed.of(request.ask.request_id, error))
