"""Calibration of the ``basis`` format: covariances of a model's keys and queries on texts, and tables from them."""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from homkv.attention.prefill import causal
from homkv.formats.basis import BasisTables, balance
from homkv.hf import AttendingCache, switch_attention
from homkv.models import LoadedModel, cache_root
from homkv.models.forward import forward_with_cache


class Covariances(AttendingCache):
    """Exact attention of whole texts that adds up second moments per layer and kv head, in float64."""

    def __init__(self, loaded: LoadedModel) -> None:
        num_layers, head_dim = loaded.num_layers, loaded.head_dim
        super().__init__(num_layers, None, loaded.sliding_windows)
        shape = (num_layers, loaded.num_kv_heads, head_dim)
        self.num_keys = torch.zeros(num_layers, dtype=torch.float64)
        self.num_queries = torch.zeros(num_layers, dtype=torch.float64)
        self.key_sum = torch.zeros(shape, dtype=torch.float64)
        self.key_square, self.query_square = (torch.zeros(*shape, head_dim, dtype=torch.float64) for _ in "kq")

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, real: Tensor | None) -> Tensor:
        """See AttendingCache.attend. The first four tokens are left out: they stay exact."""
        keys = k[0, :, 4:].double().cpu()
        queries = torch.unflatten(q[0].double().cpu(), 0, (k.shape[1], -1)).flatten(1, 2)
        self.num_keys[layer] += keys.shape[1]
        self.num_queries[layer] += queries.shape[1]
        self.key_sum[layer] += keys.sum(1)
        self.key_square[layer] += keys.transpose(-1, -2) @ keys
        self.query_square[layer] += queries.transpose(-1, -2) @ queries
        return causal(q, k, v, softmax_scale)

    def tables(self) -> BasisTables:
        """The balanced basis of every layer."""
        layers = []
        for layer, (num_keys, num_queries) in enumerate(zip(self.num_keys, self.num_queries, strict=True)):
            mean = self.key_sum[layer] / num_keys
            cov = self.key_square[layer] / num_keys - mean.unsqueeze(-1) * mean.unsqueeze(-2)
            layers.append(balance(mean, cov, self.query_square[layer] / num_queries))
        return BasisTables(*(torch.cat([getattr(x, name) for x in layers]) for name in vars(layers[0])))


@torch.no_grad()
def calibrate(loaded: LoadedModel, texts: Iterable[list[int]]) -> BasisTables:
    """Tables of a model from token ids of a few texts, each at least 6 tokens and at most its context."""
    moments = Covariances(loaded)
    before = switch_attention(loaded.model)
    try:
        for ids in texts:
            for layer in moments.layers:
                layer.reset()
            forward_with_cache(loaded.model, torch.tensor([ids]), moments, logits_to_keep=1)
    finally:
        loaded.model.set_attn_implementation(before)
    return moments.tables()


def basis_file(loaded: LoadedModel) -> Path:
    """Where the tables of a model are kept: by its fingerprint, in the cache folder."""
    return cache_root() / "bases" / f"{loaded.fingerprint}.safetensors"
