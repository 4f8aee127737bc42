"""Int8 attention on tiles of 128 keys, shared by prefill and extension: softmax weights as 8-bit operands, tile loads.

A thread holds two neighbours in every eight keys of a tile's scores, as an accumulator; as the 8-bit left operand of
the next product it must hold four neighbours in every sixteen. Values are therefore stored in the order that makes both
the same registers (:func:`token_at`), and :func:`regroup` only renames them.
"""

import functools

import torch
import triton
import triton.language as tl

from homkv.attention.triton.lanes import MAGIC, USE_PTX

TILE = 128  # keys that share a scale of K, of V and of the softmax weights
# A tile far below the maximum seen so far is weighed as if 2**24 below it, so that rescaling the output stays in range.
DEPTH = tl.constexpr(24.0)
# As float32 bits, an accumulator that starts at MAGIC_BITS is MAGIC plus an integer of magnitude up to 2**22.
LOWEST = tl.constexpr(MAGIC.value - 2.0**22)

# Four float32 of magnitude up to 255 to float16, to integers by adding 1536 (or 1408 = 1536 - 128), to four bytes.
_PACK = (
    "{.reg .b32 a, b, c; mov.b32 c, %s; cvt.rn.f16x2.f32 a, $2, $1; cvt.rn.f16x2.f32 b, $4, $3; "
    "add.rn.f16x2 a, a, c; add.rn.f16x2 b, b, c; prmt.b32 $0, a, b, 0x6420;}"
)
PACK_SIGNED = tl.constexpr(_PACK % "0x66006600")
PACK_OFFSET = tl.constexpr(_PACK % "0x65806580")


@triton.jit
def token_at(position):
    """Token of a tile whose value is stored at ``position``: within 16, order (pair of 8, four pairs) swapped."""
    return position // 16 * 16 + position // 2 % 2 * 8 + position // 4 % 4 * 2 + position % 2


@triton.jit
def regroup(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Columns in token order to the order in which values are stored; moves nothing between registers."""
    return x.reshape([ROWS, COLUMNS // 16, 2, 4, 2]).permute(0, 1, 3, 2, 4).reshape([ROWS, COLUMNS])


@triton.jit
def pack_weights(p, OFFSET: tl.constexpr):
    """Weights ``p`` to int8, by way of float16: ``round(p)``, or ``round(p) - 128`` with OFFSET, half to even."""
    if USE_PTX:
        asm: tl.constexpr = PACK_OFFSET if OFFSET else PACK_SIGNED
        return tl.inline_asm_elementwise(asm, "=r,r,r,r,r", [p], dtype=tl.int8, is_pure=True, pack=4)
    else:
        SHIFT: tl.constexpr = 1408.0 if OFFSET else 1536.0
        return (p.to(tl.float16) + SHIFT).to(tl.float16).to(tl.int16, bitcast=True).to(tl.int8)


@triton.jit
def add_pairs(a, b):
    """Sum of float16 pairs held as int32."""
    return tl.inline_asm_elementwise("add.rn.f16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def sum_weights(p, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Row sums of weights ``[ROWS, COLUMNS]``, added up in float16 pairs per thread: to 2**-10."""
    if USE_PTX:
        a, b = tl.split(p.reshape([ROWS, COLUMNS // 2, 2]))
        asm: tl.constexpr = "cvt.rn.f16x2.f32 $0, $2, $1;"
        pairs = tl.inline_asm_elementwise(asm, "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1)
        total = tl.reduce(pairs, 1, add_pairs)
        low = (total & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)
        high = (total >> 16).to(tl.int16).to(tl.float16, bitcast=True)
        return low.to(tl.float32) + high.to(tl.float32)
    else:
        return tl.sum(p, 1)


@triton.jit
def sum_codes(p8, COLUMNS: tl.constexpr):
    """Row sums of int8 weights, exact, as one narrow matrix instruction."""
    ones = tl.full([COLUMNS, 8], 1, tl.int8)
    return tl.max(tl.dot(p8, ones, out_dtype=tl.int32), 1)


@triton.jit
def load_tile(Source, row, column, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr):
    """Tile ``[ROWS, COLUMNS]`` of an int8 matrix, by tensor descriptor or by pointer."""
    if TMA:
        return Source.load([row, column])
    else:
        r = tl.arange(0, ROWS).to(tl.int64)[:, None] * stride
        return tl.load(Source + row.to(tl.int64) * stride + column + r + tl.arange(0, COLUMNS)[None, :])


@triton.jit
def load_scale(pointer):
    """One float32, by a plain cached load: the pipeliner would copy it through shared memory, with a barrier."""
    if USE_PTX:
        asm: tl.constexpr = "ld.global.nc.f32 $0, [$1];"
        return tl.inline_asm_elementwise(asm, "=f,l", [pointer.to(tl.int64)], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return tl.load(pointer)


@triton.jit
def rescale(tile_max, M, r):
    """Maximum so far, the tile's reference and the factor for what was accumulated in units of the last one's.

    Weights of a tile are relative to its own maximum, and so is the output after it: the update is one multiply-add.
    """
    M = tl.maximum(M, tile_max)
    new = tl.maximum(tile_max, M - DEPTH)
    return M, new, tl.exp2(r - new)


@functools.cache
def has_descriptors(device: torch.device) -> bool:
    """Whether tiles are loaded by tensor descriptors (TMA): compute capability 9 and newer."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
