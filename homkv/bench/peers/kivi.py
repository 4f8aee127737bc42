"""Decode attention that dequantizes the usual way: KIVI's 2-bit form in a plain Triton kernel.

Keys are quantized per channel over groups of tokens, values per token over quarters of the channels, asymmetrically:
``x ~ scale * code + offset``. Every tile is unpacked with shifts and masks, converted to float16 and multiplied out
before the matrix product. No byte order is chosen to help and no instruction is written by hand: that is the point.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from homkv.attention.triton.lanes import LOG2E, NEVER
from homkv.bench.peers.split import Partials, SplitConfig, check_call, columns, plan, share, weigh
from homkv.errors import DTypeError, ShapeError

DEFAULT = SplitConfig(tile=32, warps=4, stages=3, programs=4)


@dataclass(frozen=True)
class KiviCache:
    """2-bit keys and values of B sequences with room for S tokens, S a multiple of the group.

    ``k_codes v_codes [B, G, S, D / 4] uint8``: byte c of a row holds channels c, c + D/4, c + D/2, c + 3D/4 from the
    low bits up; ``k_scale k_offset [B, G, S / group, D]``; ``v_scale v_offset [B, G, S, 4]``, one per quarter; float16.
    """

    k_codes: Tensor
    k_scale: Tensor
    k_offset: Tensor
    v_codes: Tensor
    v_scale: Tensor
    v_offset: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors, in the order of the kernel's arguments."""
        return self.k_codes, self.k_scale, self.k_offset, self.v_codes, self.v_scale, self.v_offset

    @property
    def group(self) -> int:
        """Tokens that share a channel's scale."""
        return self.k_codes.shape[2] // self.k_scale.shape[2]


def fit(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """2-bit codes of ``x [..., n]`` between the row's minimum and maximum; float16 scale and offset ``[..., 1]``."""
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    scale = ((high - low) / 3).clamp_min(1e-6).half()
    codes = ((x - low) / scale.float()).round().clamp(0, 3).to(torch.uint8)
    return codes, scale, low.half()


def pack(codes: Tensor) -> Tensor:
    """Codes ``[..., D]`` of 2 bits to bytes ``[..., D / 4]``, quarter i in bits 2i and 2i + 1."""
    quarters = codes.unflatten(-1, (4, -1))
    shift = torch.tensor([1, 4, 16, 64], dtype=torch.uint8, device=codes.device)
    return (quarters * shift[:, None]).sum(-2, dtype=torch.uint8)


def quantize(k: Tensor, v: Tensor, group: int = 32) -> KiviCache:
    """Quantize ``k v [B, G, S, D]``, S a multiple of ``group`` (32 or 64). Raises ShapeError."""
    if k.shape != v.shape or k.shape[2] % group or k.shape[3] % 4 or group not in (32, 64):
        raise ShapeError(
            f"expected k and v [B, G, multiple of {group}, D] and groups of 32 or 64 tokens, found {tuple(k.shape)} "
            f"and {tuple(v.shape)}; pad the tokens"
        )
    k_codes, k_scale, k_offset = fit(k.float().unflatten(2, (-1, group)).transpose(-1, -2))
    v_codes, v_scale, v_offset = fit(v.float().unflatten(3, (4, -1)))
    return KiviCache(
        pack(k_codes.transpose(-1, -2).flatten(2, 3)),
        k_scale.squeeze(-1).contiguous(),
        k_offset.squeeze(-1).contiguous(),
        pack(v_codes.flatten(3)),
        v_scale.squeeze(-1).contiguous(),
        v_offset.squeeze(-1).contiguous(),
    )


def dequantize(cache: KiviCache) -> tuple[Tensor, Tensor]:
    """What the cache stands for: ``k v [B, G, S, D] float64``."""
    shift = torch.arange(0, 8, 2, device=cache.k_codes.device)[:, None]
    k, v = ((codes.unsqueeze(-2) >> shift & 3).double() for codes in (cache.k_codes, cache.v_codes))
    k = k.flatten(3) * cache.k_scale.double().repeat_interleave(cache.group, 2)
    v = v * cache.v_scale.double().unsqueeze(-1) + cache.v_offset.double().unsqueeze(-1)
    return k + cache.k_offset.double().repeat_interleave(cache.group, 2), v.flatten(3)


@triton.jit(do_not_specialize=["capacity", "splits"])
def kivi_kernel(
    Q, KCodes, KScale, KOffset, VCodes, VScale, VOffset, Lengths, PartO, PartM, PartSum, capacity, splits, scale_log2,
    D: tl.constexpr, QUARTER: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr, N: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """One split of one sequence and kv head. Grid (batch * HEADS, splits). TILE: tokens of a group.

    Cache tensors as in KiviCache, ``Q [batch, HEADS, ROWS, D]``. QUARTER: D / 4, padded to a power of two.
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
    row = row.to(tl.int64) * splits + split
    tl.store(PartM + row, m, mask=n < ROWS)
    tl.store(PartSum + row, total, mask=n < ROWS)
    for i in tl.static_range(4):
        tl.store(PartO + row[None, :] * D + (i * (D // 4) + c)[:, None], o[i], mask=inside)


def attend(q: Tensor, cache: KiviCache, lengths: Tensor, softmax_scale: float, config: SplitConfig = DEFAULT) -> Tensor:
    """``softmax(softmax_scale q k^T) v`` over the first ``lengths[b]`` tokens of each sequence, k and v dequantized.

    ``q [B, H, 1, D]`` 16 bits, H / G <= 16; ``lengths [B] int32``; all contiguous, on one device. Nothing is read back.
    ``config.tile`` is the cache's group whatever it says. Returns ``[B, H, 1, D]`` in q's dtype. Raises ShapeError,
    DTypeError, CapacityError, UnsupportedError.
    """
    batch, heads, tokens, quarter = cache.k_codes.shape
    check_call(q, cache.tensors, (batch, heads), lengths)
    dim = 4 * quarter
    if q.shape[3] != dim or cache.group not in (32, 64) or cache.v_codes.shape != cache.k_codes.shape:
        raise ShapeError(
            f"expected a cache of head_dim {q.shape[3]} in groups of 32 or 64, found {dim} in groups of {cache.group}; "
            "quantize() makes one"
        )
    if cache.k_codes.dtype != torch.uint8 or cache.k_scale.dtype != torch.float16:
        raise DTypeError(f"expected uint8 codes, float16 scales, found {cache.k_codes.dtype}, {cache.k_scale.dtype}")
    config = SplitConfig(cache.group, config.warps, config.stages, config.programs)
    group, splits = q.shape[1] // heads, plan(q, heads, tokens, config)
    part = Partials.empty(batch * q.shape[1], splits, dim, q.device)
    kivi_kernel[(batch * heads, splits)](
        q, *cache.tensors, lengths, part.o, part.m, part.total, tokens, splits, softmax_scale * LOG2E.value, D=dim,
        QUARTER=max(triton.next_power_of_2(quarter), 16), ROWS=group, HEADS=heads, N=columns(group), TILE=config.tile,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return part.merge(q)
