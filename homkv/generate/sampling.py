"""Choosing the next token of every sequence, on the device."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """``temperature`` 0 is greedy. ``top_p``: the smallest set of likeliest tokens with this probability remains."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


GREEDY = Sampling()


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """Next tokens ``[B] int64`` from ``logits [B, V] float32``. Waits for nothing: CUDA graphs can replay it.

    A token is drawn as ``argmax_i p_i / e_i`` with ``e_i`` exponential, which has probability ``p_i``.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    # The highest becomes 0 before the division, so that no temperature overflows.
    p = torch.softmax((logits - logits.amax(-1, keepdim=True)) / sampling.temperature, -1)
    if sampling.top_p < 1:
        ranked, order = p.sort(-1, descending=True)
        ranked = ranked.masked_fill(ranked.cumsum(-1) - ranked >= sampling.top_p, 0)  # the first token always stays
        p = torch.zeros_like(p).scatter(-1, order, ranked)
    return (p / torch.empty_like(p).exponential_(generator=generator)).argmax(-1)
