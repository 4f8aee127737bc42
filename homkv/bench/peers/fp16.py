"""Decode attention on a 16-bit cache: split-KV, the best this repository can do without compressing anything."""

import triton
import triton.language as tl
from torch import Tensor

from homkv.attention.triton.lanes import LOG2E, NEVER, dot16
from homkv.bench.peers.split import Partials, SplitConfig, check_call, columns, plan, share, weigh
from homkv.errors import DTypeError, ShapeError

DEFAULT = SplitConfig(tile=64, warps=4, stages=3, programs=3)


@triton.jit(do_not_specialize=["capacity", "splits"])
def fp16_kernel(
    Q, K, V, Lengths, PartO, PartM, PartSum, capacity, splits, scale_log2, D: tl.constexpr, DP: tl.constexpr,
    ROWS: tl.constexpr, HEADS: tl.constexpr, N: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One split of one sequence and kv head. Grid (batch * HEADS, splits).

    ``Q [batch, HEADS, ROWS, D]``, ``K V [batch, HEADS, capacity, D]``; partial outputs as in split.Partials.
    """
    head = tl.program_id(0)
    split = tl.program_id(1)
    first, stop = share(Lengths, head // HEADS, capacity, split, splits, TILE)
    n = tl.arange(0, N)
    d = tl.arange(0, DP)
    inside = (d < D)[:, None] & (n < ROWS)[None, :]
    row = head * ROWS + n
    q = tl.load(Q + row[None, :] * D + d[:, None], mask=inside, other=0.0)
    m = tl.full([N], NEVER, tl.float32)
    total = tl.zeros([N], tl.float32)
    o = tl.zeros([DP, N], tl.float32)
    K += head.to(tl.int64) * capacity * D
    V += head.to(tl.int64) * capacity * D
    for at in range(first, stop, TILE):
        token = tl.minimum(at + tl.arange(0, TILE), stop - 1)
        if D == DP:
            k = tl.load(K + token[:, None] * D + d[None, :])
            v = tl.load(V + token[None, :] * D + d[:, None])
        else:
            k = tl.load(K + token[:, None] * D + d[None, :], mask=(d < D)[None, :], other=0.0)
            v = tl.load(V + token[None, :] * D + d[:, None], mask=(d < D)[:, None], other=0.0)
        s = dot16(k, q, tl.zeros([TILE, N], tl.float32))
        p, decay, m, total = weigh(s, scale_log2, m, total, at, stop, N, TILE)
        o = dot16(v, p.to(v.dtype), o * decay[None, :])
    row = row.to(tl.int64) * splits + split
    tl.store(PartM + row, m, mask=n < ROWS)
    tl.store(PartSum + row, total, mask=n < ROWS)
    tl.store(PartO + row[None, :] * D + d[:, None], o, mask=inside)


def attend(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, softmax_scale: float, config: SplitConfig = DEFAULT
) -> Tensor:
    """``softmax(softmax_scale q k^T) v`` over the first ``lengths[b]`` tokens of each sequence.

    ``q [B, H, 1, D]``, ``k v [B, G, S, D]`` of one 16-bit dtype, H / G <= 16; ``lengths [B] int32``. All contiguous, on
    one device; nothing is read back, so a CUDA graph may hold the call and lengths may grow to S between replays.
    Returns ``[B, H, 1, D]`` in q's dtype; a sequence without tokens gives zeros. Scores are float32, softmax weights
    16 bits. Raises ShapeError, DTypeError, CapacityError, UnsupportedError.
    """
    batch, heads, tokens, dim = k.shape
    check_call(q, (k, v), (batch, heads), lengths)
    if v.shape != k.shape or q.shape[3] != dim:
        raise ShapeError(f"expected k and v [B, G, S, D={q.shape[3]}], found {tuple(k.shape)} and {tuple(v.shape)}")
    if not q.dtype == k.dtype == v.dtype:
        raise DTypeError(f"expected k and v in {q.dtype} like q, found {k.dtype} and {v.dtype}; cast them")
    group, splits = q.shape[1] // heads, plan(q, heads, tokens, config)
    part = Partials.empty(batch * q.shape[1], splits, dim, q.device)
    fp16_kernel[(batch * heads, splits)](
        q, k, v, lengths, part.o, part.m, part.total, tokens, splits, softmax_scale * LOG2E.value, D=dim,
        DP=triton.next_power_of_2(dim), ROWS=group, HEADS=heads, N=columns(group), TILE=config.tile,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return part.merge(q)
