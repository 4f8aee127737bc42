"""What a load consists of: prompts, and when they are sent. A pure function of the options."""

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from homkv.errors import ShapeError
from homkv.sim.trace import PREFIX_BLOCK_TOKENS, Request, read_trace, scaled


@dataclass(frozen=True)
class LoadOptions:
    """What is sent, and for how long.

    Arrivals are those of ``trace``, a file that `homkv.sim.trace` reads, ``speed`` times faster and with lengths
    times ``token_scale``; or a Poisson process of ``rate`` requests per second (with a trace: of its lengths); or
    neither: ``concurrency`` streams, each followed by the next. It ends after ``num_requests``, or, if ``duration_s``
    is given, when that is over. Every prompt has its own words, unless ``shared_words`` of its beginning are the same
    for all, or the trace says what is shared. ``sample_s``: seconds between looks at the service's resources.
    """

    url: str
    num_requests: int = 200
    concurrency: int = 200
    rate: float | None = None
    trace: Path | None = None
    speed: float = 1.0
    token_scale: float = 1.0
    duration_s: float | None = None
    sample_s: float | None = None
    prompt_words: int = 60
    shared_words: int = 0
    max_tokens: int = 64
    api_key: str | None = None
    seed: int = 0
    timeout_s: float = 1800.0

    def __post_init__(self) -> None:
        numbers = ("num_requests", "concurrency", "prompt_words", "max_tokens", "timeout_s")
        for name in (*numbers, "rate", "speed", "token_scale", "duration_s", "sample_s"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ShapeError(f"expected a positive and finite {name}, found {value}; leave it out for the default")
        if not 0 <= self.shared_words <= self.prompt_words:
            raise ShapeError(f"expected 0 to {self.prompt_words} shared words, found {self.shared_words}")

    @property
    def is_open(self) -> bool:
        """Whether requests come at times of their own, however many are under way."""
        return self.rate is not None or self.trace is not None


@dataclass(frozen=True)
class Ask:
    """One request. ``at_s``: seconds since the start; 0 where it follows another one."""

    prompt: str
    max_tokens: int
    at_s: float = 0.0


def asks(o: LoadOptions) -> Iterator[Ask]:
    """What to send, in order. Raises TraceError, which names the line and the reason, for a trace it cannot read."""
    if o.trace is not None:
        requests = read_trace(o.trace, requests_per_s=o.rate, seed=o.seed)
        limit = o.num_requests if o.duration_s is None else None
        chosen = scaled(requests, tokens=o.token_scale, speed=o.speed, limit=limit)
        return (_traced(o, request, number, chosen[0].arrival_s) for number, request in enumerate(chosen))
    numbers = range(o.num_requests) if o.duration_s is None else itertools.count()
    return (_made(o, number, at_s) for number, at_s in zip(numbers, _times(o), strict=False))


def _times(o: LoadOptions) -> Iterator[float]:
    gaps, at_s = random.Random(o.seed), 0.0
    while True:
        yield at_s
        at_s += 0.0 if o.rate is None else gaps.expovariate(o.rate)


def _made(o: LoadOptions, number: int, at_s: float) -> Ask:
    shared = _words(f"{o.seed}", o.shared_words)
    own = _words(f"{o.seed}/{number}", o.prompt_words - o.shared_words)
    return Ask(" ".join(shared + own), o.max_tokens, at_s)


def _traced(o: LoadOptions, request: Request, number: int, start_s: float) -> Ask:
    """A prompt of about as many tokens as the trace's, one word each; equal blocks have equal words."""
    blocks = (_words(f"{o.seed}/block/{block}", PREFIX_BLOCK_TOKENS) for block in request.prefix_blocks)
    words = list(itertools.islice(itertools.chain.from_iterable(blocks), request.prompt_tokens))
    words += _words(f"{o.seed}/{number}", request.prompt_tokens - len(words))
    return Ask(" ".join(words), request.output_tokens, request.arrival_s - start_s)


def _words(seed: str, count: int) -> list[str]:
    return random.Random(seed).choices(WORDS, k=count)


_WORDS = (
    "time person year way day thing man world life hand part child eye woman place work week case point government "
    "company number group problem fact light river stone winter letter music window garden engine market story"
)
WORDS = _WORDS.split()
