"""Scores of two answers against torch's own arithmetic."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from homkv.errors import ShapeError
from homkv.eval.compare import agreement, kl_divergence


def logits(seed: int, scale: float = 1.0) -> np.ndarray:
    return (scale * np.random.default_rng(seed).standard_normal((5, 300))).astype(np.float32)


@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_kl_divergence_is_torchs(scale: float) -> None:
    p, q = logits(0, scale), logits(1, scale)
    log_p, log_q = (torch.log_softmax(torch.from_numpy(x).double(), -1) for x in (p, q))
    expected = functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    np.testing.assert_allclose(kl_divergence(p, q), expected.numpy(), rtol=1e-9, atol=1e-12)


def test_kl_divergence_does_not_overflow_and_ignores_a_shift() -> None:
    p, q = logits(0), logits(1)
    np.testing.assert_allclose(kl_divergence(p + 3e4, q - 3e4), kl_divergence(p, q), rtol=0.02)
    np.testing.assert_array_equal(kl_divergence(p, p), np.zeros(5))


def test_scores_of_answers_that_part() -> None:
    exact, forced = logits(0), logits(0)
    forced[2, forced[2].argmax()] = -10  # another most likely token in one of five
    score = agreement([1, 2, 3, 4, 5, 6], [1, 2, 9, 4, 8, 6], exact, forced)
    assert (score.num_tokens, score.num_equal, score.first_difference) == (6, 4, 2)
    assert (score.num_scored, score.top1) == (5, pytest.approx(0.8))
    assert score.kl == pytest.approx(kl_divergence(exact, forced).mean())


def test_equal_answers_have_no_difference() -> None:
    score = agreement([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6], logits(0), logits(0))
    assert (score.num_equal, score.first_difference, score.kl, score.top1) == (6, None, 0.0, 1.0)


@pytest.mark.parametrize("tokens", [[1, 2, 3], [1, 2, 3, 4, 5, 6, 7]])
def test_an_answer_that_ends_elsewhere_differs_there(tokens: list[int]) -> None:
    score = agreement([1, 2, 3, 4, 5, 6], tokens, logits(0), logits(0))
    assert score.first_difference == min(len(tokens), 6)
    assert score.num_equal == min(len(tokens), 6)


@pytest.mark.parametrize("rows", [0, 4])
def test_logits_of_different_texts_are_refused(rows: int) -> None:
    with pytest.raises(ShapeError, match="same text"):
        agreement([1, 2], [1, 2], logits(0)[:rows], logits(0)[: 5 if rows else 0])
