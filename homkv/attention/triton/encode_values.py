"""Encoding of values: tokens in order, each taking over part of its predecessor's error (docs/format.md).

The tokens of a page must follow each other, so a warp works on the same token of many pages. Their bytes pass through
memory: a byte collects its planes' codes as the tokens come, in the place of the four tokens and some channels that
its dword will hold, and is put in order at the end.
"""

import triton
import triton.language as tl

from homkv.attention.triton.encode_fit import fit2, fit4, fit8, rotate
from homkv.attention.triton.lanes import MAGIC, USE_PTX
from homkv.attention.triton.threads import (
    bytes_of_stride,
    load_floats,
    load_own,
    load_word,
    prefetch_row,
    store_own,
)
from homkv.quant import DIFFUSION

CARRIED = tl.constexpr(DIFFUSION)
AHEAD = tl.constexpr(2)  # tokens: how far ahead values are brought to the L2 cache
# What is wrong, as bits of the status.
KEY_MEAN, KEY_SCALE, VALUE_SCALE, NOT_FINITE = tl.constexpr(1), tl.constexpr(2), tl.constexpr(4), tl.constexpr(8)


@triton.constexpr_function
def group_of(tensors):
    """Bytes of one lane's channels that are stored as a word: 4, 2 or 1."""
    return 4 if tensors % 4 == 0 else 2 if tensors % 2 == 0 else 1


@triton.constexpr_function
def words_of(tensors):
    """Words of one lane that are stored together."""
    return 4 if tensors % 16 == 0 else 2 if tensors % 8 == 0 else 1


@triton.constexpr_function
def sign_bits(bits):
    """The top bit of every code in a dword of ``bits``-bit codes: stored codes have it inverted until the end."""
    return {2: 0xAAAAAAAA, 4: 0x88888888, 8: 0x80808080}[bits] - (1 << 32)


# Sums of integers above 2**23 are their bits: 2**7 * high + low / 2, rounded up, of odd integers 2 * code + 1 is
# 256 * code + code + 129, and the constant makes every code start at 0.
_CODES = "{{.reg .f32 t; fma.rp.f32 t, $1, 0f3F000000, 0f{:08X}; fma.rn.f32 $0, $2, 0f43000000, t;}}"
CODES_2 = tl.constexpr(_CODES.format(0x4B400000 + 2 * 257 - 129))
CODES_4 = tl.constexpr(_CODES.format(0x4B400000 + 8 * 257 - 129))


@triton.jit
def two_codes(low, high, BITS: tl.constexpr):
    """Two results of a fit as unsigned bytes below 16 bits of something else."""
    if BITS == 8:
        return tl.fma(high, 256.0, low + (MAGIC + 128 * 257)).to(tl.int32, bitcast=True)
    elif USE_PTX:
        asm: tl.constexpr = CODES_2 if BITS == 2 else CODES_4
        both = tl.inline_asm_elementwise(asm, "=f,f,f", [low, high], dtype=tl.float32, is_pure=True, pack=1)
        return both.to(tl.int32, bitcast=True)
    else:
        return one_byte(low, BITS) | (one_byte(high, BITS) << 8)


@triton.jit
def one_byte(code, BITS: tl.constexpr):
    """A result of a fit as an unsigned byte."""
    if BITS == 8:
        return (code + (MAGIC + 128.0)).to(tl.int32, bitcast=True) & 0xFF
    else:
        return ((code + (MAGIC + ((1 << BITS) - 1.0))).to(tl.int32, bitcast=True) & 0xFF) >> 1


@triton.jit
def four_bytes(c0, c1, c2, c3, BITS: tl.constexpr):
    """Four results of a fit as unsigned bytes of a dword."""
    low = two_codes(c0, c1, BITS)
    high = two_codes(c2, c3, BITS)
    if USE_PTX:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, 0x5410;", "=r,r,r", [low, high], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        return (low & 0xFFFF) | (high << 16)


@triton.jit
def is_too_large(bits):
    """Whether any scale's bits, uint32, are those of one beyond 240, whose byte would pass 255, or of a NaN."""
    return tl.max((bits >> 20).to(tl.int32), 0) >= 256 + (103 << 3)


@triton.jit
def locate_pages(Pages, Blocks, i, heads, num_blocks, SCATTER: tl.constexpr, PAGE_BYTES: tl.constexpr):
    """Addresses of pages ``i``: page ``i / heads`` of head ``i % heads``. A wrong block id stays inside the pool."""
    block = i // heads
    if SCATTER:
        found = load_word(Blocks.to(tl.int64, bitcast=True) + block.to(tl.int64) * 4)
        block = tl.minimum(tl.maximum(found, 0), num_blocks - 1)
    return Pages.to(tl.int64, bitcast=True) + (block.to(tl.int64) * heads + i % heads) * PAGE_BYTES


@triton.jit
def locate_tokens(X, i, heads, stride_h, stride_t):
    """Addresses of the first token of pages ``i``, numbered as for :func:`locate_pages`."""
    SIZE: tl.constexpr = X.dtype.element_ty.primitive_bitwidth // 8
    offset = (i % heads).to(tl.int64) * stride_h + (i // heads).to(tl.int64) * 64 * stride_t
    return X.to(tl.int64, bitcast=True) + offset * SIZE


@triton.jit
def fit(y, WIDTH: tl.constexpr, BITS: tl.constexpr, LANES: tl.constexpr):
    """Codes of rows ``y`` as the fits give them, bits of the scales, and what a code is worth."""
    if BITS == 8:
        codes, bits = fit8(y, LANES)
        return codes, bits, bits.to(tl.float32, bitcast=True)
    elif BITS == 4:
        codes, bits = fit4(y, WIDTH, LANES)
        return codes, bits, bits.to(tl.float32, bitcast=True) * 8.0
    else:
        codes, bits = fit2(y, WIDTH, LANES)
        return codes, bits, bits.to(tl.float32, bitcast=True) * 32.0


@triton.jit
def words_from(codes, FIRST: tl.constexpr, GROUP: tl.constexpr, WORDS: tl.constexpr, BITS: tl.constexpr):
    """WORDS words of GROUP codes each, from tensor FIRST on."""
    out = ()
    for w in tl.static_range(WORDS):
        if GROUP == 4:
            out = out + (four_bytes(codes[FIRST + 4 * w], codes[FIRST + 4 * w + 1], codes[FIRST + 4 * w + 2],
                                    codes[FIRST + 4 * w + 3], BITS),)  # fmt: skip
        elif GROUP == 2:
            out = out + (two_codes(codes[FIRST], codes[FIRST + 1], BITS) & 0xFFFF,)
        else:
            out = out + (one_byte(codes[FIRST], BITS),)
    return out


@triton.jit
def collect(codes, at, live, more, BITS: tl.constexpr, LANES: tl.constexpr):
    """Add one token's codes to a lane's bytes at ``at [N]``: behind what is there, unless the token is of plane 0.

    ``at``: of runs of 4 tokens x LANES lanes x one access, which follow each other.
    """
    GROUP: tl.constexpr = group_of(len(codes))
    WORDS: tl.constexpr = words_of(len(codes))
    for i in tl.static_range(len(codes) // (GROUP * WORDS)):
        words = words_from(codes, i * GROUP * WORDS, GROUP, WORDS, BITS)
        place = at + i * 4 * LANES * GROUP * WORDS
        if BITS < 8:
            old = load_own(place, more, WORDS, GROUP)
            sums = ()
            for w in tl.static_range(WORDS):
                sums = sums + (words[w] + (old[w] << BITS),)
            words = sums
        store_own(place, words, live, GROUP)


@triton.jit
def byte_of_four(rows, W: tl.constexpr, J: tl.constexpr):
    """Byte J of word W of four tokens, in one register."""
    out = (rows[0][W] >> (8 * J)) & 0xFF
    for token in tl.static_range(1, 4):
        out = out | (((rows[token][W] >> (8 * J)) & 0xFF) << (8 * token))
    return out


@triton.jit
def put_in_order(codes, lane, live, WIDTH: tl.constexpr, BITS: tl.constexpr, LANES: tl.constexpr):
    """From collected bytes ``[4 tokens][lane][channels]`` to a channel's four tokens in a dword, in place."""
    GROUP: tl.constexpr = group_of(WIDTH // LANES)
    WORDS: tl.constexpr = words_of(WIDTH // LANES)
    ACCESS: tl.constexpr = GROUP * WORDS
    for i in tl.range(2 * BITS * WIDTH // (LANES * ACCESS), num_stages=1):
        run = codes + i * (4 * LANES * ACCESS)
        rows = ()
        for token in tl.static_range(4):
            rows = rows + (load_own(run + (token * LANES + lane) * ACCESS, live, WORDS, GROUP),)
        tl.debug_barrier()  # all lanes have read what others overwrite
        for w in tl.static_range(WORDS):
            for j in tl.static_range(GROUP):
                word = byte_of_four(rows, w, j) ^ sign_bits(BITS)
                store_own(run + ((w * GROUP + j) * LANES + lane) * 4, (word,), live, 4)


@triton.jit
def load_rotated(address, lane, V: tl.constexpr, I: tl.constexpr, LANES: tl.constexpr, DTYPE: tl.constexpr):
    """Class I of rows, rotated; ``address [N] int64`` is of the row's first channel."""
    x = load_floats(address, V[I][0], V[I][1], DTYPE)
    return rotate(x, lane, LANES, V[I][1] & -V[I][1])


@triton.jit
def encode_value_class(
    token, stride_t, page, lane, live, V: tl.constexpr, I: tl.constexpr, LANES: tl.constexpr, OVERLAP: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Codes and scales of class I of pages; ``token page [N] int64``: addresses of the first values and of the page.

    OVERLAP: rotate the next token while this one's sums are waited for, at the price of registers. Returns the largest
    bits of a scale, uint32.
    """
    WIDTH: tl.constexpr = V[I][1]
    BITS: tl.constexpr = V[I][2]
    J: tl.constexpr = WIDTH // LANES
    ACCESS: tl.constexpr = group_of(J) * words_of(J)
    SIZE: tl.constexpr = DTYPE.primitive_bitwidth // 8
    stride = bytes_of_stride(stride_t, SIZE)
    codes_at = page + V[I][3]
    error = ()
    for _ in tl.static_range(J):
        error = error + (tl.zeros(lane.shape, tl.float32),)
    worst = tl.zeros(lane.shape, tl.uint32)
    scales = tl.zeros(lane.shape, tl.int32)
    x = error
    if OVERLAP:
        x = load_rotated(token, lane, V, I, LANES, DTYPE)
    for t in tl.range(64, num_stages=1):
        prefetch_row(token + tl.minimum(63 - t, AHEAD) * stride, lane, V[I][0] * SIZE, WIDTH * SIZE, LANES)
        if not OVERLAP:
            x = load_rotated(token, lane, V, I, LANES, DTYPE)
        y = ()
        for j in tl.static_range(J):
            y = y + (tl.fma(error[j], CARRIED, x[j]),)
        token += tl.minimum(63 - t, 1) * stride
        if OVERLAP:
            x = load_rotated(token, lane, V, I, LANES, DTYPE)
        codes, bits, worth = fit(y, WIDTH, BITS, LANES)
        error = ()
        for j in tl.static_range(J):
            error = error + (tl.fma(codes[j], -worth, y[j]),)
        worst = tl.maximum(worst, bits.to(tl.uint32, bitcast=True))
        scales = ((scales >> 8) & 0xFFFFFF) | (((bits >> 20) - (103 << 3)) << 24)
        store_own(page + V[I][4] + t // 4 * 4, (scales,), live & (lane == 0) & (t % 4 == 3), 4)
        slot = t % (8 * BITS)
        at = codes_at + (slot // 4 * (4 * WIDTH) + slot % 4 * (LANES * ACCESS)) + lane * ACCESS
        collect(codes, at, live, live & (t >= 8 * BITS), BITS, LANES)
    put_in_order(codes_at, lane, live, WIDTH, BITS, LANES)
    return worst


@triton.jit
def encode_values(
    VIn, stride_h, stride_t, Pages, Blocks, Status, first, count, heads, num_blocks, V: tl.constexpr, I: tl.constexpr,
    PAGE_BYTES: tl.constexpr, LANES: tl.constexpr, OVERLAP: tl.constexpr, THREADS: tl.constexpr,
    SCATTER: tl.constexpr,
):  # fmt: skip
    """Class I of the values of THREADS / LANES pages from ``first`` on."""
    thread = tl.arange(0, THREADS)
    i = first + thread // LANES
    live = i < count
    i = tl.minimum(i, count - 1)
    page = locate_pages(Pages, Blocks, i, heads, num_blocks, SCATTER, PAGE_BYTES)
    token = locate_tokens(VIn, i, heads, stride_h, stride_t)
    DTYPE: tl.constexpr = VIn.dtype.element_ty
    worst = encode_value_class(token, stride_t, page, thread % LANES, live, V, I, LANES, OVERLAP, DTYPE)
    if is_too_large(worst):
        tl.atomic_or(Status, VALUE_SCALE)
