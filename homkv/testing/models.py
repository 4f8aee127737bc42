"""Small models with random weights: quick to run, and quick to tell apart."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from homkv.models import LoadedModel, describe_model

VOCABULARY, CONTEXT = 200, 2048


def tiny_model(seed: int = 0, num_layers: int = 2) -> LoadedModel:
    """Random Llama of one kv head; its large weights make the most likely token lead by far more than rounding."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        initializer_range=0.3,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    tokenizer = cast(Any, SimpleNamespace(model_max_length=CONTEXT))
    return describe_model(LlamaForCausalLM(config), tokenizer, f"tiny-{seed}")


def random_ids(count: int, seed: int) -> list[int]:
    """Token ids of :func:`tiny_model` that follow from ``seed``."""
    generator = torch.Generator().manual_seed(seed)
    return cast(list[int], torch.randint(0, VOCABULARY, (count,), generator=generator).tolist())


def save_tiny_model(folder: Path, seed: int = 0) -> None:
    """Write :func:`tiny_model` and a tokenizer of one word per token, ``w7`` for 7, for processes to load."""
    tiny_model(seed).model.save_pretrained(folder)
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder)
