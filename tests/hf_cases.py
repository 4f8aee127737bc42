"""What tests of homkv inside transformers share: prompts, padding, and attaching that checks the books."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel

from homkv.hf import Attachment, attach

CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"


def kv(cache: object) -> dict[str, object]:
    return {CACHE: cache}


def prompts(*shape: int) -> Tensor:
    return torch.randint(2, 97, shape)


def generate(model: PreTrainedModel, ids: Tensor, **options: object) -> Tensor:
    options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(ids)} | options
    return model.generate(ids, **options)


@contextmanager
def attached(model: PreTrainedModel, name: str = "fp16", **options: object) -> Iterator[Attachment]:
    """Like attach(), and checks the books of the last cache at the end."""
    with attach(model, name, impl="reference", **options) as attachment:
        yield attachment
    if attachment.last_cache is not None and attachment.last_cache.seq_ids:
        attachment.last_cache.paged.check()


def padded(ids: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    width = max(map(len, ids))
    rows, masks = [], []
    for row in ids:
        pad, one = torch.zeros(width - len(row), dtype=torch.long), torch.ones(len(row), dtype=torch.long)
        rows.append(torch.cat((pad, row) if side == "left" else (row, pad)))
        masks.append(torch.cat((pad, one) if side == "left" else (one, pad)))
    return torch.stack(rows), torch.stack(masks)
