"""The model that the tests of evaluation measure."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM


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
