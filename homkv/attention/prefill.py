"""Exact causal attention of new tokens among themselves: the prefill half, and a chunk's own triangle."""

import torch
from torch import Tensor

ROWS = 512  # queries of a sliding window that are computed at once: their scores are [ROWS, ROWS + window]


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


def causal_window(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, window: int, real: Tensor | None = None
) -> Tensor:
    """Causal attention to the newest ``window`` tokens, oneself included.

    ``q [B, H, T, D]``: of the newest T of the S tokens of ``k v [B, G, S, D]``; ``real [B, S]``: which tokens are no
    padding, None for all. Returns ``[B, H, T, D]``.
    """
    (groups, size), num_new = k.shape[1:3], q.shape[2]
    parts = []
    for start in range(0, num_new, ROWS):
        stop = min(start + ROWS, num_new)
        first, last = max(size - num_new + start - window + 1, 0), size - num_new + stop
        rows = torch.arange(size - num_new + start, last, device=q.device).unsqueeze(1)
        columns = torch.arange(first, last, device=q.device)
        mask = (columns <= rows) & (columns > rows - window)
        if real is not None:  # padding sees itself, so that no row of scores is empty
            mask = mask & real[:, None, None, first:last].bool() | (columns == rows)
        parts.append(
            torch.nn.functional.scaled_dot_product_attention(
                q[:, :, start:stop], k[:, :, first:last], v[:, :, first:last], attn_mask=mask, scale=softmax_scale,
                enable_gqa=q.shape[1] != groups,
            )
        )  # fmt: skip
    return torch.cat(parts, 2)
