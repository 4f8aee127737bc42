"""Codes of a rows page as float16 operands of matrix instructions, and products with them.

A plane of codes is masked in place. The result, read as float16, is a denormal number, ``code * 2**(position - 24)``:
exact, with no instruction spent on converting. Bytes are loaded in pairs (int16), so that a register holds two numbers
made of its even bytes and two made of its odd ones, which are separate runs of the sum. Thread (g, q) of the left
operand of ``mma.m16n8k16`` holds rows g and g + 8 and four bytes of each, as in homkv.attention.triton.warp_page.
"""

import triton
import triton.language as tl

from homkv.attention.triton.lanes import USE_PTX
from homkv.bench.peers.dequant_centre import load_scales

HALF_STEP = tl.constexpr({2: 96.0, 4: 120.0, 8: 128.0})  # lane value = code << (8 - bits), minus this
UNIT = tl.constexpr(2.0**24)  # float16's smallest number is one over this


def _restore_asm(bits: int, plane: int) -> str:
    """PTX for one plane of the even bytes of a register: ``(x & mask) ^ sign``."""
    mask = ((1 << bits) - 1) << (8 - bits - bits * plane)
    sign = 1 << (7 - bits * plane)
    return (
        f"{{.reg .b32 m, s; mov.b32 m, 0x{mask * 0x10001:08x}; mov.b32 s, 0x{sign * 0x10001:08x};"
        "lop3.b32 $0, $1, m, s, 0x6A;}"
    )


_RESTORE = tl.constexpr({(b, p): _restore_asm(b, p) for b in (2, 4, 8) for p in range(8 // b)})

# Two float32 become a pair of float16, and an 8 x 8 block of these pairs turns across the warp.
_TURN = tl.constexpr("{.reg .b32 u; cvt.rn.f16x2.f32 u, $2, $1; movmatrix.sync.aligned.m8n8.trans.b16 $0, u;}")


@triton.constexpr_function
def plane_exponent(tile, bits):
    """A restored code is worth 2**this less in tile ``tile`` (16 tokens) than in plane 0."""
    return bits * (tile * 2 // bits)


@triton.constexpr_function
def half_step(bits):
    """What a lane value lacks to its code, see HALF_STEP."""
    return HALF_STEP.value[bits]


@triton.jit
def high_bytes(x):
    """Pairs of bytes (int16) moved down, so that restore() finds the upper one below."""
    if USE_PTX:
        return tl.inline_asm_elementwise("shr.u32 $0, $1, 8;", "=r,r", [x], dtype=tl.int16, is_pure=True, pack=2)
    else:
        return x >> 8


@triton.jit
def restore(x, PLANE: tl.constexpr, BITS: tl.constexpr):
    """Codes of one plane of the lower bytes of ``x`` (int16) as float16: ``code * 2**(8 - BITS - BITS * PLANE - 24)``.

    0 <= code < 2**BITS: the lane value and the half step, without the latter's fraction.
    """
    if USE_PTX:
        asm: tl.constexpr = _RESTORE[(BITS, PLANE)]
        return tl.inline_asm_elementwise(asm, "=r,r", [x], dtype=tl.float16, is_pure=True, pack=2)
    else:
        MASK: tl.constexpr = ((1 << BITS) - 1) << (8 - BITS - BITS * PLANE)
        code = (x & MASK) ^ (1 << (7 - BITS * PLANE))
        return code.to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def row_scale(byte, EXPONENT: tl.constexpr):
    """One tile's E5M3 scales times ``2**EXPONENT``, ``[16, 1]`` float32."""
    bits = (byte.to(tl.uint8, bitcast=True).to(tl.int32) << 20) + ((103 + EXPONENT) << 23)
    return bits.to(tl.float32, bitcast=True)[:, None]


# -- keys --------------------------------------------------------------------------------------------------------


@triton.jit
def load_keys(page, OFFSET: tl.constexpr, GROUPS: tl.constexpr, BITS: tl.constexpr):
    """Packed keys of 32 channels, ``[4, 8, 2, BITS / 2, 4]`` pairs of bytes: q, g, half, token block, (row, pair).

    GROUPS: runs of four channels the class has left. Fewer than 8: the last one is read again and meets zero queries.
    """
    q = tl.arange(0, 4)[:, None, None, None, None]
    g = tl.arange(0, 8)[None, :, None, None, None]
    half = tl.arange(0, 2)[None, None, :, None, None]
    block = tl.arange(0, BITS // 2)[None, None, None, :, None]
    pair = tl.arange(0, 4)[None, None, None, None, :]
    group = tl.minimum(half * 4 + q, GROUPS - 1)
    pointer = (page + OFFSET).to(tl.pointer_type(tl.int16), bitcast=True)
    return tl.load(pointer + group * (16 * BITS) + block * 32 + g * 4 + pair)


@triton.jit
def load_page_keys(page, K: tl.constexpr):
    """All packed keys and their scales: per class ``(steps, scales)``."""
    out = ()
    for c in tl.static_range(len(K)):
        steps = ()
        for step in tl.static_range((K[c][1] + 31) // 32):
            steps += (load_keys(page, K[c][3] + step * 256 * K[c][2], K[c][1] // 4 - step * 8, K[c][2]),)
        out += ((steps, load_scales(page, K[c][4])),)
    return out


@triton.jit
def key_product(x, q, acc, PLANE: tl.constexpr, BITS: tl.constexpr):
    """Add the products of 16 tokens with 32 channels: ``x [4, 8, 2, 2, 2]`` (q, g, half, row, pair), q (even, odd)."""
    even = restore(x, PLANE, BITS).permute(3, 1, 2, 0, 4).reshape([16, 16])
    odd = restore(high_bytes(x), PLANE, BITS).permute(3, 1, 2, 0, 4).reshape([16, 16])
    return tl.dot(odd, q[1], tl.dot(even, q[0], acc))


@triton.jit
def key_step(x, q, acc, BITS: tl.constexpr):
    """Add the products of 32 channels to four tiles of 16 tokens."""
    if BITS == 2:
        x = x.reshape([4, 8, 2, 2, 2])
        out = ()
        for i in tl.static_range(4):
            out += (key_product(x, q, acc[i], i, 2),)
        return out
    elif BITS == 4:
        x0, x1 = tl.split(x.reshape([4, 8, 2, 2, 2, 2]).permute(0, 1, 2, 4, 5, 3))
        a0 = key_product(x0, q, acc[0], 0, 4)
        a1 = key_product(x1, q, acc[1], 0, 4)
        a2 = key_product(x0, q, acc[2], 1, 4)
        a3 = key_product(x1, q, acc[3], 1, 4)
        return (a0, a1, a2, a3)
    else:
        low, high = tl.split(x.reshape([4, 8, 2, 2, 2, 2, 2]).permute(0, 1, 2, 5, 6, 4, 3))
        x0, x1 = tl.split(low)
        x2, x3 = tl.split(high)
        a0 = key_product(x0, q, acc[0], 0, 8)
        a1 = key_product(x1, q, acc[1], 0, 8)
        a2 = key_product(x2, q, acc[2], 0, 8)
        a3 = key_product(x3, q, acc[3], 0, 8)
        return (a0, a1, a2, a3)


@triton.jit
def page_scores(keys, q16, offsets, K: tl.constexpr, N: tl.constexpr):
    """Scores of a page without the centre's term, four tiles ``[16, N]``, in units of the query's power of two."""
    out = ()
    for c in tl.static_range(len(K)):
        acc = (tl.zeros([16, N], tl.float32),) * 4
        for step in tl.static_range((K[c][1] + 31) // 32):
            acc = key_step(keys[c][0][step], q16[c][step], acc, K[c][2])
        new = ()
        for i in tl.static_range(4):
            y = acc[i] * (UNIT * 2.0 ** plane_exponent(i, K[c][2])) - offsets[c]
            y = y * row_scale(keys[c][1][i], 0)
            if c > 0:
                y += out[i]
            new += (y,)
        out = new
    return out


# -- values ------------------------------------------------------------------------------------------------------


@triton.jit
def load_values(page, OFFSET: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr, BITS: tl.constexpr):
    """Packed values of 32 channels, ``[4, 8, BITS / 2, 8]`` pairs of bytes: q, g, token block, (channel, pair).

    GROUPS: runs of four channels the class has left. Fewer than 8: the last one is read again and not stored.
    """
    q = tl.arange(0, 4)[:, None, None, None]
    g = tl.minimum(tl.arange(0, 8), GROUPS - 1)[None, :, None, None]
    block = tl.arange(0, BITS // 2)[None, None, :, None]
    pair = tl.arange(0, 8)[None, None, None, :]
    pointer = (page + OFFSET).to(tl.pointer_type(tl.int16), bitcast=True)
    return tl.load(pointer + (block * 4 + q) * (2 * WIDTH) + g * 8 + pair)


@triton.jit
def load_page_values(page, V: tl.constexpr):
    """All packed values and their scales: per class ``(blocks, scales)``."""
    out = ()
    for c in tl.static_range(len(V)):
        blocks = ()
        for i in tl.static_range((V[c][1] + 31) // 32):
            blocks += (load_values(page, V[c][3] + i * 128, V[c][1], V[c][1] // 4 - i * 8, V[c][2]),)
        out += ((blocks, load_scales(page, V[c][4])),)
    return out


@triton.jit
def token_tile(x, PLANE: tl.constexpr, BITS: tl.constexpr):
    """One plane of ``x [..., pair]`` with even and odd bytes joined: ``[..., pair, 2]``."""
    return tl.join(restore(x, PLANE, BITS), restore(high_bytes(x), PLANE, BITS))


@triton.jit
def value_block(x, w0, w1, BITS: tl.constexpr, N: tl.constexpr):
    """``sum_t w[t] code[t]`` of 32 channels, ``[32, N]``. Row ``8 u + g`` is channel ``4 g + u`` of the block."""
    if BITS == 2:
        x = x.reshape([4, 8, 4, 2])
        low = tl.join(token_tile(x, 0, 2), token_tile(x, 1, 2)).permute(2, 1, 0, 5, 4, 3).reshape([32, 32])
        high = tl.join(token_tile(x, 2, 2), token_tile(x, 3, 2)).permute(2, 1, 0, 5, 4, 3).reshape([32, 32])
    elif BITS == 4:
        x = x.reshape([4, 8, 2, 4, 2])
        low = token_tile(x, 0, 4).permute(3, 1, 0, 2, 5, 4).reshape([32, 32])
        high = token_tile(x, 1, 4).permute(3, 1, 0, 2, 5, 4).reshape([32, 32])
    else:
        x0, x1 = tl.split(x.reshape([4, 8, 2, 2, 4, 2]).permute(0, 1, 3, 4, 5, 2))
        low = token_tile(x0, 0, 8).permute(3, 1, 0, 2, 5, 4).reshape([32, 32])
        high = token_tile(x1, 0, 8).permute(3, 1, 0, 2, 5, 4).reshape([32, 32])
    return tl.dot(high, w1, tl.dot(low, w0, tl.zeros([32, N], tl.float32)))


@triton.jit
def turn(p):
    """Weights ``[16, N]`` (float32) to float16, every 8 x 8 block transposed: from a product to the next one's operand.

    One instruction moves a block, if ``p`` lies as a product leaves it: thread (g, q) holds columns 2 q and 2 q + 1.
    """
    if USE_PTX:
        return tl.inline_asm_elementwise(_TURN, "=r,r,r", [p], dtype=tl.float16, is_pure=True, pack=2)
    else:
        N: tl.constexpr = p.shape[1]
        return p.to(tl.float16).reshape([2, 8, N // 8, 8]).permute(0, 3, 2, 1).reshape([16, N])


@triton.jit
def weight_tile(low, high, N: tl.constexpr):
    """Weights of two tiles ``[16, N]`` (row, q, pair) to the right operand ``[32, N]`` (q, tile, row, pair)."""
    both = tl.join(turn(low), turn(high)).reshape([2, 8, N // 8, 4, 2, 2]).permute(3, 5, 0, 4, 2, 1)
    return both.reshape([32, N])
