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


Alike = tuple[int, int, list[int] | slice]  # pages, exact tokens, and which sequences of a view have so many


def alike(view: LayerView) -> list[Alike]:
    """The view's sequences by their numbers of pages and exact tokens: what can be computed side by side."""
    groups: dict[tuple[int, int], list[int]] = {}
    for b, (pages, length) in enumerate(torch.stack((view.num_pages, view.exact_len), 1).tolist()):  # read back once
        groups.setdefault((pages, length), []).append(b)
    if len(groups) == 1:
        return [(*next(iter(groups)), slice(None))]  # nothing has to be uploaded
    return [(*counts, members) for counts, members in groups.items()]


def stored_parts(view: LayerView, group: Alike, codec: PageCodec) -> tuple[Tensor, Tensor, Tensor]:
    """Pages ``[B, G, N, P]`` and exact keys and values ``[B, G, E, D]`` of a group, as the format shows them."""
    n, length, rows = group
    slots = view.slots[rows].long()
    pages = view.pool[view.page_table[rows, :n].long()].transpose(1, 2)
    k, v = view.exact_k[slots, :, :length], view.exact_v[slots, :, :length]
    sinks = min(codec.num_sinks, length)
    first = sinks + n * codec.page_tokens
    with OVERHEAD.running():
        k_win, v_win = codec.see_window(k[:, :, sinks:], v[:, :, sinks:], first)
    return (
        pages,
        torch.cat((k[:, :, :sinks].to(k_win.dtype), k_win), 2),
        torch.cat((v[:, :, :sinks].to(v_win.dtype), v_win), 2),
    )


def _side_by_side(
    q: Tensor, parts: tuple[Tensor, Tensor, Tensor], codec: PageCodec, scale: float, rounding: Rounding
) -> tuple[Tensor, Tensor]:
    """``q [B, G, R, D]`` over sequences alike: ``o [B, G, R, D]``, ``lse [B, G, R]``, in q's dtype."""
    pages, k, v = parts
    if isinstance(codec, RestoredCodec):  # once for both products
        with OVERHEAD.running():
            restored = codec.dense(pages, q.dtype)
        k, v = (torch.cat((x, exact.to(q.dtype)), 2) for x, exact in zip(restored, (k, v), strict=True))
        pages = pages[:, :, :0]
    n = pages.shape[2]
    exact = q @ k.to(q.dtype).transpose(-1, -2)
    coded = codec.scores(q, pages, rounding, q.dtype) if n else exact[..., :0]
    scores = torch.cat((coded, exact), -1) * scale
    if scores.shape[-1] == 0:
        return torch.zeros_like(q), torch.full_like(q[..., 0], -torch.inf)
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
    o, lse = torch.empty_like(rows), torch.empty_like(rows[..., 0])
    for group in alike(view):
        at = group[-1]
        o[at], lse[at] = _side_by_side(rows[at], stored_parts(view, group, codec), codec, softmax_scale, rounding)
    return o.reshape(b, h, t, d), lse.reshape(b, h, t)


def oracle(q: Tensor, view: LayerView, codec: PageCodec, softmax_scale: float) -> tuple[Tensor, Tensor]:
    """``softmax(softmax_scale q . k) v`` in float64 on the dense keys and values of the view.

    The law: :func:`attend` with ``UNROUNDED`` and float64 equals this to 1e-12.
    """
    groups = view.pool.shape[1]
    b, h, t, d = q.shape
    rows = q.double().reshape(b, groups, h // groups * t, d)
    o, lse = torch.empty_like(rows), torch.empty_like(rows[..., 0])
    for group in alike(view):
        at = group[-1]
        pages, k, v = stored_parts(view, group, codec)
        if pages.shape[2]:
            k_dense, v_dense = codec.dense(pages, torch.float64)
            k, v = torch.cat((k_dense, k.double()), 2), torch.cat((v_dense, v.double()), 2)
        scores = rows[at] @ k.double().transpose(-1, -2) * softmax_scale
        o[at], lse[at] = torch.softmax(scores, -1) @ v.double(), torch.logsumexp(scores, -1)
    return o.reshape(b, h, t, d), lse.reshape(b, h, t)
