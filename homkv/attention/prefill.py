"""Exact causal attention of new tokens among themselves: the prefill half, and a chunk's own triangle."""

import torch
from torch import Tensor


def causal(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> Tensor:
    """Causal attention ``q [B, H, T, D]``, ``k v [B, G, T, D]`` to ``[B, H, T, D]``, by torch's fused SDPA."""
    return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=softmax_scale, enable_gqa=q.shape[1] != k.shape[1]
    )


def causal_partial(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> tuple[Tensor, Tensor]:
    """Like :func:`causal` in float32, with ``lse [B, H, T]`` so that attention over older pages can be merged in."""
    b, h, t, d = q.shape
    groups = k.shape[1]
    rows = q.float().reshape(b, groups, h // groups, t, d)
    scores = rows @ k.float().unsqueeze(2).transpose(-1, -2) * softmax_scale
    future = torch.ones(t, t, dtype=torch.bool, device=q.device).triu(1)
    scores = scores.masked_fill(future, -torch.inf)
    o = torch.softmax(scores, -1) @ v.float().unsqueeze(2)
    return o.reshape(b, h, t, d), torch.logsumexp(scores, -1).reshape(b, h, t)
