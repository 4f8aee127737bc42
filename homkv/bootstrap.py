"""How far a mean over texts or prompts can be trusted: percentile bootstrap, paired between formats.

Texts, not tokens, are drawn again: tokens of one text err together. All formats are drawn alike (one seed), so that the
interval of a difference is that of paired differences.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from homkv.errors import ShapeError

ROUNDS = 4000
LEVEL = 0.95
FEWEST = 3  # texts; with fewer no interval is given


@dataclass(frozen=True)
class Estimate:
    """A mean and its interval; ``low`` and ``high`` are None with fewer than three texts or prompts."""

    mean: float
    low: float | None
    high: float | None


def draws(count: int, seed: int = 0, rounds: int = ROUNDS) -> NDArray[np.int64]:
    """``[rounds, count]``: which items each round takes, with replacement."""
    return np.random.default_rng(seed).integers(0, count, (rounds, count))


def estimate(values: Sequence[float], weights: Sequence[float] | None = None, seed: int = 0) -> Estimate:
    """Weighted mean of one value per text, and the interval that holds the true mean in 95 of 100 samples.

    ``weights``: tokens behind each value; equal if None. Raises ShapeError without values or if lengths differ.
    """
    x = np.asarray(values, np.float64)
    w = np.ones_like(x) if weights is None else np.asarray(weights, np.float64)
    if not x.size or x.shape != w.shape:
        raise ShapeError(f"expected one weight for each of at least one value, found {x.shape} and {w.shape}")
    mean = float((x * w).sum() / w.sum())
    if x.size < FEWEST:
        return Estimate(mean, None, None)
    at = draws(x.size, seed)
    means = (x[at] * w[at]).sum(1) / w[at].sum(1)
    low, high = np.quantile(means, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return Estimate(mean, float(low), float(high))


def difference(a: Sequence[float], b: Sequence[float], weights: Sequence[float] | None = None) -> Estimate:
    """Mean of ``a - b`` over the same texts. Raises ShapeError if they are not paired."""
    if len(a) != len(b):
        raise ShapeError(f"expected values of the same texts, found {len(a)} and {len(b)}")
    return estimate([x - y for x, y in zip(a, b, strict=True)], weights)


def share(found: int, total: int) -> Estimate:
    """Share of ``total`` prompts that were answered, with Wilson's interval: of prompts that all are, drawing them
    again would say that nothing can go wrong. Raises ShapeError without prompts."""
    if not 0 <= found <= total or not total:
        raise ShapeError(f"expected 0 <= found <= total and at least one prompt, found {found} of {total}")
    z, p = NormalDist().inv_cdf((1 + LEVEL) / 2), found / total
    middle, spread = p + z * z / (2 * total), z * math.sqrt(p * (1 - p) / total + (z / (2 * total)) ** 2)
    return Estimate(p, *((middle + sign * spread) / (1 + z * z / total) for sign in (-1, 1)))


def resolved(found: Estimate) -> bool:
    """Whether a difference's interval leaves zero out."""
    return found.low is not None and found.high is not None and (found.low > 0 or found.high < 0)
