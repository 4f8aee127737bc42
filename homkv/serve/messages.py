"""What the dispatcher, prefill instances and decode instances say to each other. KV itself travels as frames.

dispatcher -> decode   Reserve, Renew     decode -> dispatcher   Ticket | Failed
dispatcher -> prefill  Prefill            prefill -> dispatcher  Progress … PrefillDone | Failed
prefill    -> decode   KV frames, Finish  decode -> dispatcher   Token … Done | Failed
dispatcher -> both     Cancel, AskStatus  both -> dispatcher     Status
"""

from typing import Annotated, Any, Literal

import msgspec

import homkv.errors
from homkv.errors import HomkvError, TransferError

RequestId = Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
Count = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
NumBytes = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
Ids = list[Count]
MAX_LOGPROBS = 20


class _Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """Base: every message names its type, so that a decoder accepts declared ones only."""


class Sampling(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How the next token is chosen. Temperature 0 is greedy. The draw of token i depends on ``seed`` and i alone."""

    temperature: Annotated[float, msgspec.Meta(ge=0, le=1e6)] = 0.0  # the cap refuses infinity
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0
    seed: Count = 0
    num_logprobs: Annotated[int, msgspec.Meta(ge=0, le=MAX_LOGPROBS)] | None = None  # None: not even the chosen one's


class Choice(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A chosen token. ``logprob``: natural log of its probability at temperature 1; ``top``: the likeliest tokens."""

    token: Count
    logprob: float | None = None
    top: list[tuple[Count, float]] = []


class Reserve(_Message, frozen=True):
    """Ask the decode instance for room. The Ticket comes when there is some."""

    request_id: RequestId
    kv_cache_dtype: str
    prompt_ids: Ids
    max_new_tokens: Count
    sampling: Sampling = Sampling()
    source: str = "fp16"  # format in which the prefill instance keeps KV
    first_index: Count = 0  # of the first new token: above 0 where an earlier attempt had begun
    ignore_eos: bool = False
    forced_ids: Ids | None = None  # feed these instead of the sampled tokens: to compare models on one text
    return_logits: bool = False
    return_evidence: bool = False


class Ticket(_Message, frozen=True):
    """Room is reserved. KV must carry this epoch, and signs of life come within ``lease_s`` of each other."""

    request_id: RequestId
    epoch: int
    lease_s: float
    first_page: Count = 0  # leading pages that are here already and must not be sent


class Renew(_Message, frozen=True):
    """These reservations are still wanted."""

    request_ids: list[RequestId]


class Prefill(_Message, frozen=True):
    """Compute a prompt and send its KV to the decode instance."""

    request_id: RequestId
    kv_cache_dtype: str
    prompt_ids: Ids
    epoch: int
    decode_endpoint: str
    decode_key: str | None
    sampling: Sampling = Sampling()
    source: str = "fp16"
    first_page: Count = 0
    first_index: Count = 0
    report_progress: bool = False


class Progress(_Message, frozen=True):
    """Part of a prompt is computed: ``num_layers`` of all its chunks."""

    request_id: RequestId
    num_layers: Count


class PrefillTimes(msgspec.Struct, frozen=True):
    """Moments of a prefill, seconds of the host's monotonic clock, and busy times, seconds."""

    received_s: float
    start_s: float
    computed_s: float  # last layer and first token
    packed_s: float  # last layer packed
    sent_s: float  # last byte on the link
    pack_busy_s: float
    send_busy_s: float
    verify_busy_s: float


class PrefillDone(_Message, frozen=True):
    """The prompt's KV was delivered and accepted."""

    request_id: RequestId
    raw_bytes: NumBytes  # the KV of the sent pages and exact tokens in 16 bits
    wire_bytes: NumBytes  # frames, heads included
    times: PrefillTimes
    num_cached_tokens: Count = 0  # restored from kept pages instead of computed
    reconstruction_error: float | None = None  # |x - dense(x)| / |x| of a sampled layer's keys and values


class Finish(_Message, frozen=True):
    """Last word of a prefill to the decode instance: the first token, computed exactly."""

    request_id: RequestId
    epoch: int
    choice: Choice


class Evidence(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is held of a prompt when its last layer was verified: a digest of all bytes, and attention over them."""

    kv: bytes
    attention: bytes


FinishReason = Literal["stop", "length"]


class Token(_Message, frozen=True):
    """One generated token. ``logits``: float32 little endian, of the distribution it was chosen from.

    ``evidence``: with the first token of an attempt that asked for it. ``reason``: with the last one, so that the
    answer is known to be whole before Done comes.
    """

    request_id: RequestId
    index: Count
    choice: Choice
    logits: bytes | None = None
    evidence: Evidence | None = None
    reason: FinishReason | None = None


class DecodeTimes(msgspec.Struct, frozen=True):
    """Moments of a decode, seconds of the host's monotonic clock."""

    verified_s: float  # the last layer was verified and stored
    first_token_s: float
    done_s: float
    overhead_s: float | None = None  # restoring or correcting in between; None: its kernels do not tell it apart


class Done(_Message, frozen=True):
    """The request is complete and its pages are freed."""

    request_id: RequestId
    num_tokens: Count  # all that were told, those of earlier attempts counted: fewer have come if one was lost
    kv_bytes: NumBytes  # held at the end
    times: DecodeTimes
    reason: FinishReason = "length"


class Cancel(_Message, frozen=True):
    """Stop a request; the receiver frees everything and answers Failed."""

    request_id: RequestId


class Failed(_Message, frozen=True):
    """The request ended with an error; everything it held is freed."""

    request_id: RequestId
    error: str  # name of a class in homkv.errors
    detail: str

    @classmethod
    def of(cls, request_id: str, error: HomkvError) -> "Failed":
        """Describe an error; subclasses from elsewhere travel as their homkv.errors base."""
        known = next(c for c in type(error).__mro__ if getattr(homkv.errors, c.__name__, None) is c)
        return cls(request_id, known.__name__, str(error))

    def to_error(self) -> HomkvError:
        """The error to raise at the client."""
        kind = getattr(homkv.errors, self.error, None)
        if not (isinstance(kind, type) and issubclass(kind, HomkvError)):
            return TransferError(f"expected an error of homkv.errors, found {self.error!r}: {self.detail}")
        return kind(self.detail)


class AskStatus(_Message, frozen=True):
    """How are you?"""

    number: Count


class Status(_Message, frozen=True):
    """An instance's state. ``counters`` only grow, ``gauges`` are of now; both are named in docs/serving.md."""

    number: Count
    role: Literal["prefill", "decode"]
    incarnation: str  # of the process: another one after a restart
    now_s: float  # of the host's monotonic clock
    model: str  # fingerprint
    formats: Annotated[list[str], msgspec.Meta(min_length=1)]  # prefill: the source format; decode: what it holds
    counters: dict[str, float]
    gauges: dict[str, float]


ToDecode: Any = Reserve | Renew | Finish | Cancel | AskStatus
ToPrefill: Any = Prefill | Cancel | AskStatus
FromDecode: Any = Ticket | Token | Done | Failed | Status
FromPrefill: Any = Progress | PrefillDone | Failed | Status
