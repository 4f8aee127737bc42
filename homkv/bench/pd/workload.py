"""Requests to send: lengths drawn from ranges, arrivals of a Poisson process, the same for every format."""

import random
from dataclasses import dataclass

from homkv.errors import ShapeError
from homkv.sim.trace import Request, poisson_arrivals


@dataclass(frozen=True)
class Lengths:
    """Inclusive ranges of tokens. Raises ShapeError for a range that is empty or begins below 1."""

    prompt: tuple[int, int]
    output: tuple[int, int]

    def __post_init__(self) -> None:
        for what, (low, high) in (("prompt", self.prompt), ("output", self.output)):
            if not 1 <= low <= high:
                raise ShapeError(f"expected {what} lengths 1 <= low <= high, found {low} to {high}; swap or raise them")

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return self.prompt[1] + self.output[1]

    @property
    def shortest(self) -> int:
        """Tokens of the shortest sequence."""
        return self.prompt[0] + self.output[0]

    @property
    def mean(self) -> tuple[int, int]:
        """Tokens of a middling prompt and answer."""
        return sum(self.prompt) // 2, sum(self.output) // 2


WORKLOADS = {
    "short": Lengths((4096, 6144), (128, 512)),
    "long": Lengths((12288, 16384), (128, 512)),
    "64k": Lengths((65536, 65536), (128, 512)),
    "tiny": Lengths((150, 400), (4, 16)),
}


def poisson(lengths: Lengths, count: int, rate_rps: float, seed: int) -> list[Request]:
    """``count`` requests of a Poisson process with ``rate_rps`` requests per second; lengths do not depend on the rate.

    Raises ShapeError for a count, TraceError for a rate that is not positive.
    """
    if count < 1:
        raise ShapeError(f"expected at least one request, found {count}")
    draw = random.Random(seed)
    sizes = [(draw.randint(*lengths.prompt), draw.randint(*lengths.output)) for _ in range(count)]
    return poisson_arrivals((Request(str(i), 0.0, *size) for i, size in enumerate(sizes)), rate_rps, seed + 1)
