"""What client, prefill instance and decode instance say to each other. KV itself travels as frames.

client  -> decode   Reserve            decode -> client   Ticket | Failed
client  -> prefill  Prefill            prefill -> client  Progress … PrefillDone | Failed
prefill -> decode   KV frames, Finish  decode -> client   Token … Done | Failed
client  -> both     Cancel
"""

from typing import Annotated, Any

import msgspec

import homkv.errors
from homkv.errors import HomkvError, TransferError

RequestId = Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
Count = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
NumBytes = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
Ids = list[Count]


class _Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True):
    """Base: every message names its type, so that a decoder accepts declared ones only."""


class Sampling(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How the next token is chosen. Temperature 0 is greedy."""

    temperature: Annotated[float, msgspec.Meta(ge=0, le=1e6)] = 0.0  # the cap refuses infinity
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0
    seed: Count = 0


class Reserve(_Message, frozen=True):
    """Ask the decode instance for room."""

    request_id: RequestId
    kv_cache_dtype: str
    num_prompt_tokens: Count
    max_new_tokens: Count
    sampling: Sampling = Sampling()
    forced_ids: Ids | None = None  # feed these instead of the sampled tokens: to compare models on one text
    return_logits: bool = False


class Ticket(_Message, frozen=True):
    """Room is reserved. KV must carry this epoch, and each layer must come within ``lease_s`` of the one before."""

    request_id: RequestId
    epoch: int
    lease_s: float


class Prefill(_Message, frozen=True):
    """Compute a prompt and send its KV to the decode instance."""

    request_id: RequestId
    kv_cache_dtype: str
    prompt_ids: Ids
    epoch: int
    decode_endpoint: str
    decode_key: str | None
    sampling: Sampling = Sampling()


class Progress(_Message, frozen=True):
    """Layers of a prompt computed so far."""

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
    raw_bytes: NumBytes  # the same KV in 16 bits
    wire_bytes: NumBytes  # frames, heads included
    times: PrefillTimes


class Finish(_Message, frozen=True):
    """Last word of a prefill to the decode instance: the first token, computed exactly."""

    request_id: RequestId
    epoch: int
    first_token: Count


class Token(_Message, frozen=True):
    """One generated token. ``logits``: float32 little endian, of the distribution it was chosen from."""

    request_id: RequestId
    index: Count
    token: Count
    logits: bytes | None = None


class DecodeTimes(msgspec.Struct, frozen=True):
    """Moments of a decode, seconds of the host's monotonic clock."""

    verified_s: float  # the last layer was verified and stored
    first_token_s: float
    done_s: float


class Done(_Message, frozen=True):
    """The request is complete and its pages are freed."""

    request_id: RequestId
    kv_bytes: NumBytes  # held at the end
    times: DecodeTimes


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


ToDecode: Any = Reserve | Finish | Cancel
ToPrefill: Any = Prefill | Cancel
FromDecode: Any = Ticket | Token | Done | Failed
FromPrefill: Any = Progress | PrefillDone | Failed
