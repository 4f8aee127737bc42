"""Step times of a real machine, fitted to the microbenchmarks in its own record: never to its job completion times."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import get_args

import msgspec
import numpy as np
from numpy.typing import NDArray

from homkv.errors import TraceError
from homkv.sim.record import Run, Stage, StepSample

Basis = Callable[[StepSample], Sequence[float]]
POLYNOMIAL: Basis = lambda s: (1.0, s.tokens, s.tokens**2)  # noqa: E731
LINEAR: Basis = lambda s: (1.0, s.tokens)  # noqa: E731
DECODE: Basis = lambda s: (1.0, s.batch, s.batch * s.tokens)  # noqa: E731


@dataclass(frozen=True)
class FittedCosts:
    """`homkv.sim.costs.Costs` of one run.

        prefill_s = a0 + a1 n + a2 n^2       pack_s, unpack_s = b0 + b1 n       step = c0 + c1 B + c2 B context

    Bytes are those of the record's requests, by number of tokens.
    """

    num_layers: int
    prefill: tuple[float, ...]
    pack: tuple[float, ...]
    unpack: tuple[float, ...]
    decode: tuple[float, ...]
    wire: Mapping[int, int]
    kv: Mapping[int, int]
    stages: int = 1
    dequantize_per_token_s: float = 0.0  # not told apart in a real step
    dequantize_step_s: float = 0.0

    def prefill_s(self, tokens: int, cached_tokens: int) -> float:
        """See the class. A record has no prefix cache, so ``cached_tokens`` is 0."""
        a0, a1, a2 = self.prefill
        return a0 + a1 * tokens + a2 * tokens**2

    def pack_s(self, tokens: int) -> float:
        """See the class."""
        return self.pack[0] + self.pack[1] * tokens

    def unpack_s(self, tokens: int) -> float:
        """See the class."""
        return self.unpack[0] + self.unpack[1] * tokens

    def step_s(self, batch: int) -> float:
        """See the class."""
        return self.decode[0] + self.decode[1] * batch

    @property
    def per_token_s(self) -> float:
        """See the class."""
        return self.decode[2]

    def wire_bytes(self, tokens: int) -> int:
        """Bytes of the record's prompts of this length."""
        return self.wire[tokens]

    def kv_bytes(self, tokens: int) -> int:
        """Bytes of the record's sequences of this length."""
        return self.kv[tokens]


def fit(run: Run) -> FittedCosts:
    """Fit a run's step samples. Raises TraceError, naming the stage, if prefill or decode were not measured."""
    stages = {stage: medians(s for s in run.steps if s.stage == stage and not s.beside) for stage in get_args(Stage)}
    for stage in ("prefill", "decode"):
        if not stages[stage]:
            raise TraceError(
                f"run {run.info.run_id!r}: expected step lines of {stage}, found none; "
                "write records with `homkv bench jct`, which measures them"
            )
    return FittedCosts(
        num_layers=run.info.num_layers,
        prefill=non_negative_fit(stages["prefill"], POLYNOMIAL),
        pack=non_negative_fit(stages["pack"], LINEAR),
        unpack=non_negative_fit(stages["unpack"], LINEAR),
        decode=non_negative_fit(stages["decode"], DECODE),
        wire={r.prompt_tokens: r.wire_bytes for r in run.requests},
        kv={r.prompt_tokens + r.output_tokens: r.kv_bytes for r in run.requests},
    )


def beside(run: Run, record: Iterable[Run] = ()) -> tuple[float, float]:
    """How many times longer a prompt takes beside decoding, and a decode step beside a prompt; 1 without samples.

    Each is a measured time over what the fit of the times at rest gives for the same batch and tokens: the median of
    such ratios, at least 1. A run without samples takes the means of the other runs of its ``record`` on the same
    devices.
    """
    if not any(s.beside for s in run.steps):
        others = [r for r in record if shares_devices(r, run) and any(s.beside for s in r.steps)]
        known = [beside(r) for r in others] or [(1.0, 1.0)]
        return fmean(p for p, _ in known), fmean(d for _, d in known)
    costs = fit(run)
    ratios: dict[str, list[float]] = {"prefill": [], "decode": []}
    for s in run.steps:
        if s.beside:
            at_rest = (
                costs.prefill_s(s.tokens, 0)
                if s.stage == "prefill"
                else costs.step_s(s.batch) + costs.per_token_s * s.batch * s.tokens
            )
            ratios[s.stage].append(s.seconds / at_rest)
    prefill, decode = (max(1.0, median(found)) if found else 1.0 for found in ratios.values())
    return prefill, decode


def shares_devices(a: Run, b: Run) -> bool:
    """Whether two runs had the same machine, and the same devices of it."""
    return a.info.machine == b.info.machine and a.info.options.get("devices") == b.info.options.get("devices")


def handoff_s(run: Run) -> float:
    """Median of a run's handoff samples; 0 without any."""
    samples = [s.seconds for s in run.steps if s.stage == "handoff"]
    return median(samples) if samples else 0.0


def seal_per_token_s(run: Run, record: Iterable[Run] = ()) -> float:
    """What sealing pages between steps adds to a token of one sequence, by the median of samples; 0 without any.

    A run without samples takes those of its format in the other runs of its ``record`` on the same devices.
    """
    samples = seals(run)
    if not samples:
        same = (r for r in record if r.info.kv_cache_dtype == run.info.kv_cache_dtype and shares_devices(r, run))
        samples = [x for r in same for x in seals(r)]
    return median(samples) if samples else 0.0


def seals(run: Run) -> list[float]:
    """A run's samples of sealing, per token."""
    return [s.seconds / s.tokens for s in run.steps if s.stage == "seal"]


def medians(samples: Iterable[StepSample]) -> list[StepSample]:
    """One sample for all that were taken of one step, their median: one that was disturbed must not move a fit."""
    groups: dict[tuple[int, int], list[StepSample]] = {}
    for s in samples:
        groups.setdefault((s.batch, s.tokens), []).append(s)
    return [msgspec.structs.replace(group[0], seconds=median(s.seconds for s in group)) for group in groups.values()]


def non_negative_fit(samples: Sequence[StepSample], basis: Basis) -> tuple[float, ...]:
    """Coefficients of ``basis`` of least squared relative error, none negative; all zero without samples.

    Of terms that the samples cannot tell apart the first is left out, and what would come out negative.
    """
    width = len(basis(StepSample(run_id="", stage="pack", batch=1, tokens=1, seconds=0.0)))
    out = np.zeros(width)
    if not samples:
        return tuple(out)
    seconds = np.maximum([s.seconds for s in samples], 1e-9)
    rows = np.array([basis(s) for s in samples], dtype=np.float64) / seconds[:, None]
    terms = list(range(width))
    while terms:
        chosen = rows[:, terms]
        if rank_of(chosen) < len(terms):
            del terms[next(i for i in range(len(terms)) if rank_of(np.delete(chosen, i, 1)) == rank_of(chosen))]
            continue
        solved, *_ = np.linalg.lstsq(chosen, np.ones(len(samples)), rcond=None)
        if solved.min() >= 0:
            out[terms] = solved
            break
        terms.remove(terms[int(solved.argmin())])
    return tuple(float(x) for x in out)


def rank_of(rows: NDArray[np.float64]) -> int:
    """Columns that are independent of one another, each as large as the others."""
    return int(np.linalg.matrix_rank(rows / np.abs(rows).max(0).clip(1e-300), tol=1e-6))
