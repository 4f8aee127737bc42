"""The model that the tests of evaluation measure, and texts for it."""

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from homkv.eval.items import Item
from homkv.models import LoadedModel, describe_model


def sharp_llama() -> LlamaForCausalLM:
    """Two layers of two query heads over one of 64 channels, random, attending sharply: quantization shows."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=200,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=512,
        initializer_range=0.12,
    )
    return LlamaForCausalLM(config)


def words() -> PreTrainedTokenizerFast:
    """A tokenizer of 200 words."""
    found = Tokenizer(WordLevel({f"w{i}": i for i in range(200)}, unk_token="w0"))
    found.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=found)


def tiny() -> LoadedModel:
    """The sharp model with that tokenizer."""
    return describe_model(sharp_llama(), words(), "tiny")


def ids(count: int, seed: int = 1) -> torch.Tensor:
    """Random tokens ``[count]``."""
    return torch.randint(0, 200, (count,), generator=torch.Generator().manual_seed(seed))


def text(name: str, count: int, prefix: int, seed: int) -> Item:
    """A text of random tokens."""
    return Item("text", name, tuple(ids(count, seed).tolist()), prefix)
