"""Exact causal attention: whole prompts, and chunks with the sums that merging needs."""

import pytest
import torch

from homkv.attention.prefill import causal, causal_partial
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
