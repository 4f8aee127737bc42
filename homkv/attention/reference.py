"""Readable attention on pages: the integer path in torch, and the fp64 oracle it is measured against."""

import torch
from torch import Tensor

from homkv.attention.view import LayerView
from homkv.formats.base import EIGHT_BIT, PageCodec, Rounding
from homkv.formats.meter import OVERHEAD
from homkv.formats.restored import RestoredCodec


def merge_partials(o: Tensor, lse: Tensor, other_o: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Combine attention over two disjoint sets of keys.

    ``o = (o1 e^lse1 + o2 e^lse2) / (e^lse1 + e^lse2)``; ``o [..., D]``, ``lse [...]`` natural log, -inf for no keys.
    """
    total = torch.logaddexp(lse, other_lse)
    safe = torch.where(torch.isinf(total), torch.zeros_like(total), total)
    weight, other_weight = torch.exp(lse - safe).unsqueeze(-1), torch.exp(other_lse - safe).unsqueeze(-1)
    return o * weight + other_o * other_weight, total


def sequence_parts(view: LayerView, b: int, codec: PageCodec) -> tuple[Tensor, Tensor, Tensor]:
    """Pages ``[G, N, P]`` and exact keys and values ``[G, E, D]`` of one sequence, as the format shows them."""
    n, length, slot = int(view.num_pages[b]), int(view.exact_len[b]), int(view.slots[b])
    pages = view.pool[view.page_table[b, :n].long()].transpose(0, 1)
    k, v = view.exact_k[slot, :, :length], view.exact_v[slot, :, :length]
    sinks = min(codec.num_sinks, length)
    first = sinks + n * codec.page_tokens
    with OVERHEAD.running():
        k_win, v_win = codec.see_window(k[:, sinks:], v[:, sinks:], first)
    return (
        pages,
        torch.cat((k[:, :sinks].to(k_win.dtype), k_win), 1),
        torch.cat((v[:, :sinks].to(v_win.dtype), v_win), 1),
    )


def _one_sequence(
    q: Tensor, parts: tuple[Tensor, Tensor, Tensor], codec: PageCodec, scale: float, rounding: Rounding
) -> tuple[Tensor, Tensor]:
    """``q [G, R, D]`` over one sequence: ``o [G, R, D]``, ``lse [G, R]``, in q's dtype."""
    pages, k, v = parts
    if isinstance(codec, RestoredCodec):  # once for both products
        with OVERHEAD.running():
            restored = codec.dense(pages, q.dtype)
        k, v = (torch.cat((x, exact.to(q.dtype)), 1) for x, exact in zip(restored, (k, v), strict=True))
        pages = pages[:, :0]
    n = pages.shape[1]
    exact = q @ k.to(q.dtype).transpose(-1, -2)
    coded = codec.scores(q, pages, rounding, q.dtype) if n else exact[..., :0]
    scores = torch.cat((coded, exact), -1) * scale
    if scores.shape[-1] == 0:
        return torch.zeros_like(q), torch.full(q.shape[:-1], -torch.inf, dtype=q.dtype)
    lse = torch.logsumexp(scores, -1)
    p = torch.exp(scores - scores.amax(-1, keepdim=True))  # tile-wise rounding needs weights relative to a maximum
    split = n * codec.page_tokens
    o = p[..., split:] @ v.to(q.dtype)
    if n:
        o = o + codec.weigh(p[..., :split], pages, rounding, q.dtype)
    return o / p.sum(-1, keepdim=True), lse


def attend(
    q: Tensor,
    view: LayerView,
    codec: PageCodec,
    softmax_scale: float,
    *,
    rounding: Rounding = EIGHT_BIT,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Attention of ``q [B, H, T, D]`` over the whole view on integer codes: ``o [B, H, T, D]``, ``lse [B, H, T]``.

    Query head h reads kv head ``h // (H / G)``. Every query row sees every stored token. The products run on
    int8 queries, uint8 weights and stored codes with int32 accumulators; corrections in ``dtype``.
    """
    groups = view.pool.shape[1]
    b, h, t, d = q.shape
    rows = q.to(dtype).reshape(b, groups, h // groups * t, d)
    outs = [_one_sequence(rows[i], sequence_parts(view, i, codec), codec, softmax_scale, rounding) for i in range(b)]
    o = torch.stack([x[0] for x in outs]).reshape(b, h, t, d)
    return o, torch.stack([x[1] for x in outs]).reshape(b, h, t)


def oracle(q: Tensor, view: LayerView, codec: PageCodec, softmax_scale: float) -> tuple[Tensor, Tensor]:
    """``softmax(softmax_scale q . k) v`` in float64 on the dense keys and values of the view.

    The law: :func:`attend` with ``UNROUNDED`` and float64 equals this to 1e-12.
    """
    groups = view.pool.shape[1]
    b, h, t, d = q.shape
    rows = q.double().reshape(b, groups, h // groups * t, d)
    outs, lses = [], []
    for i in range(b):
        pages, k, v = sequence_parts(view, i, codec)
        if pages.shape[1]:
            k_dense, v_dense = codec.dense(pages, torch.float64)
            k, v = torch.cat((k_dense, k.double()), 1), torch.cat((v_dense, v.double()), 1)
        scores = rows[i] @ k.double().transpose(-1, -2) * softmax_scale
        lses.append(torch.logsumexp(scores, -1))
        outs.append(torch.softmax(scores, -1) @ v.double())
    return torch.stack(outs).reshape(b, h, t, d), torch.stack(lses).reshape(b, h, t)
