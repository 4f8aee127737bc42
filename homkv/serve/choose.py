"""Choosing the next token from logits, alike wherever it happens."""

import hashlib

import torch
from torch import Tensor

from homkv.errors import FormatError
from homkv.serve.messages import Choice, Sampling

LOWEST_LOGPROB = -9999.0  # what OpenAI says of the most unlikely tokens; JSON has no infinity


def choose(logits: Tensor, sampling: Sampling, index: int) -> Choice:
    """Choose token ``index`` of an answer from ``logits [V]``, with the log probabilities that were asked for.

    Greedy at temperature 0, else nucleus sampling. Raises FormatError as :func:`sample` does.
    """
    token = sample(logits, sampling, index)
    if sampling.num_logprobs is None:
        return Choice(token)
    logprobs = torch.log_softmax(logits.double(), -1).clamp(min=LOWEST_LOGPROB)
    best = logprobs.topk(min(sampling.num_logprobs, len(logprobs)))
    top = list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return Choice(token, float(logprobs[token]), top)


def sample(logits: Tensor, sampling: Sampling, index: int) -> int:
    """Choose a token from ``logits [V]``; the draw depends on ``sampling.seed`` and ``index`` only.

    Raises FormatError if the logits hold NaN or infinity: every token chosen from them would be noise.
    """
    highest = logits.max().double()
    if not bool(torch.isfinite(highest)):  # max() passes NaN on; -inf elsewhere masks a token
        raise FormatError(
            f"expected finite logits, found {float(highest)} among them; the model overflowed: load it in another dtype"
        )
    if sampling.temperature == 0:
        return int(logits.argmax())
    # The highest becomes 0 before the division, so that no temperature overflows.
    p, order = torch.softmax((logits.double() - highest) / sampling.temperature, -1).sort(descending=True)
    p[p.cumsum(-1) - p >= sampling.top_p] = 0  # the first token always stays
    generator = torch.Generator().manual_seed(_mixed(sampling.seed, index))
    return int(order[torch.multinomial(p, 1, generator=generator)])


def _mixed(seed: int, index: int) -> int:
    """32 bits, all that torch's generator takes in, of both numbers."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=4).digest())
