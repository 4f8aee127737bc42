"""Exact causal attention: whole prompts, and chunks with the sums that merging needs."""

import pytest
import torch

from homkv.attention.prefill import ROWS, causal, causal_partial, causal_window
from homkv.testing.cases import GROUPS
from homkv.testing.compare import assert_relative


def by_loops(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    o, lse = torch.zeros_like(q), torch.zeros(q.shape[:3], dtype=q.dtype)
    group = q.shape[1] // k.shape[1]
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for t in range(q.shape[2]):
                scores = k[b, h // group, : t + 1] @ q[b, h, t] * scale
                o[b, h, t] = torch.softmax(scores, 0) @ v[b, h // group, : t + 1]
                lse[b, h, t] = torch.logsumexp(scores, 0)
    return o, lse


@pytest.mark.parametrize("num_tokens", [1, 2, 65])
@pytest.mark.parametrize("group", GROUPS)
def test_queries_see_themselves_and_the_past(group: int, num_tokens: int) -> None:
    q = torch.randn(2, 2 * group, num_tokens, 16)
    k, v = torch.randn(2, 2, num_tokens, 16), torch.randn(2, 2, num_tokens, 16)
    expected_o, expected_lse = by_loops(q.double(), k.double(), v.double(), 0.3)
    o, lse = causal_partial(q, k, v, 0.3)
    assert_relative(o, expected_o, 1e-6)
    assert_relative(lse, expected_lse, 1e-6)
    assert_relative(causal(q, k, v, 0.3), expected_o, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtypes_of_models_are_kept(dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(1, heads, 40, 64, dtype=dtype) for heads in (6, 2, 2))
    expected, _ = by_loops(q.double(), k.double(), v.double(), 0.125)
    o = causal(q, k, v, 0.125)
    assert o.dtype == dtype
    assert_relative(o, expected, 4 * torch.finfo(dtype).eps)
    assert causal_partial(q, k, v, 0.125)[0].dtype == torch.float32


@pytest.mark.parametrize(("size", "num_new"), [(40, 40), (40, 3), (40, 1), (5, 5), (ROWS + 70, ROWS + 20)])
@pytest.mark.parametrize("window", [1, 7, 64])
def test_a_sliding_window_hides_what_is_older(size: int, num_new: int, window: int) -> None:
    q = torch.randn(2, 6, num_new, 16)
    k, v = torch.randn(2, 2, size, 16), torch.randn(2, 2, size, 16)
    age = torch.arange(size - num_new, size).unsqueeze(1) - torch.arange(size)
    scores = q.unflatten(1, (2, 3)).double() @ k.double().unsqueeze(2).mT * 0.3
    scores = scores.masked_fill((age < 0) | (age >= window), -torch.inf)
    expected = (torch.softmax(scores, -1) @ v.double().unsqueeze(2)).flatten(1, 2)
    assert_relative(causal_window(q, k, v, 0.3, window), expected, 1e-6)


def test_a_sliding_window_hides_padding() -> None:
    q, k, v = torch.randn(2, 6, 20, 16), torch.randn(2, 2, 30, 16), torch.randn(2, 2, 30, 16)
    real = torch.ones(2, 30)
    real[1, :14] = 0
    found = causal_window(q, k, v, 0.3, 8, real)
    assert torch.isfinite(found).all()
    assert_relative(found[0], causal_window(q, k, v, 0.3, 8)[0], 1e-6)
    assert_relative(found[1, :, 4:], causal_window(q[1:, :, 4:], k[1:, :, 14:], v[1:, :, 14:], 0.3, 8)[0], 1e-6)
