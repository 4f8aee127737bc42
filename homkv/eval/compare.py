"""Two answers to one prompt, compared: the same tokens, and how far the distributions are apart."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from homkv.errors import ShapeError
from homkv.eval import metrics


@dataclass(frozen=True)
class Agreement:
    """How an answer relates to the exact model's.

    ``kl``: mean of ``KL(exact || compressed)`` in nats, ``top1``: share of equal most likely tokens, both over the
    ``num_scored`` tokens that the decode instance computed on one and the same text.
    """

    num_tokens: int
    num_equal: int  # same token at the same place, free running
    first_difference: int | None
    kl: float
    top1: float
    num_scored: int


def kl_divergence(p_logits: NDArray[np.float32], q_logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """homkv.eval.metrics.kl_divergence of arrays: ``sum_x p(x) (log p(x) - log q(x))`` per row of ``[N, V]``."""
    result: NDArray[np.float64] = metrics.kl_divergence(torch.tensor(p_logits), torch.tensor(q_logits)).numpy()
    return result


def agreement(
    exact_tokens: list[int],
    tokens: list[int],
    exact_logits: NDArray[np.float32],
    forced_logits: NDArray[np.float32],
) -> Agreement:
    """Compare a free-running answer by tokens, and a forced one (fed the exact answer) by logits ``[N, V]``."""
    if exact_logits.shape != forced_logits.shape or not len(exact_logits):
        raise ShapeError(
            f"expected logits of the same text, found {exact_logits.shape} and {forced_logits.shape}; generate at "
            "least two tokens"
        )
    pairs = list(zip(exact_tokens, tokens, strict=False))
    differing = [i for i, (a, b) in enumerate(pairs) if a != b]
    if len(exact_tokens) != len(tokens) and not differing:
        differing = [len(pairs)]
    return Agreement(
        num_tokens=len(exact_tokens),
        num_equal=sum(a == b for a, b in pairs),
        first_difference=differing[0] if differing else None,
        kl=float(kl_divergence(exact_logits, forced_logits).mean()),
        top1=float((exact_logits.argmax(-1) == forced_logits.argmax(-1)).mean()),
        num_scored=len(exact_logits),
    )
