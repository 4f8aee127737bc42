"""What both live test modules share: the model, texts, and the transformers path to compare with."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from transformers import AutoTokenizer

from homkv.hf import attach
from homkv.models import LoadedModel, find_model, load_model

SMOLLM2 = "smollm2"
LAYERS, KV_HEADS, HEAD_DIM = 30, 3, 64
TEXT = Path(__file__).parents[2] / "docs" / "format.md"


def model_folder() -> str:
    return find_model(SMOLLM2)


def text_tokens() -> list[int]:
    ids: list[int] = AutoTokenizer.from_pretrained(model_folder())(TEXT.read_text(encoding="utf-8"))["input_ids"]
    return ids


@cache
def loaded() -> LoadedModel:
    return load_model(SMOLLM2)


@torch.no_grad()
def by_transformers(
    prompts: Sequence[list[int]], answers: Sequence[Sequence[int]], *, kv: str = "balanced", apart: bool = False
) -> list[tuple[list[int], list[float]]]:
    """Greedy tokens and the answers' logprobs of homkv inside transformers, fed with the answers; float32.

    The same pages as vLLM's: 64 sinks, and exact tokens in float32. ``apart``: the last prompt token is computed on
    pages, as decode servers do.
    """
    model = loaded().model
    attachment = attach(model, kv, exact_dtype=torch.float32)
    attachment.codec.num_sinks = 64
    found = []
    with attachment:
        for prompt, answer in zip(prompts, answers, strict=True):
            first = prompt[:-1] if apart else prompt
            out = model(input_ids=torch.tensor([first]), use_cache=True)
            cache, greedy, logprobs = out.past_key_values, [], []
            if apart:
                out = model(input_ids=torch.tensor([prompt[-1:]]), past_key_values=cache, use_cache=True)
            for token in answer:
                scores = torch.log_softmax(out.logits[0, -1].float(), -1)
                greedy.append(int(scores.argmax()))
                logprobs.append(float(scores[token]))
                out = model(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True)
            found.append((greedy, logprobs))
    return found
