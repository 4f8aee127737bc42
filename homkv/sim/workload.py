"""Requests drawn from a length profile: seeded, Poisson arrivals."""

import math
import random

from homkv.errors import TraceError, UnsupportedError
from homkv.sim.hardware import data
from homkv.sim.trace import Request

Range = tuple[int, int]


def lengths_of(name: str) -> tuple[Range, Range]:
    """Ranges of prompt and answer lengths of a profile in data/profiles.json. Raises UnsupportedError."""
    known = data("profiles.json")["profiles"]
    if name not in known:
        raise UnsupportedError(f"expected a length profile out of {', '.join(known)}, found {name!r}")
    (low, high), (shortest, longest) = known[name]["prompt"], known[name]["output"]
    return (low, high), (shortest, longest)


def mean_lengths(prompt: Range, output: Range) -> tuple[int, int]:
    """Mean prompt and answer, whole tokens."""
    return sum(prompt) // 2, sum(output) // 2


def draw(prompt: Range, output: Range, requests_per_s: float, num_requests: int, seed: int = 0) -> list[Request]:
    """Requests with uniform lengths and exponential gaps, a pure function of the arguments. Raises TraceError."""
    if not (math.isfinite(requests_per_s) and requests_per_s > 0) or num_requests < 1:
        raise TraceError(
            f"expected a positive rate and number of requests, found {requests_per_s!r} and {num_requests!r}"
        )
    if not 1 <= prompt[0] <= prompt[1] or not 1 <= output[0] <= output[1]:
        raise TraceError(f"expected ranges 1 <= low <= high of tokens, found {prompt} and {output}")
    rng = random.Random(seed)
    at, out = 0.0, []
    for i in range(num_requests):
        at += rng.expovariate(requests_per_s)
        out.append(Request(str(i), at, rng.randint(*prompt), rng.randint(*output)))
    return out
