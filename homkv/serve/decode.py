"""The decode instance: reserves room, receives and verifies pages, attends on them, streams tokens.

One thread, one loop: whatever arrived is handled, then every running sequence takes one step. A token is only
produced from KV whose digest, request, epoch, format and model were checked, layer by layer, on arrival. Nothing a
peer sends ends the loop: a request that cannot go on is freed and its client told why.
"""

import itertools
import logging
import secrets
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch

from homkv.errors import FormatError, HomkvError, ShapeError, TransferError
from homkv.models import LoadedModel
from homkv.seal import LayerContent
from homkv.serve.engine import EXACT_DTYPE, Engine, make_engine, plan_sequence, sample
from homkv.serve.messages import Cancel, DecodeTimes, Done, Failed, Finish, Reserve, Ticket, ToDecode, Token
from homkv.transport.assemble import LayerData, SequenceAssembler
from homkv.transport.endpoint import DEFAULTS, LinkOptions
from homkv.transport.keys import Security
from homkv.transport.lease import Lease
from homkv.transport.link import Arrival, Event, Listener, Message
from homkv.transport.wire import FrameError

log = logging.getLogger(__name__)
MAX_ROUNDS = 4  # of polling before a decode step, so that a busy link cannot starve the running sequences


@dataclass
class _Request:
    """One request from reservation to its last token."""

    client: bytes
    ask: Reserve
    engine: Engine
    seq: int
    assembler: SequenceAssembler
    lease: Lease  # until the next layer, or the first token behind the last
    sender: bytes | None = None  # the connection whose frame came first; no other may feed this request
    verified_s: float = 0.0
    first_token_s: float = 0.0
    next_token: int = 0
    num_sent: int = 0
    generator: torch.Generator = field(default_factory=torch.Generator)

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

    ``max_tokens``: room for KV, in tokens, per format. ``lease_s``: a reservation for which no layer comes for so
    long is freed and its client told. Raises FormatError or UnsupportedError for a format that this model cannot use.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        formats: list[str],
        endpoint: str,
        security: Security,
        *,
        max_tokens: int,
        max_sequences: int = 16,
        lease_s: float = 120.0,
        options: LinkOptions = DEFAULTS,
    ) -> None:
        self.loaded, self.lease_s = loaded, lease_s
        self.engines = {name: make_engine(loaded, name, max_tokens, max_sequences) for name in formats}
        self.listener = Listener(endpoint, ToDecode, security, options)
        self._requests: dict[str, _Request] = {}
        # A restarted instance starts elsewhere, so frames meant for its predecessor never match.
        self._epochs = itertools.count(secrets.randbits(48) << 8)
        self._attention = ExitStack()
        self._attached: Engine | None = None

    @property
    def num_requests(self) -> int:
        """Requests that hold room, waiting for KV or running."""
        return len(self._requests)

    def close(self) -> None:
        """Fail what has not finished, close the listener and restore the model's attention."""
        error = TransferError("expected the answer to finish, found the decode instance stopping; ask another instance")
        try:
            for request in list(self._requests.values()):
                self._fail(request, error)
            self.listener.poll(0.0)  # sends what is queued
        finally:
            self._attention.close()
            self.listener.close()

    def run(self, stop: threading.Event) -> None:
        """Serve until ``stop`` is set."""
        while not stop.is_set():
            self.turn()

    def turn(self, idle_s: float = 0.2) -> None:
        """Handle what arrived, expire leases, take one decode step."""
        busy = any(r.running for r in self._requests.values())
        self._listen(0.0 if busy else idle_s)
        self._expire()
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
            timeout_s = 0.0

    def _expire(self) -> None:
        for request in [r for r in self._requests.values() if not r.running and r.lease.expired]:
            error = TransferError(
                f"expected the next layer of {request.ask.request_id!r} within {self.lease_s} s, found "
                f"{request.lacks}; the prefill instance is gone or too slow: try again or raise --lease-s"
            )
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
        elif isinstance(event.body, Cancel):
            request = self._requests.get(event.body.request_id)
            if request is not None and event.peer == request.client:
                self._fail(
                    request, TransferError("expected to finish, found the request cancelled by its client; ask again")
                )

    def _reserve(self, client: bytes, ask: Reserve) -> None:
        try:
            request = self._open(client, ask)
        except HomkvError as error:
            self.listener.send(client, Failed.of(ask.request_id, error))
            return
        self._requests[ask.request_id] = request
        epoch = request.assembler.plan.epoch
        self.listener.send(client, Ticket(ask.request_id, epoch, self.lease_s))

    def _open(self, client: bytes, ask: Reserve) -> _Request:
        """Validate a reservation and set its room aside. Raises without changing anything."""
        if ask.request_id in self._requests:
            raise TransferError(f"expected a new request id, found {ask.request_id!r} in use; choose another")
        if ask.kv_cache_dtype not in self.engines:
            raise FormatError(
                f"expected a format of this decode instance ({', '.join(self.engines)}), found {ask.kv_cache_dtype!r}; "
                "start it with --kv-cache-dtype for this one"
            )
        self._check_lengths(ask)
        engine = self.engines[ask.kv_cache_dtype]
        plan = plan_sequence(self.loaded, engine.codec, ask.request_id, next(self._epochs), ask.num_prompt_tokens)
        assembler = SequenceAssembler(plan)
        seq = engine.reserve(ask.num_prompt_tokens + ask.max_new_tokens)
        request = _Request(client, ask, engine, seq, assembler, Lease(self.lease_s))
        request.generator.manual_seed(ask.sampling.seed + 1)  # the prefill instance drew the first token
        return request

    def _check_lengths(self, ask: Reserve) -> None:
        total, context = ask.num_prompt_tokens + ask.max_new_tokens, self.loaded.context_length
        if ask.num_prompt_tokens == 0 or ask.max_new_tokens == 0:
            raise ShapeError(
                f"expected at least one prompt token and one new token, found {ask.num_prompt_tokens} and "
                f"{ask.max_new_tokens}; send a prompt"
            )
        if total > context:
            raise ShapeError(
                f"expected prompt and answer within the context of {context} tokens, found {total}; shorten the prompt "
                "or max_new_tokens"
            )
        if ask.forced_ids is not None and len(ask.forced_ids) != ask.max_new_tokens:
            raise ShapeError(
                f"expected {ask.max_new_tokens} forced ids, one per new token, found {len(ask.forced_ids)}; "
                "make the lengths equal"
            )
        vocabulary = self.loaded.vocab_size
        if any(token >= vocabulary for token in ask.forced_ids or ()):
            raise ShapeError(
                f"expected forced ids below the vocabulary's {vocabulary}, found {max(ask.forced_ids or [])}; "
                "were they tokenized for another model?"
            )

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
                request.engine.load(request.seq, layer.layer, self._content(request, layer))
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

    def _content(self, request: _Request, data: LayerData) -> LayerContent:
        """Tensors over the received bytes, which are ours."""
        plan = request.assembler.plan
        e = plan.expect
        shape = (e.num_kv_heads, plan.num_exact, e.head_dim)

        def tensor(view: memoryview, dtype: torch.dtype) -> torch.Tensor:
            return torch.frombuffer(view, dtype=dtype) if view.nbytes else torch.empty(0, dtype=dtype)

        return LayerContent(
            num_tokens=plan.num_tokens,
            pages=tensor(data.pages, torch.uint8).view(plan.num_pages, e.num_kv_heads, e.page_bytes),
            exact_k=tensor(data.exact_k, EXACT_DTYPE).view(shape),
            exact_v=tensor(data.exact_v, EXACT_DTYPE).view(shape),
        )

    def _finish(self, peer: bytes, finish: Finish) -> None:
        """Take the first token, which comes behind every layer, and emit it."""
        request = self._requests.get(finish.request_id)
        if request is None or request.running or (peer, finish.epoch) != (request.sender, request.assembler.plan.epoch):
            log.warning("ignored a late Finish of %r", finish.request_id)
            return
        vocabulary = self.loaded.vocab_size
        if not request.assembler.complete or finish.first_token >= vocabulary:
            error = TransferError(
                f"expected every layer of {finish.request_id!r} and a first token below {vocabulary}, found "
                f"{request.lacks} and token {finish.first_token}; nothing was used: see the prefill instance's log"
            )
            self._fail(request, error)
            return
        request.first_token_s = time.monotonic()
        self._emit(request, finish.first_token, None)

    def _lose(self, peer: bytes) -> None:
        """A connection ended. Its requests cannot go on, except those that already have all they need from it."""
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
        if self._attached is not engine:
            self._attention.close()
            self._attention.enter_context(engine.attention())
            self._attached = engine
        try:
            logits = engine.step([r.seq for r in batch], [r.next_token for r in batch])
        except HomkvError as error:  # some layers have the token and some have not: none of the batch may go on
            for request in batch:
                self._fail(request, error)
            return
        for request, row in zip(batch, logits, strict=True):
            try:
                token = sample(row, request.ask.sampling, request.generator)
            except HomkvError as error:
                self._fail(request, error)
            else:
                self._emit(request, token, row)

    def _emit(self, request: _Request, token: int, logits: torch.Tensor | None) -> None:
        """Stream a token; end the request at its last one."""
        ask, index = request.ask, request.num_sent
        data = logits.numpy().tobytes() if ask.return_logits and logits is not None else None
        self.listener.send(request.client, Token(ask.request_id, index, token, data))
        request.next_token = token if ask.forced_ids is None else ask.forced_ids[index]
        request.num_sent += 1
        stop = ask.forced_ids is None and token in self._stop_tokens()
        if request.num_sent == ask.max_new_tokens or stop:
            times = DecodeTimes(request.verified_s, request.first_token_s, time.monotonic())
            done = Done(ask.request_id, request.engine.kv_bytes(request.seq), times)
            self._close(request)
            self.listener.send(request.client, done)

    def _stop_tokens(self) -> set[int]:
        stop = self.loaded.model.generation_config.eos_token_id
        return set(stop) if isinstance(stop, list) else {stop}

    def _fail(self, request: _Request, error: HomkvError) -> None:
        self._close(request)
        self.listener.send(request.client, Failed.of(request.ask.request_id, error))

    def _close(self, request: _Request) -> None:
        """Free everything a request holds; the only place that does."""
        del self._requests[request.ask.request_id]
        request.engine.free(request.seq)
