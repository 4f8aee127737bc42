"""Tensors of one number per thread, ``[N]``: rows in registers, moved to and from memory by PTX.

LANES neighbouring threads share a row. A tuple of tensors is what a thread holds of it, so nothing has a layout to be
chosen or changed: Triton's search for layouts walks the whole kernel once for every load and store of its own, half a
second each. The interpreter has no PTX, so each piece has a plain form too.
"""

import triton
import triton.language as tl

from homkv.attention.triton.lanes import USE_PTX, prefetch_lines
from homkv.attention.triton.warp import LOAD_32, across, load2, load4


@triton.constexpr_function
def log2(n):
    """Exponent of a power of two."""
    return n.bit_length() - 1


@triton.constexpr_function
def vector_of(count, start_bytes):
    """Registers that a vector access may take: up to four, a divisor of ``count``, aligned behind ``start_bytes``."""
    return max(n for n in (1, 2, 4) if count % n == 0 and start_bytes % (4 * n) == 0)


@triton.jit
def bytes_of_stride(stride, SIZE: tl.constexpr):
    """A stride in numbers of SIZE bytes, constant or not, as int64 bytes."""
    return tl.full([], SIZE, tl.int64) * stride


# -- loads ---------------------------------------------------------------------------------------------------------


@triton.jit
def load_words(address, OFFSET: tl.constexpr, COUNT: tl.constexpr):
    """COUNT registers at ``address [N] int64`` plus OFFSET bytes, from memory that nothing writes meanwhile."""
    VECTOR: tl.constexpr = vector_of(COUNT, OFFSET)
    out = ()
    for i in tl.static_range(COUNT // VECTOR):
        if VECTOR == 4:
            out = out + load4(address, OFFSET + 16 * i)
        elif VECTOR == 2:
            out = out + load2(address, OFFSET + 8 * i)
        else:
            out = out + (load_word(address + (OFFSET + 4 * i)),)
    return out


@triton.jit
def load_word(address):
    """One register, otherwise as :func:`load_words`."""
    if USE_PTX:
        return tl.inline_asm_elementwise(LOAD_32, "=r,l", [address], dtype=tl.int32, is_pure=True, pack=1)
    else:
        return tl.load(address.to(tl.pointer_type(tl.int32), bitcast=True))


HALVES = tl.constexpr("{.reg .b16 l, h; mov.b32 {l, h}, $2; cvt.f32.f16 $0, l; cvt.f32.f16 $1, h;}")


@triton.jit
def to_floats(word, DTYPE: tl.constexpr):
    """The numbers of type DTYPE in a register, as float32."""
    WIDE: tl.constexpr = DTYPE.primitive_bitwidth == 32
    if WIDE:
        return (word.to(tl.float32, bitcast=True),)
    elif DTYPE.is_bf16():
        return (word << 16).to(tl.float32, bitcast=True), (word & -65536).to(tl.float32, bitcast=True)
    elif USE_PTX:
        return tl.inline_asm_elementwise(
            HALVES, "=f,=f,r", [word], dtype=(tl.float32, tl.float32), is_pure=True, pack=1
        )
    else:
        low = (word & 65535).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        return low, (word >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def load_floats(address, START: tl.constexpr, COUNT: tl.constexpr, DTYPE: tl.constexpr):
    """Numbers START .. START + COUNT of type DTYPE behind ``address [N] int64``: COUNT tensors of float32."""
    SIZE: tl.constexpr = DTYPE.primitive_bitwidth // 8
    words = load_words(address, START * SIZE, COUNT * SIZE // 4)
    out = ()
    for i in tl.static_range(len(words)):
        out = out + to_floats(words[i], DTYPE)
    return out


# -- memory that this thread wrote ---------------------------------------------------------------------------------


@triton.constexpr_function
def own_load(count, size):
    """PTX of a load of ``count`` words of ``size`` bytes where the last operand is not 0, else zeros."""
    if size < 4:
        return f"{{.reg .pred p; setp.ne.s32 p, $2, 0; mov.b32 $0, 0; @p ld.global.u{8 * size} $0, [$1];}}"
    out = [f"${i}" for i in range(count)]
    zeros = " ".join(f"mov.b32 {x}, 0;" for x in out)
    what = f"v{count}.b32 {{{', '.join(out)}}}" if count > 1 else f"b32 {out[0]}"
    return f"{{.reg .pred p; setp.ne.s32 p, ${count + 1}, 0; {zeros} @p ld.global.{what}, [${count}];}}"


@triton.constexpr_function
def own_store(count, size):
    """PTX of a store of ``count`` words of ``size`` bytes where the last operand is not 0."""
    words = [f"${i + 2}" for i in range(count)]
    if size < 4:
        what, value = f"u{8 * size}", words[0]
    else:
        what, value = (f"v{count}.b32", f"{{{', '.join(words)}}}") if count > 1 else ("b32", words[0])
    return f"{{.reg .pred p; setp.ne.s32 p, ${count + 2}, 0; @p st.global.{what} [$1], {value}; mov.b32 $0, 0;}}"


@triton.constexpr_function
def own_constraints(loads, count):
    """Operands of :func:`own_load` or :func:`own_store`."""
    return ",".join(["=r"] * count + ["l", "r"] if loads else ["=r", "l"] + ["r"] * (count + 1))


@triton.constexpr_function
def unsigned_type(size):
    """Integer type of so many bytes."""
    return {1: tl.uint8, 2: tl.uint16, 4: tl.int32}[size]


@triton.jit
def load_own(address, where, COUNT: tl.constexpr, SIZE: tl.constexpr):
    """COUNT words of SIZE bytes (one, if fewer than 4) as int32, which this program wrote; zeros unless ``where``."""
    if USE_PTX:
        asm: tl.constexpr = own_load(COUNT, SIZE)
        operands: tl.constexpr = own_constraints(True, COUNT)
        where = where.to(tl.int32)
        if COUNT == 1:
            return (tl.inline_asm_elementwise(asm, operands, [address, where], dtype=tl.int32, is_pure=False, pack=1),)
        elif COUNT == 2:
            types: tl.constexpr = (tl.int32, tl.int32)
            return tl.inline_asm_elementwise(asm, operands, [address, where], dtype=types, is_pure=False, pack=1)
        else:
            types: tl.constexpr = (tl.int32, tl.int32, tl.int32, tl.int32)
            return tl.inline_asm_elementwise(asm, operands, [address, where], dtype=types, is_pure=False, pack=1)
    else:
        TYPE: tl.constexpr = unsigned_type(SIZE)
        out = ()
        for i in tl.static_range(COUNT):
            at = (address + SIZE * i).to(tl.pointer_type(TYPE), bitcast=True)
            out = out + (tl.load(at, mask=where, other=0).to(tl.int32),)
        return out


@triton.jit
def store_own(address, words, where, SIZE: tl.constexpr):
    """Words (int32, a tuple of one, two or four) of SIZE bytes, at ``address [N] int64``, where ``where``."""
    if USE_PTX:
        COUNT: tl.constexpr = len(words)
        asm: tl.constexpr = own_store(COUNT, SIZE)
        operands: tl.constexpr = own_constraints(False, COUNT)
        where = where.to(tl.int32)
        if COUNT == 1:
            arguments = [address, words[0], where]
        elif COUNT == 2:
            arguments = [address, words[0], words[1], where]
        else:
            arguments = [address, words[0], words[1], words[2], words[3], where]
        tl.inline_asm_elementwise(asm, operands, arguments, dtype=tl.int32, is_pure=False, pack=1)
    else:
        TYPE: tl.constexpr = unsigned_type(SIZE)
        for i in tl.static_range(len(words)):
            at = (address + SIZE * i).to(tl.pointer_type(TYPE), bitcast=True)
            tl.store(at, words[i].to(TYPE), mask=where)


@triton.jit
def prefetch_row(address, lane, START: tl.constexpr, SIZE: tl.constexpr, LANES: tl.constexpr):
    """Ask for SIZE bytes, START behind ``address [N] int64``, to be brought into the L2 cache, a line per lane."""
    for i in tl.static_range((SIZE + 128 * LANES - 1) // (128 * LANES)):
        prefetch_lines(address + (tl.minimum((lane + i * LANES) * 128, SIZE - 1) + START))


# -- lanes of a row ------------------------------------------------------------------------------------------------


@triton.jit
def add_lanes(x, LANES: tl.constexpr):
    """Sum over a row's lanes, in every one of them: halves are added, from the top."""
    for level in tl.static_range(log2(LANES)):
        x += across(x, LANES >> (level + 1))
    return x


@triton.jit
def or_lanes(x, LANES: tl.constexpr):
    """Bits of any of a row's lanes, int32."""
    for level in tl.static_range(log2(LANES)):
        x = x | across(x, 1 << level)
    return x


@triton.jit
def max_lanes(x, LANES: tl.constexpr):
    """Largest int32 of a row's lanes."""
    for level in tl.static_range(log2(LANES)):
        x = tl.maximum(x, across(x, 1 << level))
    return x
