"""Encoding of values: tokens in order, each taking over part of its predecessor's error (docs/format.md).

The tokens of a page must follow each other, so a warp works on the same token of many pages. Their bytes pass through
memory: a byte collects its planes' codes as the tokens come, in the place of the four tokens and few channels that
its dword will hold, and is put in order at the end.
"""

import triton
import triton.language as tl

from homkv.attention.triton.encode_fit import fit2, fit4, fit8, rotate, rotate_lanes
from homkv.attention.triton.lanes import MAGIC, USE_PTX
from homkv.quant import DIFFUSION

CARRIED = tl.constexpr(DIFFUSION)
AHEAD = tl.constexpr(2)  # tokens: how far ahead values are brought to the L2 cache
# What is wrong, as bits of the status.
KEY_MEAN, KEY_SCALE, VALUE_SCALE, NOT_FINITE = tl.constexpr(1), tl.constexpr(2), tl.constexpr(4), tl.constexpr(8)


@triton.constexpr_function
def group_of(tensors):
    """Bytes of one lane's channels that are stored together: 4, 2 or 1."""
    return 4 if tensors % 4 == 0 else 2 if tensors % 2 == 0 else 1


@triton.constexpr_function
def word_type(size):
    """Integer type of so many bytes."""
    return {1: tl.int8, 2: tl.int16, 4: tl.int32}[size]


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
    """Whether a scale's bits, uint32, are those of one beyond 240, whose byte would pass 255, or of a NaN."""
    return tl.max((bits >> 20).to(tl.int32), 0) >= 256 + (103 << 3)


@triton.jit
def locate_pages(Pages, Blocks, i, heads, num_blocks, SCATTER: tl.constexpr, PAGE_BYTES: tl.constexpr):
    """Pointers to pages ``i``: page ``i / heads`` of head ``i % heads``. A wrong block id stays inside the pool."""
    block = i // heads
    if SCATTER:
        block = tl.minimum(tl.maximum(tl.load(Blocks + block), 0), num_blocks - 1)
    return Pages + (tl.cast(block, tl.int64) * heads + i % heads) * PAGE_BYTES


@triton.jit
def locate_tokens(X, i, heads, stride_h, stride_t):
    """Pointers to the first token of pages ``i``, numbered as for :func:`locate_pages`."""
    return X + (tl.cast(i % heads, tl.int64) * stride_h + tl.cast(i // heads, tl.int64) * 64 * stride_t)


@triton.jit
def load_row(token, J: tl.constexpr, LANES: tl.constexpr, C: tl.constexpr):
    """A row's channels, all of them in every lane: J tensors ``[R, LANES, C]`` float32; ``token [R]`` points to it."""
    at = token[:, None, None] + tl.arange(0, C)[None, None, :]
    at = tl.broadcast_to(at, [token.shape[0], LANES, C])
    x = ()
    for j in tl.static_range(J):
        x = x + (tl.load(at + j * C).to(tl.float32),)
    return x


@triton.jit
def prefetch_rows(token, LANES: tl.constexpr, WIDTH: tl.constexpr):
    """Ask for WIDTH numbers at each of ``token [R]`` to be brought into the L2 cache, a line per lane."""
    if USE_PTX:
        SIZE: tl.constexpr = WIDTH * (token.dtype.element_ty.primitive_bitwidth // 8)
        start = token.to(tl.pointer_type(tl.int8), bitcast=True)[:, None]
        line = tl.arange(0, LANES)[None, :] * 128
        for i in tl.static_range((SIZE + 128 * LANES - 1) // (128 * LANES)):
            address = start + tl.minimum(line + i * 128 * LANES, SIZE - 1)
            tl.inline_asm_elementwise(
                "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [address.to(tl.int64, bitcast=True)],
                dtype=tl.int32, is_pure=False, pack=1,
            )  # fmt: skip


@triton.jit
def fit(y, WIDTH: tl.constexpr, BITS: tl.constexpr):
    """Codes of rows ``y`` as the fits give them, bits of the scales ``[R]``, and what a code is worth, ``[R]``."""
    if BITS == 8:
        codes, bits = fit8(y)
        return codes, bits, bits.to(tl.float32, bitcast=True)
    elif BITS == 4:
        codes, bits = fit4(y, WIDTH)
        return codes, bits, bits.to(tl.float32, bitcast=True) * 8.0
    else:
        codes, bits = fit2(y, WIDTH)
        return codes, bits, bits.to(tl.float32, bitcast=True) * 32.0


@triton.jit
def collect(codes, at, live, more, WIDTH: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr):
    """Add one token's codes to the bytes at ``at [R]``: shifted by what is there, unless the token is of plane 0."""
    R: tl.constexpr = codes[0].shape[0]
    L: tl.constexpr = codes[0].shape[1]
    Q: tl.constexpr = codes[0].shape[2]
    WORD: tl.constexpr = word_type(GROUP)
    inner = (tl.arange(0, L)[:, None] * Q + tl.arange(0, Q)[None, :])[None, :, :]
    at = at.to(tl.pointer_type(WORD), bitcast=True)[:, None, None] + inner
    store = tl.broadcast_to(live[:, None, None], [R, L, Q])
    for g in tl.static_range(len(codes) // GROUP):
        if GROUP == 4:
            word = four_bytes(codes[g * 4], codes[g * 4 + 1], codes[g * 4 + 2], codes[g * 4 + 3], BITS)
        elif GROUP == 2:
            word = two_codes(codes[g * 2], codes[g * 2 + 1], BITS) & 0xFFFF
        else:
            word = one_byte(codes[g], BITS)
        place = at + g * 4 * (L * Q)
        if BITS < 8:
            old = tl.load(place, mask=more, other=0).to(tl.int32)
            word = word + (old << BITS)
        tl.store(place, word.to(WORD), mask=store)


@triton.jit
def put_in_order(
    codes, live, WIDTH: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, LANES: tl.constexpr, Q: tl.constexpr
):
    """From collected bytes ``[4 tokens][lane, q][GROUP channels]`` to a channel's four tokens in a dword, in place."""
    R: tl.constexpr = codes.shape[0]
    C: tl.constexpr = LANES * Q
    SIZE: tl.constexpr = 4 * C * GROUP
    h = tl.arange(0, LANES)[:, None]
    q = tl.arange(0, Q)[None, :]
    store = tl.broadcast_to(live[:, None, None], [R, LANES, Q])
    for i in range(2 * BITS * WIDTH * 4 // SIZE):
        at = codes + i * SIZE
        source = at.to(tl.pointer_type(word_type(GROUP)), bitcast=True)[:, None, None] + (h * Q + q)[None, :, :]
        target = at.to(tl.pointer_type(tl.int32), bitcast=True)[:, None, None] + (q * LANES + h)[None, :, :]
        rows = ()
        for token in tl.static_range(4):
            rows = rows + (tl.load(source + token * C).to(tl.int32),)
        tl.debug_barrier()
        for j in tl.static_range(GROUP):
            word = (rows[0] >> (8 * j)) & 0xFF
            for token in tl.static_range(1, 4):
                word = word | (((rows[token] >> (8 * j)) & 0xFF) << (8 * token))
            tl.store(target + j * C, word ^ sign_bits(BITS), mask=store)


@triton.jit
def load_rotated(token, WIDTH: tl.constexpr, LANES: tl.constexpr, C: tl.constexpr):
    """One class of rows, rotated; ``token [R]`` points to the class's first channel."""
    return rotate(rotate_lanes(load_row(token, WIDTH // C, LANES, C), LANES), WIDTH & -WIDTH)


@triton.jit
def encode_value_class(
    token, stride_t, page, live, V: tl.constexpr, I: tl.constexpr, LANES: tl.constexpr, C: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Codes and scales of class I of R pages; ``token page live [R]``: first values, page, whether it is one.

    OVERLAP: rotate the next token while this one's sums are waited for, at the price of registers. Returns the largest
    bits of a scale, uint32.
    """
    WIDTH: tl.constexpr = V[I][1]
    BITS: tl.constexpr = V[I][2]
    J: tl.constexpr = WIDTH // C
    R: tl.constexpr = token.shape[0]
    GROUP: tl.constexpr = group_of(J)
    token += V[I][0]
    codes_at = page + V[I][3]
    scales_at = (page + V[I][4]).to(tl.pointer_type(tl.int32), bitcast=True)
    error = ()
    for _ in tl.static_range(J):
        error = error + (tl.zeros([R, LANES, C // LANES], tl.float32),)
    worst = tl.zeros([R], tl.uint32)
    scales = tl.zeros([R], tl.int32)
    x = error
    if OVERLAP:
        x = load_rotated(token, WIDTH, LANES, C)
    for t in tl.range(64, num_stages=1):
        prefetch_rows(token + tl.minimum(63 - t, AHEAD) * stride_t, LANES, WIDTH)
        if not OVERLAP:
            x = load_rotated(token, WIDTH, LANES, C)
        y = ()
        for j in tl.static_range(J):
            y = y + (tl.fma(error[j], CARRIED, x[j]),)
        token += tl.minimum(63 - t, 1) * stride_t
        if OVERLAP:
            x = load_rotated(token, WIDTH, LANES, C)
        codes, bits, worth = fit(y, WIDTH, BITS)
        error = ()
        for j in tl.static_range(J):
            error = error + (tl.fma(codes[j], tl.broadcast_to(-worth[:, None, None], codes[j].shape), y[j]),)
        worst = tl.maximum(worst, bits.to(tl.uint32, bitcast=True))
        scales = ((scales >> 8) & 0xFFFFFF) | (((bits >> 20) - (103 << 3)) << 24)
        tl.store(scales_at + t // 4, scales, mask=live & (t % 4 == 3))
        lane = t % (8 * BITS)
        at = codes_at + (lane // 4 * (4 * WIDTH) + lane % 4 * (C * GROUP))
        collect(codes, at, live, t >= 8 * BITS, WIDTH, BITS, GROUP)
    tl.debug_barrier()
    put_in_order(codes_at, live, WIDTH, BITS, GROUP, LANES, C // LANES)
    return worst


@triton.jit
def encode_values(
    VIn, stride_h, stride_t, Pages, Blocks, Status, first, count, heads, num_blocks, V: tl.constexpr, I: tl.constexpr,
    PAGE_BYTES: tl.constexpr, C: tl.constexpr, LANES: tl.constexpr, OVERLAP: tl.constexpr, THREADS: tl.constexpr,
    SCATTER: tl.constexpr,
):  # fmt: skip
    """Class I of the values of THREADS / LANES pages from ``first`` on."""
    i = first + tl.arange(0, THREADS // LANES)
    live = i < count
    i = tl.minimum(i, count - 1)
    page = locate_pages(Pages, Blocks, i, heads, num_blocks, SCATTER, PAGE_BYTES)
    token = locate_tokens(VIn, i, heads, stride_h, stride_t)
    worst = encode_value_class(token, stride_t, page, live, V, I, LANES, C, OVERLAP)
    if is_too_large(worst):
        tl.atomic_or(Status, VALUE_SCALE)
