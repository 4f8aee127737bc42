"""A blocking client: one request at a time through a dispatcher of its own, with every time accounted for."""

import queue
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from homkv.errors import TransferError
from homkv.serve.dispatch import Dispatcher
from homkv.serve.fleet import Address
from homkv.serve.links import SERVING
from homkv.serve.messages import DecodeTimes, PrefillDone, Progress, Token
from homkv.serve.query import DispatchOptions, Ended, Query
from homkv.transport.endpoint import LinkError, LinkOptions
from homkv.transport.keys import Security

__all__ = ["PHASES", "Address", "Answer", "Client", "Query"]
PHASES = ("queue", "prefill", "pack", "send", "verify", "first_token")


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
    """One prefill and one decode instance, one request at a time. Use as a context manager.

    Connections that break are made again; the request that they broke fails with the reason.
    """

    def __init__(self, prefill: Address, decode: Address, security: Security, options: LinkOptions = SERVING) -> None:
        limits = DispatchOptions(no_instance_timeout_s=options.peer_timeout_s)
        self._dispatcher = Dispatcher([prefill], [decode], security, limits=limits, options=options)

    def generate(
        self,
        query: Query,
        *,
        on_layer: Callable[[int], None] | None = None,
        on_token: Callable[[int], None] = lambda token: None,
        timeout_s: float = 600.0,
    ) -> Answer:
        """Run one request to its end. Raises the typed error of the instance that failed, or LinkError.

        Whatever is raised, by a callback too, both instances are told to drop the request. ``on_layer`` is told how
        many layers of all chunks are computed.
        """
        if on_layer is not None:
            query = Query(**{**vars(query), "report_progress": True})
        events: queue.SimpleQueue[Progress | Token | Ended] = queue.SimpleQueue()
        answer = Answer(submitted_s=time.monotonic())
        deadline_s = answer.submitted_s + timeout_s
        request_id = self._dispatcher.submit(query, events.put)
        try:
            while True:
                event = self._next(events, deadline_s, timeout_s)
                if isinstance(event, Ended):
                    return _finished(answer, event)
                if isinstance(event, Progress):
                    if on_layer is not None:
                        on_layer(event.num_layers)
                else:
                    _take(answer, event)
                    on_token(event.choice.token)
        except BaseException:
            self._dispatcher.cancel(request_id)
            raise

    def _next(
        self, events: "queue.SimpleQueue[Progress | Token | Ended]", deadline_s: float, timeout_s: float
    ) -> Progress | Token | Ended:
        try:
            return events.get(timeout=max(deadline_s - time.monotonic(), 0.0))
        except queue.Empty as error:
            raise LinkError(
                "timeout", f"expected an answer within {timeout_s} s, found none; is an instance overloaded?"
            ) from error

    def close(self) -> None:
        """Close both connections."""
        self._dispatcher.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _take(answer: Answer, token: Token) -> None:
    answer.arrived_s.append(time.monotonic())
    answer.tokens.append(token.choice.token)
    answer.logits.append(None if token.logits is None else np.frombuffer(token.logits, np.float32))


def _finished(answer: Answer, ended: Ended) -> Answer:
    """The whole answer, or the error that ended it."""
    if ended.error is not None:
        raise ended.error
    answer.prefill = ended.prefill
    if ended.decode is not None:
        answer.decode, answer.kv_bytes = ended.decode.times, ended.decode.kv_bytes
    return answer
