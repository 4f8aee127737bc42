"""Decode attention that dequantizes the usual way: KIVI's 2-bit form in a plain Triton kernel.

Keys are quantized per channel over groups of tokens, values per token over quarters of the channels, asymmetrically:
``x ~ scale * code + offset``. Every tile is unpacked with shifts and masks, converted to float16 and multiplied out
before the matrix product. No byte order is chosen to help and no instruction is written by hand: that is the point.
The newest tokens, in 16 bits, are one more split of the same launch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from homkv.attention.triton.lanes import LOG2E, NEVER
from homkv.bench.peers.kivi_codes import KiviCache, KiviWindow
from homkv.bench.peers.split import Partials, SplitConfig, check_call, columns, plan, share, weigh
from homkv.errors import DTypeError, ShapeError

DEFAULT = SplitConfig(tile=32, warps=4, stages=3, programs=4)


@triton.jit(do_not_specialize=["capacity", "splits"])
def kivi_kernel(
    Q, KCodes, KScale, KOffset, VCodes, VScale, VOffset, Lengths, WindowK, WindowV, Totals, PartO, PartM, PartSum,
    capacity, splits, scale_log2, D: tl.constexpr, QUARTER: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr,
    N: tl.constexpr, TILE: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """One split of one sequence and kv head. Grid (batch * HEADS, splits), one split more if there is a window.

    Cache tensors as in KiviCache, window tensors as in KiviWindow, ``Q [batch, HEADS, ROWS, D]``. TILE: tokens of a
    group. QUARTER: D / 4, padded to a power of two. WINDOW: rows of the window, 0 if there is none.
    """
    head = tl.program_id(0)
    split = tl.program_id(1)
    first, stop = share(Lengths, head // HEADS, capacity, split, splits, TILE)
    n = tl.arange(0, N)
    c = tl.arange(0, QUARTER)
    there = c < D // 4
    inside = there[:, None] & (n < ROWS)[None, :]
    row = head * ROWS + n
    q = ()
    o = ()
    for i in tl.static_range(4):
        at = Q + row[None, :] * D + (i * (D // 4) + c)[:, None]
        q += (tl.load(at, mask=inside, other=0.0).to(tl.float16),)
        o += (tl.zeros([QUARTER, N], tl.float32),)
    m = tl.full([N], NEVER, tl.float32)
    total = tl.zeros([N], tl.float32)
    base = head.to(tl.int64) * capacity
    for at in range(first, stop, TILE):
        token = base + at + tl.arange(0, TILE)
        packed_k = tl.load(KCodes + token[:, None] * (D // 4) + c[None, :], mask=there[None, :], other=0)
        packed_v = tl.load(VCodes + token[:, None] * (D // 4) + c[None, :], mask=there[None, :], other=0)
        group = (base + at) // TILE * D + c
        s = tl.zeros([TILE, N], tl.float32)
        for i in tl.static_range(4):
            scale = tl.load(KScale + group + i * (D // 4), mask=there, other=0.0)
            offset = tl.load(KOffset + group + i * (D // 4), mask=there, other=0.0)
            k = ((packed_k >> (2 * i)) & 3).to(tl.float16) * scale[None, :] + offset[None, :]
            s = tl.dot(k, q[i], s)
        p, decay, m, total = weigh(s, scale_log2, m, total, at, stop, N, TILE)
        new = ()
        for i in tl.static_range(4):
            scale = tl.load(VScale + token * 4 + i)
            offset = tl.load(VOffset + token * 4 + i)
            v = ((packed_v >> (2 * i)) & 3).to(tl.float16) * scale[:, None] + offset[:, None]
            new += (tl.dot(tl.trans(v), p.to(tl.float16), o[i] * decay[None, :]),)
        o = new
    if WINDOW > 0:
        coded = tl.load(Lengths + head // HEADS)
        newest = tl.load(Totals + head // HEADS) - coded
        for at in range(0, tl.where(split == splits, WINDOW, 0), TILE):
            place = at + tl.arange(0, TILE)
            live = (place - coded % WINDOW + WINDOW) % WINDOW < newest
            token = (head.to(tl.int64) * WINDOW + place) * D
            s = tl.zeros([TILE, N], tl.float32)
            for i in tl.static_range(4):
                k = tl.load(WindowK + token[:, None] + (i * (D // 4) + c)[None, :], mask=there[None, :], other=0.0)
                s = tl.dot(k.to(tl.float16), q[i], s)
            s = tl.where(live[:, None], s * scale_log2, NEVER)
            top = tl.maximum(m, tl.max(s, 0))
            p = tl.where(live[:, None], tl.exp2(s - top[None, :]), 0.0)
            decay = tl.exp2(m - top)
            m, total = top, total * decay + tl.sum(p, 0)
            new = ()
            for i in tl.static_range(4):
                v = tl.load(WindowV + token[:, None] + (i * (D // 4) + c)[None, :], mask=there[None, :], other=0.0)
                new += (tl.dot(tl.trans(v.to(tl.float16)), p.to(tl.float16), o[i] * decay[None, :]),)
            o = new
    row = row.to(tl.int64) * tl.num_programs(1) + split
    tl.store(PartM + row, m, mask=n < ROWS)
    tl.store(PartSum + row, total, mask=n < ROWS)
    for i in tl.static_range(4):
        tl.store(PartO + row[None, :] * D + (i * (D // 4) + c)[:, None], o[i], mask=inside)


def attend(
    q: Tensor,
    cache: KiviCache,
    lengths: Tensor,
    softmax_scale: float,
    config: SplitConfig = DEFAULT,
    window: KiviWindow | None = None,
) -> Tensor:
    """``softmax(softmax_scale q k^T) v`` over the first ``lengths[b]`` tokens of each sequence, k and v dequantized.

    ``q [B, H, 1, D]`` 16 bits, H / G <= 16; ``lengths [B] int32``; all contiguous, on one device. Nothing is read back.
    ``window``: the tokens behind them. ``config.tile`` is the cache's group whatever it says. Returns ``[B, H, 1, D]``
    in q's dtype. Raises ShapeError, DTypeError, CapacityError, UnsupportedError.
    """
    batch, heads, tokens, quarter = cache.k_codes.shape
    newest = (q, q, lengths) if window is None else (window.k, window.v, window.lengths)
    check_call(q, cache.tensors if window is None else (*cache.tensors, *newest[:2]), (batch, heads), lengths)
    dim = 4 * quarter
    if q.shape[3] != dim or cache.group not in (32, 64) or cache.v_codes.shape != cache.k_codes.shape:
        raise ShapeError(
            f"expected a cache of head_dim {q.shape[3]} in groups of 32 or 64, found {dim} in groups of {cache.group}; "
            "quantize() makes one"
        )
    if cache.k_codes.dtype != torch.uint8 or cache.k_scale.dtype != torch.float16:
        raise DTypeError(f"expected uint8 codes, float16 scales, found {cache.k_codes.dtype}, {cache.k_scale.dtype}")
    if window is not None:
        check_window(window, cache)
    config = SplitConfig(cache.group, config.warps, config.stages, config.programs)
    group, splits = q.shape[1] // heads, plan(q, heads, tokens, config)
    rows = 0 if window is None else window.k.shape[2]
    if rows:
        splits = max(splits - 1, 1)  # one program of the wave is the window's
    parts = splits + (rows > 0)
    part = Partials.empty(batch * q.shape[1], parts, dim, q.device)
    kivi_kernel[(batch * heads, parts)](
        q, *cache.tensors, lengths, *newest, part.o, part.m, part.total, tokens, splits, softmax_scale * LOG2E.value,
        D=dim, QUARTER=max(triton.next_power_of_2(quarter), 16), ROWS=group, HEADS=heads, N=columns(group),
        TILE=config.tile, WINDOW=rows, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return part.merge(q)


def check_window(window: KiviWindow, cache: KiviCache) -> None:
    """Raise ShapeError unless a window fits a cache."""
    batch, heads, _, quarter = cache.k_codes.shape
    shape, rows = window.k.shape, window.k.shape[2]
    fits = shape == window.v.shape == (batch, heads, rows, 4 * quarter) and rows % cache.group == 0
    if not fits or window.lengths.shape != (batch,) or window.lengths.dtype != torch.int32:
        raise ShapeError(
            f"expected a window of k and v [{batch}, {heads}, multiple of {cache.group}, {4 * quarter}] and lengths "
            f"[{batch}] int32, found {tuple(shape)}, {tuple(window.v.shape)} and {tuple(window.lengths.shape)}"
        )
