"""What all cases of one format say together, each mean with its interval, and which formats cannot be told apart."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from homkv.bootstrap import Estimate, difference, estimate, resolved, share
from homkv.eval.metrics import first_miss
from homkv.eval.record import EXACT, MODEL_BF16, Case

QUARTERS = 4


@dataclass(frozen=True, order=True)
class Setting:
    """How texts were measured: tokens of the prefix and behind it, and what the prefix itself attended to."""

    prefix: int
    scored: int
    prefill: str

    def __str__(self) -> str:
        prefill = "" if self.prefill == "exact" else f", {self.prefill} prefill"
        return f"{self.prefix:,} + {self.scored:,}{prefill}"


def by_setting(cases: Sequence[Case]) -> dict[Setting, list[Case]]:
    """Text cases by how they were measured, the setting with the most of them first."""
    found: dict[Setting, list[Case]] = {}
    for case in cases:
        if case.task == "text" and not case.error:
            found.setdefault(Setting(case.prefix, len(case.kl), case.prefill), []).append(case)
    return dict(sorted(found.items(), key=lambda pair: (-len(pair[1]), pair[0])))


@dataclass(frozen=True)
class Found:
    """``found`` of ``total`` prompts were answered to the letter; ``tokens``: share of the answers' tokens."""

    found: int
    total: int
    tokens: float

    def __str__(self) -> str:
        return f"{self.found}/{self.total}" if self.total else "–"

    @property
    def share(self) -> Estimate | None:
        """Of the prompts, with its interval; None without prompts."""
        return share(self.found, self.total) if self.total else None


@dataclass(frozen=True)
class Summary:
    """One format on one model.

    ``kl``: nats per token over texts; ``perplexity_ratio``: to the exact model's on the same texts; ``drift``: KL in
    the quarters of the scored tokens, first to last; ``drift_change``: last less first; ``passkey_by_length``: by
    tokens of the prompt; ``head_error``: mean relative error of attention ``[L][H]``; ``diverges``: greedy tokens
    before the first that differs from the exact model's, ``stayed``: texts without one; ``longer_than_bf16``: by how
    many more of them than the whole model in bfloat16 on the same texts; ``similarity``: edit similarity of completed
    code, but for the ``num_blank`` problems for which the exact model writes none; ``passed``: tests passed, of those
    that were run.
    """

    format: str
    num_texts: int
    num_tokens: int
    kl: Estimate | None
    perplexity: float | None
    perplexity_ratio: Estimate | None
    top1: Estimate | None
    drift: tuple[float, ...]
    drift_change: Estimate | None
    passkey: Found
    passkey_by_length: Mapping[int, Found]
    copy: Found
    diverges: Estimate | None
    stayed: Found
    longer_than_bf16: Estimate | None
    similarity: Estimate | None
    num_blank: int
    passed: Found
    head_error: list[list[float]]


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean of at least one value."""
    return math.fsum(values) / len(values)


def ones(flags: str) -> list[int]:
    """``"0110"`` as numbers."""
    return [int(flag) for flag in flags]


def summarize(cases: Sequence[Case]) -> list[Summary]:
    """One summary per format, in the order of appearance. Cases that failed are left out."""
    by_format: dict[str, list[Case]] = {}
    for case in cases:
        if not case.error:
            by_format.setdefault(case.format, []).append(case)
    exact, bf16 = by_format.get(EXACT, []), by_format.get(MODEL_BF16, [])
    return [_summary(name, found, exact, bf16) for name, found in by_format.items()]


def _summary(name: str, cases: Sequence[Case], exact: Sequence[Case], bf16: Sequence[Case]) -> Summary:
    texts = [c for c in cases if c.task == "text"]
    keys = [c for c in cases if c.task == "passkey"]
    greedy = [c for c in cases if c.task == "greedy"]
    code = [c for c in cases if c.similarity is not None]
    blank = {c.item for c in exact if c.task == "code" and not (c.text or "").strip()}
    written = [c.similarity or 0.0 for c in code if c.item not in blank]
    weights = [float(len(c.kl)) for c in texts]
    ran = [c for c in code if c.passed is not None]
    return Summary(
        format=name,
        num_texts=len(texts),
        num_tokens=sum(len(c.kl) for c in texts),
        kl=estimate([mean(c.kl) for c in texts], weights) if texts else None,
        perplexity=math.exp(mean([x for c in texts for x in c.nll])) if texts else None,
        perplexity_ratio=_exponential(_paired(_loss_of(texts), _loss_of(exact))),
        top1=estimate([mean(ones(c.top1)) for c in texts], weights) if texts else None,
        drift=_drift(texts),
        drift_change=estimate([d[-1] - d[0] for c in texts if (d := _drift([c]))]) if _drift(texts) else None,
        passkey=_found(keys),
        passkey_by_length={n + 1: _found([c for c in keys if c.prefix == n]) for n in sorted({c.prefix for c in keys})},
        copy=_found([c for c in cases if c.task == "copy"]),
        diverges=estimate([*_equal_tokens(greedy).values()]) if greedy else None,
        stayed=_found(greedy),
        longer_than_bf16=_paired(_equal_tokens(greedy), _equal_tokens(bf16)) if name != MODEL_BF16 else None,
        similarity=estimate(written) if written else None,
        num_blank=sum(c.item in blank for c in code),
        passed=Found(sum(bool(c.passed) for c in ran), len(ran), mean([bool(c.passed) for c in ran]) if ran else 0.0),
        head_error=_head_error(texts),
    )


def _loss_of(cases: Sequence[Case]) -> dict[str, float]:
    """Mean negative log-likelihood of every text."""
    return {c.item: mean(c.nll) for c in cases if c.task == "text"}


def _equal_tokens(cases: Sequence[Case]) -> dict[str, float]:
    """Tokens before the first that differs from the exact model's, of every greedy continuation."""
    return {c.item: float(first_miss(ones(c.hit))) for c in cases if c.task == "greedy"}


def _paired(values: Mapping[str, float], others: Mapping[str, float]) -> Estimate | None:
    """Mean difference over the items that both have; None if there are none."""
    shared = sorted(values.keys() & others.keys())
    return difference([values[i] for i in shared], [others[i] for i in shared]) if shared else None


def _exponential(found: Estimate | None) -> Estimate | None:
    """A difference of logarithms as a ratio."""
    if found is None:
        return None
    low, high = (None if x is None else math.exp(x) for x in (found.low, found.high))
    return Estimate(math.exp(found.mean), low, high)


def _found(cases: Sequence[Case]) -> Found:
    hits = [ones(c.hit) for c in cases]
    tokens = [x for hit in hits for x in hit]
    return Found(sum(all(hit) for hit in hits), len(cases), mean(tokens) if tokens else 0.0)


def _drift(texts: Sequence[Case]) -> tuple[float, ...]:
    """KL by position: mean over texts of each quarter of the scored tokens; empty where a quarter has no token."""
    if not texts or min(len(c.kl) for c in texts) < QUARTERS:
        return ()
    edges = [[len(c.kl) * i // QUARTERS for i in range(QUARTERS + 1)] for c in texts]
    return tuple(
        mean([x for c, at in zip(texts, edges, strict=True) for x in c.kl[at[i] : at[i + 1]]]) for i in range(QUARTERS)
    )


def _head_error(texts: Sequence[Case]) -> list[list[float]]:
    recorded = [c.head_error for c in texts if c.head_error]
    if not recorded:
        return []
    layers = range(len(recorded[0]))
    return [[mean([r[layer][head] for r in recorded]) for head in range(len(recorded[0][layer]))] for layer in layers]


def unresolved(cases: Sequence[Case]) -> list[tuple[str, str]]:
    """Neighbours in the order of KL whose paired difference over the same texts may be zero (95 %)."""
    by_format: dict[str, dict[str, float]] = {}
    for case in cases:
        if case.task == "text":
            by_format.setdefault(case.format, {})[case.item] = mean(case.kl)
    order = sorted(by_format, key=lambda name: mean(list(by_format[name].values())))
    pairs = []
    for a, b in pairwise(order):
        shared = sorted(by_format[a].keys() & by_format[b].keys())
        if not shared or not resolved(difference([by_format[a][i] for i in shared], [by_format[b][i] for i in shared])):
            pairs.append((a, b))
    return pairs


@dataclass(frozen=True)
class Choices:
    """How often another token than the exact model's is the most likely one, on ``tokens`` teacher-forced tokens of all
    lengths: by the format, by the whole model in bfloat16 on the same, and the paired difference. Shares."""

    tokens: int
    share: float
    bf16: float
    more: Estimate


def other_choices(cases: Sequence[Case]) -> dict[str, Choices]:
    """By format, where bfloat16 was measured on the same texts. A model that chooses so writes another text then."""
    by_format: dict[str, dict[tuple[int, int, str], Case]] = {}
    for c in cases:
        if c.task == "text" and c.prefill == "exact" and not c.error:
            by_format.setdefault(c.format, {})[c.prefix, len(c.kl), c.item] = c
    bf16, found = by_format.pop(MODEL_BF16, {}), dict[str, Choices]()
    for name, texts in by_format.items():
        shared = sorted(texts.keys() & bf16.keys())
        if not shared or name == EXACT:
            continue
        weights = [float(len(texts[at].top1)) for at in shared]
        own, its = ([1 - mean(ones(of[at].top1)) for at in shared] for of in (texts, bf16))
        found[name] = Choices(
            round(sum(weights)), estimate(own, weights).mean, estimate(its, weights).mean, difference(own, its, weights)
        )
    return found
