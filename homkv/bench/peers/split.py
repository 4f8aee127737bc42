"""What the peers on contiguous caches share: split-KV over sequences of any length, and the merge of the splits.

The cache is the left operand (S^T = K Q^T, O^T = V^T P^T) and query rows are the columns: a tile has as many columns as
matrix instructions need at least, 8, instead of 16 rows, and no work is spent on rows that do not exist.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from homkv.attention.triton.lanes import NEVER
from homkv.attention.triton.runtime import check_device, num_processors, require
from homkv.errors import CapacityError, DTypeError, ShapeError

MAX_SPLITS = 256
MAX_ROWS = 16  # query heads per kv head
SIXTEEN_BITS = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class SplitConfig:
    """How a split-KV kernel is launched."""

    tile: int = 64  # tokens per iteration
    warps: int = 1
    stages: int = 3
    programs: int = 6  # per multiprocessor: the grid is one wave of these, or whole waves


@triton.jit
def share(Lengths, b, capacity, split, splits, TILE: tl.constexpr):
    """First and last + 1 token of one split of sequence ``b``: equal shares of its tiles."""
    length = tl.minimum(tl.load(Lengths + b), capacity)
    tiles = (length + TILE - 1) // TILE
    return split * tiles // splits * TILE, tl.minimum((split + 1) * tiles // splits * TILE, length)


@triton.jit
def weigh(s, unit, m, total, first, stop, N: tl.constexpr, TILE: tl.constexpr):
    """One step of the running softmax over scores ``s [TILE, N]``: weights, decay of older sums, maximum, their sum."""
    token = first + tl.arange(0, TILE)
    s = tl.where((token < stop)[:, None], s * unit, NEVER)
    top = tl.maximum(m, tl.max(s, 0))
    decay = tl.exp2(m - top)
    p = tl.exp2(s - top[None, :])
    return p, decay, top, total * decay + tl.sum(p, 0)


@triton.jit
def merge_kernel(
    Out, PartO, PartM, PartSum, splits, D: tl.constexpr, SPLITS: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    """Weighted mean of the splits. Grid (rows, ceil(D / CHANNELS)); tensors as in Partials."""
    row = tl.program_id(0)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    i = tl.arange(0, SPLITS)
    m = tl.load(PartM + row * splits + i, mask=i < splits, other=NEVER)
    share = tl.exp2(m - tl.max(m, 0))
    total = tl.sum(share * tl.load(PartSum + row * splits + i, mask=i < splits, other=0.0), 0)
    live = (i < splits)[:, None] & (channel < D)[None, :]
    at = (row.to(tl.int64) * splits + i)[:, None] * D + channel[None, :]
    o = tl.sum(tl.load(PartO + at, mask=live, other=0.0) * share[:, None], 0)
    o = o / tl.where(total > 0, total, 1.0)  # no token at all: o is zero
    tl.store(Out + row.to(tl.int64) * D + channel, o.to(Out.dtype.element_ty), mask=channel < D)


@dataclass(frozen=True)
class Partials:
    """Outputs of all splits, maxima of their scores (base 2) and sums of their weights; rows = B * H.

    ``o [rows, splits, D]``, ``m total [rows, splits]``, float32.
    """

    o: Tensor
    m: Tensor
    total: Tensor

    @classmethod
    def empty(cls, rows: int, splits: int, head_dim: int, device: torch.device) -> "Partials":
        """Room that kernels fill."""
        o = torch.empty(rows, splits, head_dim, device=device)
        return cls(o, torch.empty(rows, splits, device=device), torch.empty(rows, splits, device=device))

    def merge(self, q: Tensor) -> Tensor:
        """``sum_i 2^(m_i - max m) o_i / sum_i 2^(m_i - max m) total_i`` in q's shape and dtype; 0 for no tokens."""
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        rows, splits, dim = self.o.shape
        merge_kernel[(rows, triton.cdiv(dim, 32))](
            out,
            self.o,
            self.m,
            self.total,
            splits,
            D=dim,
            SPLITS=triton.next_power_of_2(splits),
            CHANNELS=32,
            num_warps=4,
        )
        return out


def choose_splits(heads: int, tiles: int, slots: int) -> int:
    """Splits per sequence and kv head with which ``slots`` programs at a time finish ``tiles`` tiles each soonest.

    A wave costs its longest program plus about two tiles for starting and merging.
    """
    most = max(1, min(MAX_SPLITS, tiles))
    return min(range(1, most + 1), key=lambda s: (-(-heads * s // slots) * (-(-tiles // s) + 2), s))


def plan(q: Tensor, heads: int, tokens: int, config: SplitConfig) -> int:
    """Splits for a call on sequences of up to ``tokens`` tokens."""
    slots = config.programs * num_processors(q.device)
    return choose_splits(q.shape[0] * heads, triton.cdiv(tokens, config.tile), slots)


def columns(group: int) -> int:
    """Columns of a tile that holds ``group`` query rows."""
    return 8 if group <= 8 else 16


def check_call(q: Tensor, cache: Sequence[Tensor], shape: tuple[int, ...], lengths: Tensor) -> None:
    """Check what every peer takes; raises ShapeError, DTypeError, CapacityError, UnsupportedError before any launch.

    ``q [B, H, 1, D]`` 16 bits; the cache's tensors begin with ``shape = (B, G)``; ``lengths [B] int32``; all
    contiguous, on one device.
    """
    require()
    check_device(q.device)
    batch, heads = shape
    if q.ndim != 4 or q.shape[0] != batch or q.shape[2] != 1 or heads == 0 or q.shape[1] % heads:
        raise ShapeError(
            f"expected q [B={batch}, H multiple of {heads}, 1, D], found {tuple(q.shape)}; pass one token per sequence"
        )
    if q.shape[1] // heads > MAX_ROWS:
        raise ShapeError(
            f"expected at most {MAX_ROWS} query heads per kv head, found {q.shape[1] // heads}; use PyTorch's attention"
        )
    if q.dtype not in SIXTEEN_BITS:
        raise DTypeError(f"expected q in float16 or bfloat16, found {q.dtype}; cast it")
    if lengths.shape != (batch,) or lengths.dtype != torch.int32:
        raise ShapeError(f"expected lengths [{batch}] int32, found {tuple(lengths.shape)} {lengths.dtype}; cast them")
    for x in (q, lengths, *cache):
        if x.device != q.device or not x.is_contiguous():
            raise ShapeError(
                f"expected contiguous tensors on {q.device}, found {tuple(x.shape)} on {x.device}; copy it"
            )
    for x in cache:
        if x.ndim > 1 and tuple(x.shape[:2]) != shape:
            raise ShapeError(f"expected a cache of {batch} sequences and {heads} kv heads, found {tuple(x.shape)}")
        if x.numel() // (batch * heads) >= 2**31:
            elements = x.numel() // (batch * heads)
            raise CapacityError(f"expected less than 2**31 elements a sequence and head, found {elements}; shorten it")
