"""What is asked, what is told, and one request in the dispatcher's hands."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from homkv.errors import HomkvError
from homkv.serve.fleet import Member
from homkv.serve.lifecycle import Record
from homkv.serve.messages import (
    Done,
    FinishReason,
    Prefill,
    PrefillDone,
    Progress,
    Reserve,
    Sampling,
    Ticket,
    Token,
)

Policy = Literal["fail", "recompute"]


@dataclass(frozen=True)
class Query:
    """What to generate. ``forced_ids`` are fed instead of the chosen tokens, to compare models on one text."""

    prompt_ids: list[int]
    kv_cache_dtype: str
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    forced_ids: list[int] | None = None
    return_logits: bool = False
    return_evidence: bool = False  # with the first token: what the decode instance holds then
    ignore_eos: bool = False
    report_progress: bool = False


@dataclass(frozen=True)
class Ended:
    """A request's last event. ``error``: None if it is done; cancelled requests have a TransferError."""

    record: Record
    error: HomkvError | None
    reason: FinishReason | None = None
    prefill: PrefillDone | None = None  # None if its instance vanished behind the transfer
    decode: Done | None = None


Sink = Callable[[Progress | Token | Ended], None]


@dataclass(frozen=True)
class DispatchOptions:
    """Limits of a dispatcher."""

    policy: Policy = "fail"
    max_requests: int = 512  # accepted and not ended
    reservations_per_instance: int = 4  # that wait for room at one decode instance; the others choose later
    request_timeout_s: float = 600.0
    max_records: int = 2000  # newest requests that can be looked up
    no_instance_timeout_s: float = 30.0  # a request fails if for so long no instance could take it


@dataclass(eq=False)
class Request:
    """A request that was accepted; its attempts have names of their own."""

    query: Query
    sink: Sink
    record: Record
    deadline_s: float
    tokens: list[int] = field(default_factory=list)  # over all attempts
    sequence: str = ""  # name of this attempt
    source: str = ""
    prefill: Member | None = None
    decode: Member | None = None
    ticket: Ticket | None = None
    prefill_done: PrefillDone | None = None
    done: Done | None = None
    reason: FinishReason | None = None  # of the last token: the answer is whole, whatever fails now

    @property
    def prompt_ids(self) -> list[int]:
        """What this attempt's prefill computes: the prompt and what earlier attempts answered."""
        fed = self.query.forced_ids or self.tokens
        return self.query.prompt_ids + fed[: len(self.tokens)]

    @property
    def num_tokens_left(self) -> int:
        """New tokens that are still to come."""
        return self.query.max_new_tokens - len(self.tokens)

    def begin_attempt(self, decode: Member, source: str) -> Reserve:
        """Start over with a decode instance, behind the tokens that were told already."""
        record, query = self.record, self.query
        record.num_attempts += 1
        self.sequence = f"{record.request_id}.{record.num_attempts}"
        self.decode, self.source = decode, source
        self.prefill = self.ticket = self.prefill_done = self.done = None
        return Reserve(
            self.sequence,
            query.kv_cache_dtype,
            self.prompt_ids,
            self.num_tokens_left,
            query.sampling,
            source,
            len(self.tokens),
            query.ignore_eos,
            None if query.forced_ids is None else query.forced_ids[len(self.tokens) :],
            query.return_logits,
            query.return_evidence,
        )

    def order(self, prefill: Member, ticket: Ticket) -> Prefill:
        """There is room: what a prefill instance has to do."""
        assert self.decode is not None  # it sent the ticket
        self.prefill, self.ticket = prefill, ticket
        return Prefill(
            self.sequence,
            self.query.kv_cache_dtype,
            self.prompt_ids,
            ticket.epoch,
            self.decode.address.endpoint,
            self.decode.address.key,
            self.query.sampling,
            self.source,
            ticket.first_page,
            len(self.tokens),
            self.query.report_progress,
        )
