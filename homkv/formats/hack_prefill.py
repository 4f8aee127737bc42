"""HACK's own prefill: causal attention of a prompt on codes, before any page is stored."""

import torch
from torch import Tensor

from homkv.errors import ShapeError
from homkv.formats.base import EIGHT_BIT, Rounding
from homkv.formats.hack import HackCodec
from homkv.formats.minmax import homomorphic_product


def quantized_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    codec: HackCodec,
    softmax_scale: float,
    causal_offset: int = 0,
    *,
    rounding: Rounding = EIGHT_BIT,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Causal attention on codes, ``o [B, H, T, D]`` in ``dtype``: query t sees keys 0..t + causal_offset.

    ``q [B, H, T, D]``; ``k v [B, G, T + causal_offset, D]`` from position 0. Keys are quantized per token, values per
    block of Pi tokens, Q once and P per block to 8 bits; the last, incomplete block of values is used as the window
    stores it. Blocks in order, online softmax; masked weights count as zeros of their block; the denominator sums
    unrounded weights. Raises ShapeError, FormatError. Source: arXiv 2502.03589 v1 (attn_prefill).
    """
    _check(q, k, v, codec, causal_offset)
    shared = q.shape[1] // k.shape[1]  # query heads per kv head: rows of one product
    rows = torch.unflatten(q, 1, (-1, shared)).flatten(2, 3)
    queries, keys = codec.query_operand(rows, rounding, dtype), codec.quantize_keys(k, 0)
    last_visible = torch.arange(causal_offset, k.shape[2], device=k.device).repeat(shared).unsqueeze(-1)
    o = torch.zeros(rows.shape, dtype=dtype, device=q.device)
    total, peak = torch.zeros_like(o[..., :1]), torch.full_like(o[..., :1], -torch.inf)
    for start in range(0, k.shape[2], codec.page_tokens):
        stop = min(start + codec.page_tokens, k.shape[2])
        scores = homomorphic_product(queries, keys.rows(start, stop), dtype) * softmax_scale
        future = torch.arange(start, stop, device=k.device) > last_visible
        scores = scores.masked_fill(future, -torch.inf)
        new_peak = torch.maximum(peak, scores.amax(-1, keepdim=True))
        p, decay = torch.exp(scores - new_peak), torch.exp(peak - new_peak)
        o = o * decay + _weigh_block(p, v[..., start:stop, :], start, codec, rounding)
        total, peak = total * decay + p.sum(-1, keepdim=True), new_peak
    return (o / total).reshape(q.shape)


def _weigh_block(p: Tensor, v: Tensor, start: int, codec: HackCodec, rounding: Rounding) -> Tensor:
    """``sum_t p[t] v[t]``, on codes if the block is complete."""
    if v.shape[-2] == codec.page_tokens:
        weights = codec.weight_operand(p, rounding, p.dtype)
        return homomorphic_product(weights, codec.quantize_values(v, start), p.dtype)
    return p @ codec.requantize_window(v, start).to(p.dtype)


def _check(q: Tensor, k: Tensor, v: Tensor, codec: HackCodec, causal_offset: int) -> None:
    fits = q.ndim == k.ndim == 4 and q.shape[-1] == codec.head_dim and causal_offset >= 0
    fits = fits and k.shape[1] > 0 and q.shape[1] % k.shape[1] == 0
    if not fits or not k.shape == v.shape == (q.shape[0], k.shape[1], q.shape[2] + causal_offset, q.shape[3]):
        raise ShapeError(
            f"expected q [B, H, T, D={codec.head_dim}] and k, v [B, G, T + {causal_offset}, D] with G dividing H, "
            f"found {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}; pass all keys from position 0"
        )
