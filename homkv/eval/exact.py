"""The unquantized model on one text: computed once, compared with every format.

The prefix is prefilled, the tail behind it computed in one pass, in which queries and attention outputs of every
layer are kept. Or the model writes the tail itself, greedily.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from homkv.errors import ShapeError
from homkv.hf.cache import seen_later
from homkv.models import LoadedModel
from homkv.models.forward import forward_with_cache, returned_cache

RECORDING = "homkv-recording"
CHUNK = 2048  # tokens of a prefix that are computed at once: scores of all of a long one would not fit into memory


@dataclass(frozen=True)
class TailLayer:
    """One layer of the tail: queries and attention outputs ``[H, T, D]``, keys and values ``[G, T, D]``."""

    softmax_scale: float
    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor


@dataclass(frozen=True)
class ExactRun:
    """The unquantized model on ``ids [T]``.

    ``keys values``: of the prefix, per layer of full attention ``[G, prefix, D]``; ``sliding``: both of every other
    layer, as far as the tail sees it; ``logits [T - prefix, V]``: row i predicts token ``prefix + i + 1``; ``tail``:
    per layer of full attention, empty if it was not recorded.
    """

    ids: Tensor
    prefix: int
    keys: list[Tensor]
    values: list[Tensor]
    sliding: list[tuple[Tensor, Tensor]]
    logits: Tensor
    tail: list[TailLayer]


class _Recorder:
    """SDPA that keeps what went in and out, one entry per layer of full attention."""

    def __init__(self) -> None:
        self.layers: list[TailLayer] = []

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        o, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        if kwargs.get("sliding_window") is not None:
            return o, None
        count, scale = query.shape[2], kwargs.get("scaling") or query.shape[3] ** -0.5
        k, v = key[0, :, -count:].clone(), value[0, :, -count:].clone()
        self.layers.append(TailLayer(scale, query[0].clone(), k, v, o[0].transpose(0, 1).clone()))
        return o, None


@contextmanager
def _recording(model: PreTrainedModel) -> Iterator[list[TailLayer]]:
    """Let the model attend through a recorder inside the block."""
    recorder, before = _Recorder(), str(model.config._attn_implementation)
    AttentionInterface.register(RECORDING, recorder)
    AttentionMaskInterface.register(RECORDING, sdpa_mask)
    model.set_attn_implementation(RECORDING)
    try:
        yield recorder.layers
    finally:
        model.set_attn_implementation(before)


def check_lengths(loaded: LoadedModel, prefix: int, total: int) -> None:
    """Raise ShapeError unless 0 < prefix < total <= the model's context."""
    if not 0 < prefix < total <= loaded.context_length:
        raise ShapeError(
            f"expected 0 < prefix < tokens <= {loaded.context_length}, the model's context, found prefix {prefix} and "
            f"{total} tokens; choose shorter ones"
        )


@torch.no_grad()
def run_exact(loaded: LoadedModel, ids: Tensor, prefix: int, *, record: bool = False) -> ExactRun:
    """Compute ``ids [T]`` exactly: the prefix, then the rest in one pass. Raises as :func:`check_lengths`."""
    check_lengths(loaded, prefix, len(ids))
    ids = ids.to(loaded.model.device)
    cache = _prefill(loaded, ids[:prefix])
    keys, values, sliding = [], [], []
    for layer, window in zip(cache.layers, loaded.sliding_windows, strict=True):
        k, v = layer.keys[0], layer.values[0]  # which later tokens leave alone
        if window is None:
            keys.append(k)
            values.append(v)
        else:
            sliding.append((seen_later(k, window), seen_later(v, window)))
    recording: AbstractContextManager[list[TailLayer]] = _recording(loaded.model) if record else nullcontext([])
    with recording as tail:
        logits = forward_with_cache(loaded.model, ids[None, prefix:], cache).logits[0]
    return ExactRun(ids, prefix, keys, values, sliding, logits.float(), tail)


@torch.no_grad()
def continue_greedily(loaded: LoadedModel, ids: Tensor, count: int) -> Tensor:
    """The ``count`` tokens that the exact model writes behind each row of ``ids [B, T]``, greedily; stops at none."""
    check_lengths(loaded, ids.shape[1] - 1, ids.shape[1] - 1 + count)
    ids = ids.to(loaded.model.device)
    caches = [_prefill(loaded, row[:-1]) for row in ids]
    cache = caches[0] if len(caches) == 1 else joined_caches(caches)
    tokens = [ids[:, -1:]]
    for _ in range(count):
        tokens.append(forward_with_cache(loaded.model, tokens[-1], cache).logits[:, -1:].argmax(-1))
    return torch.cat(tokens[1:], 1).cpu()


def joined_caches(caches: Sequence[DynamicCache]) -> DynamicCache:
    """One cache of several texts of one length, each prefilled by itself: a long prompt's scores take much memory."""
    joined = DynamicCache()
    for layer, parts in enumerate(zip(*(cache.layers for cache in caches), strict=True)):
        joined.update(torch.cat([x.keys for x in parts]), torch.cat([x.values for x in parts]), layer)
    return joined


def _prefill(loaded: LoadedModel, ids: Tensor) -> DynamicCache:
    """The cache behind ``ids [T]``, with all tokens in every layer: sliding windows are left to the mask."""
    cache = DynamicCache()
    for chunk in ids.split(CHUNK):
        cache = returned_cache(forward_with_cache(loaded.model, chunk[None], cache, logits_to_keep=1))
    return cache
