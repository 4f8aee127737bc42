"""Calling a model with its KV cache, whatever the installed transformers names the argument."""

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

CACHE_NAMES = ("cache", "past_key_values")  # since transformers 5.24; before, and in models with code of their own


def cache_argument(model: PreTrainedModel) -> str:
    """Name of the argument of ``model.forward`` that takes the cache."""
    parameters = inspect.signature(type(model).forward).parameters
    return next((name for name in CACHE_NAMES if name in parameters), CACHE_NAMES[-1])


def forward_with_cache(model: PreTrainedModel, ids: Tensor, cache: Any, **options: Any) -> Any:
    """Run ``ids [B, T]`` behind what ``cache`` holds, which takes in the new tokens. Returns the model's output."""
    return model(ids, use_cache=True, **{cache_argument(model): cache}, **options)


def returned_cache(output: Any) -> Any:
    """The cache in a model's output."""
    return next(getattr(output, name) for name in CACHE_NAMES if name in output)


@torch.no_grad()
def last_logits(model: PreTrainedModel, ids: Tensor, cache: Any, **options: Any) -> Tensor:
    """Logits ``[B, V] float32`` behind the last token of ``ids [B, T]``."""
    logits: Tensor = forward_with_cache(model, ids, cache, **options).logits[:, -1]
    return logits.float()
