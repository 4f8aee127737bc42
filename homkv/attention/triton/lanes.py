"""What every kernel on pages shares: unpacking planes, scales, rounding to int8, the Hadamard butterfly.

Kernels use inline PTX where it saves instructions; the interpreter has none, so each piece has a plain form too. Both
give the same numbers.
"""

import triton
import triton.language as tl

from homkv.attention.triton.runtime import is_interpreting

USE_PTX = tl.constexpr(not is_interpreting())
MAGIC = tl.constexpr(12582912.0)  # 1.5 * 2**23: adding it rounds a float32 of magnitude < 2**22 to an integer
MAGIC_BITS = tl.constexpr(0x4B400000)  # the same number's bits
LOG2E = tl.constexpr(1.4426950408889634)
NEVER = tl.constexpr(-1.0e30)  # score of a token that is not there; finite, so that differences stay numbers

# One shift and one LOP3, (x & mask) | half, unpack four codes at a time. The mask and the half step of each width.
_AND_OR = "{.reg .b32 t, m, c; mov.b32 m, %s; mov.b32 c, %s; shl.b32 t, $1, %d; lop3.b32 $0, t, m, c, 0xEA;}"
_MASK = {2: "0xC0C0C0C0", 4: "0xF0F0F0F0"}
_HALF = {2: "0x20202020", 4: "0x08080808"}
PLANE_2 = tl.constexpr(tuple(_AND_OR % (_MASK[2], _HALF[2], 2 * i) for i in range(4)))
PLANE_4 = tl.constexpr(tuple(_AND_OR % (_MASK[4], _HALF[4], 4 * i) for i in range(2)))


@triton.jit
def plane(x, PLANE: tl.constexpr, BITS: tl.constexpr):
    """Lane values (int8) of one plane of packed bytes ``x`` (int8): ``((x << b * plane) & mask) | half``.

    Four neighbours along the last dimension must lie in one thread, aligned: one register holds them.
    """
    if BITS == 8:
        return x
    elif USE_PTX:
        asm: tl.constexpr = PLANE_2[PLANE] if BITS == 2 else PLANE_4[PLANE]
        return tl.inline_asm_elementwise(asm, "=r,r", [x], dtype=tl.int8, is_pure=True, pack=4)
    else:
        MASK: tl.constexpr = 0xC0 if BITS == 2 else 0xF0
        HALF: tl.constexpr = 0x20 if BITS == 2 else 0x08
        return (((x.to(tl.int32) << (BITS * PLANE)) & MASK) | HALF).to(tl.int8)


@triton.jit
def scale_value(byte):
    """E5M3 bytes (uint8) to float32: ``2**(e - 24) * (1 + m / 8)``."""
    return ((byte.to(tl.int32) << 20) + (103 << 23)).to(tl.float32, bitcast=True)


@triton.jit
def fast_log2(x):
    """Base-2 logarithm of a normal positive float32, to 2**-22 absolute: one instruction."""
    if USE_PTX:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.log2(x)


@triton.jit
def fast_reciprocal(x):
    """``1 / x`` of a normal float32, to one unit in the last place: one instruction."""
    if USE_PTX:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / x


@triton.jit
def to_int8(x):
    """Round ``x`` (float32, magnitude up to 127) half to even, to int8."""
    return (x + MAGIC).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def dot16(a, b, acc):
    """``acc + a . b`` of 16-bit floats, accumulated in float32. The interpreter cannot multiply bfloat16."""
    if USE_PTX:
        return tl.dot(a, b, acc)
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)


@triton.jit
def prefetch_lines(address):
    """Ask for the lines at ``address [N] int64`` to be brought into the L2 cache."""
    if USE_PTX:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [address], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def prefetch(page, SIZE: tl.constexpr):
    """Ask for SIZE bytes at ``page`` to be brought into the L2 cache, a line per thread."""
    line = tl.minimum(tl.arange(0, triton.next_power_of_2((SIZE + 127) // 128)) * 128, SIZE - 1)
    prefetch_lines((page + line).to(tl.int64, bitcast=True))


@triton.jit
def prefetch_bytes(address, limit, SIZE: tl.constexpr):
    """The same by one warp: SIZE bytes at ``address [32] int64``, of which ``limit`` exist."""
    for i in tl.static_range((SIZE + 4095) // 4096):
        prefetch_lines(address + tl.minimum(tl.arange(0, 32) * 128 + i * 4096, limit - 1))


@triton.jit
def hadamard(x, ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Orthonormal Walsh-Hadamard transform of blocks along the last dimension of ``x [ROWS, WIDTH]``, float32.

    The butterflies and the final scaling are docs/format.md's, operation by operation.
    """
    for level in tl.static_range(BLOCK.bit_length() - 1):
        pair = x.reshape([ROWS, WIDTH // (2 << level), 2, 1 << level]).permute(0, 1, 3, 2)
        a, b = tl.split(pair)
        x = tl.join(a + b, a - b).permute(0, 1, 3, 2).reshape([ROWS, WIDTH])
    return x * (BLOCK**-0.5)
