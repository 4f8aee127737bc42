"""A warp's registers in Triton: tensors of 32 numbers, one per lane, and the instructions that work on them.

A ``[32]`` tensor of a program of one warp is one register of every lane, whatever the compiler decides. Tuples of such
tensors are a lane's registers, so that matrix fragments can be named one by one and nothing is ever laid out anew.
Lane ``4 g + q`` of a fragment has row g and column q. The interpreter has no PTX, so each instruction has a plain form.
"""

import triton
import triton.language as tl

from homkv.attention.triton.lanes import USE_PTX


@triton.constexpr_function
def vector_load(op, count, offset):
    """``op`` of ``count`` registers from an address and a constant."""
    registers = ", ".join(f"${i}" for i in range(count))
    return f"{op}.v{count}.b32 {{{registers}}}, [${count} + {offset}];"


@triton.constexpr_function
def short_load(op, offset):
    """``op`` of 16 bits."""
    return f"{op}.u16 $0, [$1 + {offset}];"


@triton.jit
def lane_parts():
    """``(g, q)`` of every lane."""
    lane = tl.arange(0, 32)
    return lane // 4, lane % 4


@triton.jit
def load_plain(address, OFFSET: tl.constexpr, COUNT: tl.constexpr):
    """COUNT neighbouring registers, one by one."""
    out = ()
    for i in tl.static_range(COUNT):
        out = out + (tl.load((address + (OFFSET + 4 * i)).to(tl.pointer_type(tl.int32), bitcast=True)),)
    return out


@triton.jit
def load2(address, OFFSET: tl.constexpr):
    """Two registers from global memory that nothing writes meanwhile: ``address [32] int64``, a multiple of 8."""
    if USE_PTX:
        asm: tl.constexpr = vector_load("ld.global.nc", 2, OFFSET)
        return tl.inline_asm_elementwise(asm, "=r,=r,l", [address], dtype=(tl.int32, tl.int32), is_pure=True, pack=1)
    else:
        return load_plain(address, OFFSET, 2)


@triton.jit
def load4(address, OFFSET: tl.constexpr):
    """Four registers; ``address`` a multiple of 16, otherwise as :func:`load2`."""
    if USE_PTX:
        asm: tl.constexpr = vector_load("ld.global.nc", 4, OFFSET)
        return tl.inline_asm_elementwise(
            asm, "=r,=r,=r,=r,l", [address], dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1
        )
    else:
        return load_plain(address, OFFSET, 4)


@triton.jit
def load_short(address, OFFSET: tl.constexpr):
    """Two bytes as an int32, otherwise as :func:`load2`."""
    if USE_PTX:
        asm: tl.constexpr = short_load("ld.global.nc", OFFSET)
        return tl.inline_asm_elementwise(asm, "=r,l", [address], dtype=tl.int32, is_pure=True, pack=1)
    else:
        return tl.load((address + OFFSET).to(tl.pointer_type(tl.uint16), bitcast=True)).to(tl.int32)


# Single numbers go through inline PTX, too: the compiler's search for layouts takes a second for every few of Triton's
# own loads and stores.
LOAD_16 = tl.constexpr("{.reg .b16 t; ld.global.nc.b16 t, [$1]; cvt.u32.u16 $0, t;}")
LOAD_32 = tl.constexpr("ld.global.nc.b32 $0, [$1];")
STORE_32 = tl.constexpr("{.reg .pred p; setp.ne.s32 p, $3, 0; @p st.global.b32 [$1], $2; mov.b32 $0, 0;}")


@triton.jit
def load_number(pointer):
    """A float16, bfloat16 or float32 per lane as float32, from memory that nothing writes meanwhile."""
    if USE_PTX:
        DTYPE: tl.constexpr = pointer.dtype.element_ty
        WIDE: tl.constexpr = DTYPE.primitive_bitwidth == 32
        asm: tl.constexpr = LOAD_32 if WIDE else LOAD_16
        address = pointer.to(tl.int64, bitcast=True)
        x = tl.inline_asm_elementwise(asm, "=r,l", [address], dtype=tl.int32, is_pure=True, pack=1)
        if WIDE:
            return x.to(tl.float32, bitcast=True)
        else:
            return x.to(tl.int16).to(DTYPE, bitcast=True).to(tl.float32)
    else:
        return tl.load(pointer).to(tl.float32)


@triton.jit
def store_number(pointer, x, own):
    """Store a float32 of every lane whose ``own`` is true."""
    if USE_PTX:
        address = pointer.to(tl.int64, bitcast=True)
        tl.inline_asm_elementwise(
            STORE_32, "=r,l,r,r", [address, x.to(tl.int32, bitcast=True), own.to(tl.int32)], dtype=tl.int32,
            is_pure=False, pack=1,
        )  # fmt: skip
    else:
        tl.store(pointer, x, mask=own)


_MMA = "mma.sync.aligned.%s {$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
MMA_S8 = tl.constexpr(_MMA % "m16n8k32.row.col.s32.s8.s8.s32")
MMA_U8 = tl.constexpr(_MMA % "m16n8k32.row.col.s32.s8.u8.s32")
MMA_F16 = tl.constexpr(_MMA % "m16n8k16.row.col.f32.f16.f16.f32")


@triton.jit
def bytes_of(x, UNSIGNED: tl.constexpr):
    """Four bytes of each int32 along a new last dimension, float32."""
    x = (x.reshape([x.numel, 1]) >> (8 * tl.arange(0, 4))[None, :]) & 255
    return (x if UNSIGNED else ((x + 128) & 255) - 128).to(tl.float32)


@triton.jit
def halves_of(x):
    """Two float16 of each int32 along a new last dimension, float32."""
    x = (x.reshape([x.numel, 1]) >> (16 * tl.arange(0, 2))[None, :]) & 65535
    return x.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def multiply_plain(a, b, N: tl.constexpr):
    """``a b`` as an accumulator's four registers; N elements per register, spread out ``[.., N]`` behind the lanes."""
    a = a.reshape([8, 4, 2, 2, N]).permute(3, 0, 2, 1, 4).reshape([16, 8 * N])
    b = b.reshape([8, 4, 2, N]).permute(2, 1, 3, 0).reshape([8 * N, 8])
    c = tl.sum(a[:, :, None] * b[None, :, :], 1).reshape([2, 32, 2]).permute(1, 2, 0)
    top, bottom = tl.split(c)
    c0, c1 = tl.split(top)
    c2, c3 = tl.split(bottom)
    return c0, c1, c2, c3


@triton.jit
def add_plain(c, x):
    """``c + x`` of four registers, as registers of c's type."""
    out = ()
    for i in tl.static_range(4):
        out = out + (c[i] + x[i].to(c[i].dtype),)
    return out


@triton.jit
def mma8(a, b0, b1, c, UNSIGNED: tl.constexpr):
    """``c + a b`` of int8 a ``[16, 32]`` and int8 or uint8 b ``[32, 8]`` in int32; a and c are tuples of four."""
    if USE_PTX:
        asm: tl.constexpr = MMA_U8 if UNSIGNED else MMA_S8
        return tl.inline_asm_elementwise(
            asm, "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r,r", [a[0], a[1], a[2], a[3], b0, b1, c[0], c[1], c[2], c[3]],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
        )  # fmt: skip
    else:
        x = bytes_of(tl.join(tl.join(a[0], a[2]), tl.join(a[1], a[3])), False)
        return add_plain(c, multiply_plain(x, bytes_of(tl.join(b0, b1), UNSIGNED), 4))


@triton.jit
def mma16(a, b0, b1, c):
    """``c + a b`` of float16 a ``[16, 16]`` and b ``[16, 8]`` in float32; a and c are tuples of four."""
    if USE_PTX:
        return tl.inline_asm_elementwise(
            MMA_F16, "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f", [a[0], a[1], a[2], a[3], b0, b1, c[0], c[1], c[2], c[3]],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=True, pack=1,
        )  # fmt: skip
    else:
        x = halves_of(tl.join(tl.join(a[0], a[2]), tl.join(a[1], a[3])))
        return add_plain(c, multiply_plain(x, halves_of(tl.join(b0, b1)), 2))


# Low bytes of an accumulator ``[16, 8]`` to half of a right operand ``[32, 8]``: lane (g, q) gets column g of rows
# 2 q, 2 q + 8, 2 q + 1, 2 q + 9.
TRANSPOSE = tl.constexpr(
    "{.reg .b32 t, u, w; prmt.b32 t, $1, $3, 0x0040; prmt.b32 u, $2, $4, 0x0040; prmt.b32 w, t, u, 0x5410; "
    "movmatrix.sync.aligned.m8n8.trans.b16 $0, w;}"
)


@triton.jit
def transpose_bytes(x):
    """Half a right operand from the low bytes of an accumulator; see TRANSPOSE."""
    if USE_PTX:
        return tl.inline_asm_elementwise(
            TRANSPOSE, "=r,r,r,r,r", [x[0], x[1], x[2], x[3]], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        pair = ((x[0] & 255) | (x[2] & 255) << 8, (x[1] & 255) | (x[3] & 255) << 8)
        by_column = tl.join(pair[0], pair[1]).reshape([8, 8]).permute(1, 0)
        low, high = tl.split(by_column.reshape([32, 2]))
        return low | high << 16


@triton.constexpr_function
def shuffle(mask):
    """PTX of a butterfly."""
    return f"shfl.sync.bfly.b32 $0, $1, {mask}, 31, -1;"


@triton.jit
def across(x, MASK: tl.constexpr):
    """``x`` (float32 or int32) of lane ``own ^ MASK``."""
    if USE_PTX:
        asm: tl.constexpr = shuffle(MASK)
        operands: tl.constexpr = "=f,f" if x.dtype == tl.float32 else "=r,r"
        return tl.inline_asm_elementwise(asm, operands, [x], dtype=x.dtype, is_pure=True, pack=1)
    else:
        return tl.gather(x, tl.arange(0, x.numel) ^ MASK, 0)


@triton.jit
def from_lane(x, lane):
    """``x`` (float32) of another lane."""
    if USE_PTX:
        return tl.inline_asm_elementwise(
            "shfl.sync.idx.b32 $0, $1, $2, 31, -1;", "=f,f,r", [x, lane], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.gather(x, lane, 0)


@triton.jit
def max_over_rows(x):
    """Maximum over the lanes of one q."""
    x = tl.maximum(x, across(x, 4))
    x = tl.maximum(x, across(x, 8))
    return tl.maximum(x, across(x, 16))


@triton.jit
def sum_over_rows(x):
    """Sum over the lanes of one q."""
    x = x + across(x, 4)
    x = x + across(x, 8)
    return x + across(x, 16)


@triton.jit
def pack_bytes(x):
    """Low bytes of four int32."""
    if USE_PTX:
        return tl.inline_asm_elementwise(
            "{.reg .b32 t, u; prmt.b32 t, $1, $2, 0x0040; prmt.b32 u, $3, $4, 0x0040; prmt.b32 $0, t, u, 0x5410;}",
            "=r,r,r,r,r", [x[0], x[1], x[2], x[3]], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return (x[0] & 255) | (x[1] & 255) << 8 | (x[2] & 255) << 16 | x[3] << 24


@triton.jit
def pack_halves(low, high):
    """Two float32 to float16, rounded to nearest even, in one register."""
    if USE_PTX:
        return tl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        first = low.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 65535
        return first | high.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) << 16
