"""What the coordinator and its workers say: one JSON object per line, on the worker's standard streams."""

from typing import Any, Literal

import msgspec

Role = Literal["prefill", "decode"]
DEVICE_LINKS = ("direct", "nixl")  # no host in between: layers carry a digest that both devices take


class Cell(msgspec.Struct, frozen=True):
    """What is measured in one go."""

    format: str
    link: str  # "direct", "nixl", "tcp", or the rate of a shaped TCP link in Gb/s
    overlap: bool  # a layer leaves while the next is computed; else all leave behind the first token
    prefill: Literal["exact", "int8"]
    slots: int  # sequences that decode together
    prompts: tuple[int, int]  # tokens of the shortest and the longest prompt
    longest: int  # tokens of the longest sequence
    kv_budget_bytes: int = 0  # of KV in a decode instance; 0: what the slots need

    @property
    def link_gbps(self) -> float | None:
        """Rate of a shaped link; None for a link as fast as it is."""
        return None if self.link in (*DEVICE_LINKS, "tcp") else float(self.link)

    @property
    def kind(self) -> str:
        """Which of a worker's links carries it: one of DEVICE_LINKS, or "tcp"."""
        return self.link if self.link in DEVICE_LINKS else "tcp"


class Step(msgspec.Struct, frozen=True):
    """A step timed while nothing else ran; fields as in homkv.sim.record.StepSample."""

    stage: Literal["prefill", "pack", "decode", "seal"]
    batch: int
    tokens: int
    seconds: float


class _Message(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    """Base: every line names its type."""


class Start(_Message, frozen=True):
    """The first line to a worker."""

    role: Role
    rank: int  # prefill workers first, then decode workers
    num_prefill: int
    num_decode: int
    device: str
    model: str
    token: str  # opens this run's sockets
    lanes: int
    chunk_bytes: int
    max_unsent_bytes: int
    store_port: int | None  # of the store that torch.distributed meets at; None: no direct link
    threads: int
    use_nixl: bool


class Connect(_Message, frozen=True):
    """To prefill workers: where the decode workers listen. To decode workers: everyone is there."""

    ports: list[int]


class Join(_Message, frozen=True):
    """Open a link between devices: one of DEVICE_LINKS."""

    kind: str


class Open(_Message, frozen=True):
    """Get ready for a cell."""

    cell: Cell


class Reserve(_Message, frozen=True):
    """To a decode worker: keep room, answer Granted when there is some."""

    request: int
    prompt_tokens: int
    output_tokens: int


class Compute(_Message, frozen=True):
    """To a prefill worker: compute a prompt and send its KV to decode worker ``target``."""

    request: int
    prompt_tokens: int
    target: int


class Close(_Message, frozen=True):
    """The cell is over: say what it took, and forget it."""


class Hello(_Message, frozen=True):
    """A worker runs; decode workers name their port."""

    port: int


class Connected(_Message, frozen=True):
    """All sockets of this worker are open."""

    device: str
    num_params: int


class Joined(_Message, frozen=True):
    """The link between devices works."""

    kind: str


class Opened(_Message, frozen=True):
    """Ready for the cell's requests."""

    kv_bytes: int  # allocated for KV; 0 in a prefill worker
    steps: list[Step]


class Granted(_Message, frozen=True):
    """Room is kept."""

    request: int


class Prefilled(_Message, frozen=True):
    """A prompt was computed and its last byte left. Moments are of the host's monotonic clock."""

    request: int
    start_s: float
    computed_s: float  # the first token is there
    sent_s: float  # the last byte left
    link_bytes: int


class Finished(_Message, frozen=True):
    """A request has all its tokens."""

    request: int
    arrived_s: float  # all layers and the first token
    first_token_s: float
    done_s: float
    tokens: list[int]


class Closed(_Message, frozen=True):
    """What a cell took in this worker."""

    peak_kv_bytes: int  # held by sequences at once, reserved room included
    peak_device_bytes: int
    digest_s: float  # spent on digests, in threads beside the computation
    digest_bytes: int
    steps: list[tuple[int, int, float]]  # per decode step: sequences, tokens they hold in all, seconds


class Failed(_Message, frozen=True):
    """This worker cannot go on."""

    error: str


ToWorker: Any = Start | Connect | Join | Open | Reserve | Compute | Close
FromWorker: Any = Hello | Connected | Joined | Opened | Granted | Prefilled | Finished | Closed | Failed
