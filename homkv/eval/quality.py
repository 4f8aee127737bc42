"""Teacher-forced quality of a KV format: exact prefix, then one token at a time on the pages.

This is the disaggregated case: the prompt is computed exactly and stored compressed, every later token attends to
the stored form and is itself stored. KL is ``mean over tokens of sum_x p(x) (log p(x) - log q(x))`` in nats, p exact.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from homkv.cache import PagedCache
from homkv.errors import ShapeError
from homkv.eval.compare import kl_divergence
from homkv.formats import make_codec
from homkv.formats.per_layer import require_model
from homkv.hf import Attachment, KVCache
from homkv.models import LoadedModel
from homkv.models.forward import last_logits, returned_cache
from homkv.texts import PasskeyPrompt

Step = Callable[[], None]


@dataclass(frozen=True)
class ExactRun:
    """The unquantized model on ``ids [B, T]``: KV of the prefix and logits of everything behind it.

    ``keys values``: per layer ``[B, G, prefix, D]``; ``logits [B, T - prefix, V]``: row i predicts
    token prefix + i + 1.
    """

    ids: Tensor
    prefix: int
    keys: list[Tensor]
    values: list[Tensor]
    logits: Tensor


@dataclass(frozen=True)
class Divergence:
    """KL (nats) and share of equal most likely tokens, over ``num_tokens`` predictions."""

    kl: float
    top1: float
    num_tokens: int
    kl_per_row: list[float]


@torch.no_grad()
def run_exact(loaded: LoadedModel, ids: Tensor, prefix: int) -> ExactRun:
    """Compute ``ids [B, T]`` exactly in one pass. Raises ShapeError unless 0 < prefix < T <= context."""
    if not 0 < prefix < ids.shape[1] <= loaded.context_length:
        raise ShapeError(
            f"expected 0 < prefix < tokens <= {loaded.context_length}, found prefix {prefix} and {ids.shape[1]} tokens"
        )
    rows = [loaded.model(row[None], use_cache=True, logits_to_keep=ids.shape[1] - prefix) for row in ids]
    layers = range(loaded.num_layers)
    caches = [returned_cache(row) for row in rows]
    keys = [torch.cat([c.layers[i].keys[:, :, :prefix] for c in caches]) for i in layers]
    values = [torch.cat([c.layers[i].values[:, :, :prefix] for c in caches]) for i in layers]
    return ExactRun(ids, prefix, keys, values, torch.cat([r.logits for r in rows]))


def store_prefix(loaded: LoadedModel, exact: ExactRun, kv_cache_dtype: str, impl: str | None = None) -> KVCache:
    """Put the exact prefix into a fresh paged cache with room for the rest of ``ids``."""
    codec = make_codec(kv_cache_dtype, loaded.head_dim, loaded.rope)
    require_model(codec, lambda: loaded.fingerprint, loaded.num_layers)
    batch, total = exact.ids.shape
    paged = PagedCache(
        codec,
        num_layers=loaded.num_layers,
        num_kv_heads=loaded.num_kv_heads,
        num_blocks=batch * (codec.num_pages(total) + 1),
        max_sequences=batch,
        impl=impl,
    )
    seq_ids = [paged.new_sequence(total) for _ in range(batch)]
    for layer, (k, v) in enumerate(zip(exact.keys, exact.values, strict=True)):
        for row, seq_id in enumerate(seq_ids):
            paged.append(layer, seq_id, k[row], v[row])
    return KVCache.adopt(paged, seq_ids)


@torch.no_grad()
def decode_forced(
    loaded: LoadedModel, exact: ExactRun, kv_cache_dtype: str, *, impl: str | None = None, step: Step = lambda: None
) -> Iterable[Tensor]:
    """Feed the tokens behind the prefix one at a time; yields logits ``[B, V]`` for each."""
    cache = store_prefix(loaded, exact, kv_cache_dtype, impl)
    with Attachment(loaded.model, cache.codec, {}):  # the model was measured when it was loaded
        for t in range(exact.prefix, exact.ids.shape[1]):
            logits = last_logits(loaded.model, exact.ids[:, t : t + 1], cache)
            step()
            yield logits


def divergence(
    loaded: LoadedModel, exact: ExactRun, kv_cache_dtype: str, *, impl: str | None = None, step: Step = lambda: None
) -> Divergence:
    """Compare the compressed model with the exact one on the same tokens, every prediction behind the prefix."""
    kls, hits = [], []
    logits = decode_forced(loaded, exact, kv_cache_dtype, impl=impl, step=step)
    for t, found in enumerate(logits):
        p, q = exact.logits[:, t].float().numpy(), found.numpy()
        kls.append(kl_divergence(p, q))
        hits.append(p.argmax(-1) == q.argmax(-1))
    kl, hit = np.stack(kls, 1), np.stack(hits, 1)
    return Divergence(float(kl.mean()), float(hit.mean()), kl.size, kl.mean(1).tolist())


def passkey(
    loaded: LoadedModel, prompts: Iterable[PasskeyPrompt], kv_cache_dtypes: Iterable[str], *, step: Step = lambda: None
) -> dict[str, int]:
    """Number of prompts whose pass key each format repeats (argmax of every answer token, teacher-forced)."""
    found = dict.fromkeys(kv_cache_dtypes, 0)
    for prompt in prompts:
        ids = torch.tensor([prompt.prompt + prompt.answer])
        exact = run_exact(loaded, ids[:, :-1], len(prompt.prompt) - 1)
        answer = torch.tensor(prompt.answer)
        for name in found:
            predicted = torch.stack([x[0].argmax() for x in decode_forced(loaded, exact, name)])
            found[name] += int(torch.equal(predicted, answer))
            step()
    return found
