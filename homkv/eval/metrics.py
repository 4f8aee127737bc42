"""What is measured per token and per head. Shapes: T tokens, V vocabulary, H query heads, D head_dim."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from homkv.errors import ShapeError

ROWS = 64  # scored at once: in float64, every row of a large vocabulary takes megabytes


@dataclass(frozen=True)
class TokenScores:
    """One number per predicted token, in order.

    ``kl``: ``sum_x p(x) (log p(x) - log q(x))`` in nats, p exact; ``nll``: ``-log q(next token)`` in nats; ``top1``:
    1 where both models find the same token most likely; ``hit``: 1 where the most likely token is the text's next.
    """

    kl: list[float]
    nll: list[float]
    top1: list[int]
    hit: list[int]


def kl_divergence(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """``sum_x p(x) (log p(x) - log q(x))`` per row in fp64, from logits ``[N, V]``; shifts of a row do not matter."""
    p, q = (torch.log_softmax(x.double(), -1) for x in (p_logits, q_logits))
    return (p.exp() * (p - q)).sum(-1)


def token_scores(exact_logits: Tensor, logits: Tensor, targets: Tensor) -> TokenScores:
    """Score predictions ``logits [T, V]`` of ``targets [T]`` against the exact model's.

    Raises ShapeError unless the three belong to the same tokens.
    """
    if exact_logits.shape != logits.shape or logits.shape[:1] != targets.shape:
        raise ShapeError(
            f"expected logits [T, V] twice and targets [T], found {tuple(exact_logits.shape)}, {tuple(logits.shape)} "
            f"and {tuple(targets.shape)}; score the same tokens"
        )
    rows = zip(*(x.split(ROWS) for x in (exact_logits, logits, targets)), strict=True)
    return joined([_scores(p, q, target) for p, q, target in rows])


def _scores(exact_logits: Tensor, logits: Tensor, targets: Tensor) -> TokenScores:
    best = logits.argmax(-1)
    log_q = torch.log_softmax(logits.double(), -1)
    return TokenScores(
        kl=kl_divergence(exact_logits, logits).tolist(),
        nll=(-log_q.gather(-1, targets[:, None]))[:, 0].tolist(),
        top1=(best == exact_logits.argmax(-1)).int().tolist(),
        hit=(best == targets).int().tolist(),
    )


def joined(parts: Sequence[TokenScores]) -> TokenScores:
    """Scores of consecutive stretches of one text as one."""
    return TokenScores(
        kl=[x for part in parts for x in part.kl],
        nll=[x for part in parts for x in part.nll],
        top1=[x for part in parts for x in part.top1],
        hit=[x for part in parts for x in part.hit],
    )


def head_error(exact_o: Tensor, o: Tensor) -> list[float]:
    """Relative error of attention outputs ``[H, T, D]`` per head: ``||o - exact|| / ||exact||`` over tokens."""
    difference = (o.double() - exact_o.double()).flatten(1).norm(dim=1)
    found: list[float] = (difference / exact_o.double().flatten(1).norm(dim=1).clamp_min(1e-30)).tolist()
    return found


def first_miss(hit: Sequence[int]) -> int:
    """Number of tokens before the first miss; all of them if there is none.

    For a text that the exact model wrote greedily this is where greedy decoding on the format leaves it: up to there
    both are fed the same tokens.
    """
    return next((i for i, h in enumerate(hit) if not h), len(hit))


def edit_similarity(a: str, b: str) -> float:
    """``1 - levenshtein(a, b) / max(len(a), len(b))``: 1 for equal texts, 0 for texts with nothing in common."""
    if not a and not b:
        return 1.0
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return 1 - row[-1] / max(len(a), len(b))
