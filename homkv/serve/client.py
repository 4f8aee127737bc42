"""The client of a prefill and a decode instance: sends a prompt, yields tokens, accounts for the time."""

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from homkv.errors import HomkvError, TransferError
from homkv.serve.messages import (
    Cancel,
    DecodeTimes,
    Done,
    Failed,
    FromDecode,
    FromPrefill,
    Prefill,
    PrefillDone,
    Progress,
    Reserve,
    Sampling,
    Ticket,
    Token,
)
from homkv.transport.endpoint import DEFAULTS, LinkError, LinkOptions, Receipt
from homkv.transport.keys import Security
from homkv.transport.link import Peer

PHASES = ("queue", "prefill", "pack", "send", "verify", "first_token")


@dataclass(frozen=True)
class Address:
    """Where an instance listens, and its public key (None: without encryption)."""

    endpoint: str
    key: str | None


@dataclass(frozen=True)
class Query:
    """What to generate. ``forced_ids`` are fed instead of the chosen tokens, to compare models on one text."""

    prompt_ids: list[int]
    kv_cache_dtype: str
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    forced_ids: list[int] | None = None
    return_logits: bool = False


@dataclass
class Answer:
    """Tokens and what they cost. Times in seconds, of the client's monotonic clock."""

    tokens: list[int] = field(default_factory=list)
    logits: list[NDArray[np.float32] | None] = field(default_factory=list)  # [V] each; None for the first token
    submitted_s: float = 0.0
    arrived_s: list[float] = field(default_factory=list)
    prefill: PrefillDone | None = None
    decode: DecodeTimes | None = None
    kv_bytes: int = 0

    @property
    def ttft_s(self) -> float:
        """Time to first token."""
        return self.arrived_s[0] - self.submitted_s

    @property
    def tpot_s(self) -> float:
        """Mean time per output token behind the first; 0 if there is none."""
        return (self.arrived_s[-1] - self.arrived_s[0]) / max(len(self.tokens) - 1, 1)

    def phases_s(self) -> dict[str, float]:
        """TTFT split into what it waited for; sums to ``ttft_s``.

        Packing, sending and verifying overlap the computation; a phase here is only what was left of it when the
        phase before had ended. Needs client and instances on one host: the moments are of one monotonic clock.
        """
        if self.prefill is None or self.decode is None:
            raise TransferError("expected a finished answer, found one that is not; call generate() first")
        t = self.prefill.times
        moments = [t.start_s, t.computed_s, t.packed_s, t.sent_s, self.decode.verified_s, self.arrived_s[0]]
        out, last = {}, self.submitted_s
        for name, moment in zip(PHASES, moments, strict=True):
            now = min(max(moment, last), self.arrived_s[0])
            out[name], last = now - last, now
        return out


class Client:
    """Connections to one prefill and one decode instance. One request at a time; use as a context manager.

    A connection that broke is not repaired: after a LinkError make a new client.
    """

    def __init__(self, prefill: Address, decode: Address, security: Security, options: LinkOptions = DEFAULTS) -> None:
        self._decode_address = decode
        self._broken: LinkError | None = None
        self._decode = Peer(decode.endpoint, FromDecode, security, decode.key, options)
        try:
            self._prefill = Peer(prefill.endpoint, FromPrefill, security, prefill.key, options)
        except BaseException:
            self._decode.close()
            raise

    def generate(
        self,
        query: Query,
        *,
        on_layer: Callable[[int], None] = lambda layers: None,
        on_token: Callable[[int], None] = lambda token: None,
        timeout_s: float = 600.0,
    ) -> Answer:
        """Run one request to its end. Raises the typed error of the instance that failed, or LinkError.

        Whatever is raised, by a callback too, both instances are told to drop the request.
        """
        if self._broken is not None:
            raise LinkError("closed", f"expected open connections, found one lost ({self._broken}); make a new Client")
        request_id, answer = secrets.token_hex(8), Answer(submitted_s=time.monotonic())
        deadline_s = answer.submitted_s + timeout_s
        try:
            ticket = self._reserve(request_id, query, deadline_s)
            self._prefill.send(self._order(request_id, query, ticket))
            while answer.decode is None or answer.prefill is None:
                if time.monotonic() > deadline_s:
                    raise LinkError(
                        "timeout", f"expected an answer within {timeout_s} s, found none; is an instance overloaded?"
                    )
                self._advance(request_id, answer, on_layer, on_token)
        except BaseException as error:
            if isinstance(error, LinkError) and error.reason == "vanished":
                self._broken = error
            self._cancel(request_id)
            raise
        return answer

    def _reserve(self, request_id: str, query: Query, deadline_s: float) -> Ticket:
        self._decode.send(
            Reserve(
                request_id,
                query.kv_cache_dtype,
                len(query.prompt_ids),
                query.max_new_tokens,
                query.sampling,
                query.forced_ids,
                query.return_logits,
            )
        )
        while True:
            reply = self._decode.recv(max(deadline_s - time.monotonic(), 0.0))
            if isinstance(reply, Failed) and reply.request_id == request_id:
                raise reply.to_error()
            if isinstance(reply, Ticket) and reply.request_id == request_id:
                return reply

    def _order(self, request_id: str, query: Query, ticket: Ticket) -> Prefill:
        address = self._decode_address
        return Prefill(
            request_id,
            query.kv_cache_dtype,
            query.prompt_ids,
            ticket.epoch,
            address.endpoint,
            address.key,
            query.sampling,
        )

    def _advance(
        self, request_id: str, answer: Answer, on_layer: Callable[[int], None], on_token: Callable[[int], None]
    ) -> None:
        """Take in what both instances said."""
        # While the prompt computes, both connections matter; a short wait on one of them keeps both timely. Once the
        # KV was delivered, the prefill instance may go.
        computing = answer.prefill is None
        messages = self._decode.poll(0.002 if computing else 0.2)
        for message in [*messages, *(self._prefill.poll(0.0) if computing else [])]:
            if isinstance(message, Receipt) and message.reason:
                raise TransferError(f"expected our messages to be accepted, found: {message.detail}")
            if getattr(message, "request_id", None) != request_id:
                continue  # an accepted message's receipt, or the tail of a request that failed before
            match message:
                case Failed():
                    raise message.to_error()
                case Progress():
                    on_layer(message.num_layers)
                case PrefillDone():
                    answer.prefill = message
                case Token():
                    answer.arrived_s.append(time.monotonic())
                    answer.tokens.append(message.token)
                    logits = message.logits
                    answer.logits.append(None if logits is None else np.frombuffer(logits, np.float32))
                    on_token(message.token)
                case Done():
                    answer.decode, answer.kv_bytes = message.times, message.kv_bytes

    def _cancel(self, request_id: str) -> None:
        for peer in (self._decode, self._prefill):
            try:
                peer.send(Cancel(request_id))
            except HomkvError:
                continue  # that side is gone: its leases free what it held, and the first error is the one to report

    def close(self) -> None:
        """Close both connections."""
        try:
            self._decode.close()
        finally:
            self._prefill.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
