"""A rows page in a warp's registers: from packed bytes to scores, from weights to outputs.

The cache is always the left operand (S^T = K Q^T, O^T = V^T P^T) and query rows are the columns, so that tokens and
channels, of which there are many, fill the tall side of the matrix instructions. Bytes are loaded in pieces of 8 and 16
that are fragments as they lie: lane (g, q) holds rows g and g + 8 and four neighbours along the sum. Tile m of K holds
token ``16 m + 2 g + pair`` in row ``pair * 8 + g``; so a transposed tile of weights holds tokens ``16 m + 4 q ..`` in
the order in which V's bytes have them.

Channel classes are constants of the kernel, ``(start, width, bits, codes_offset, scales_offset)``. A class's last step
of 32 channels may be short of groups of four: the last one is read again and meets zero queries, or is not stored.
"""

import triton
import triton.language as tl

from homkv.attention.triton.lanes import MAGIC, MAGIC_BITS, PLANE_2, PLANE_4, USE_PTX, scale_value
from homkv.attention.triton.staging import read2, read4, read_short
from homkv.attention.triton.warp import mma8, mma16


@triton.constexpr_function
def count_blocks(classes, count):
    """Blocks of 32 channels in the first ``count`` classes."""
    return sum((width + 31) // 32 for _, width, *_ in classes[:count])


@triton.jit
def plane32(x, PLANE: tl.constexpr, BITS: tl.constexpr):
    """Four lane values of one plane of four packed bytes."""
    if BITS == 8:
        return x
    elif USE_PTX:
        asm: tl.constexpr = PLANE_2[PLANE] if BITS == 2 else PLANE_4[PLANE]
        return tl.inline_asm_elementwise(asm, "=r,r", [x], dtype=tl.int32, is_pure=True, pack=1)
    else:
        MASK: tl.constexpr = -0x3F3F3F40 if BITS == 2 else -0x0F0F0F10
        HALF: tl.constexpr = 0x20202020 if BITS == 2 else 0x08080808
        return ((x << (BITS * PLANE)) & MASK) | HALF


@triton.jit
def load_key_step(page, g, q, OFFSET: tl.constexpr, GROUPS: tl.constexpr, BITS: tl.constexpr):
    """32 channels of keys, registers in order (half, block, pair)."""
    out = ()
    for half in tl.static_range(2):
        if GROUPS >= 8:
            for block in tl.static_range(BITS // 2):
                out = out + read2(page, q * (32 * BITS) + g * 8, OFFSET + half * 128 * BITS + 64 * block)
        else:
            lane = tl.minimum(half * 4 + q, GROUPS - 1) * (32 * BITS) + g * 8
            for block in tl.static_range(BITS // 2):
                out = out + read2(page, lane, OFFSET + 64 * block)
    return out


@triton.jit
def load_keys(page, g, q, K: tl.constexpr):
    """All keys of a page: per class a tuple of steps."""
    out = ()
    for c in tl.static_range(len(K)):
        steps = ()
        for s in tl.static_range((K[c][1] + 31) // 32):
            steps = steps + (load_key_step(page, g, q, K[c][3] + s * 256 * K[c][2], K[c][1] // 4 - s * 8, K[c][2]),)
        out = out + (steps,)
    return out


@triton.jit
def key_step(x, b, acc, BITS: tl.constexpr):
    """Add the products of 32 channels to four tiles."""
    out = ()
    for i in tl.static_range(4):
        a = ()
        for r in tl.static_range(4):
            a = a + (plane32(x[r // 2 * BITS + 2 * (i % (BITS // 2)) + r % 2], i // (BITS // 2), BITS),)
        out = out + (mma8(a, b[0], b[1], acc[i], False),)
    return out


@triton.jit
def load_scales(page, g, OFFSET: tl.constexpr):
    """Scale bytes of the lane's rows: a register of two tokens per tile."""
    out = ()
    for m in tl.static_range(4):
        out = out + (read_short(page, g * 2, OFFSET + 16 * m),)
    return out


@triton.jit
def two_scales(x):
    """Two E5M3 bytes to float32."""
    return scale_value(x & 255), scale_value(x >> 8)


@triton.jit
def page_scores(keys, scales, query, K: tl.constexpr):
    """Scores without the centre's term in units of the first class's query scale: four tiles, four registers each."""
    q8, _, ratio, _, _ = query
    zero = tl.zeros([32], tl.float32)
    magic = tl.full([32], MAGIC_BITS, tl.int32)
    out = ((zero, zero, zero, zero),) * 4
    for c in tl.static_range(len(K)):
        acc = ((magic, magic, magic, magic),) * 4
        for p in tl.static_range(len(keys)):
            for s in tl.static_range(len(keys[p][c])):
                acc = key_step(keys[p][c][s], q8[p][c][s], acc, K[c][2])
        new = ()
        for m in tl.static_range(4):
            scale = two_scales(scales[c][m])
            tile = ()
            for r in tl.static_range(4):
                # (acc + MAGIC) * scale - MAGIC * scale is exact up to one rounding: scale has four significant bits.
                y = acc[m][r].to(tl.float32, bitcast=True) * scale[r // 2] - scale[r // 2] * MAGIC
                if c > 0:
                    y = y * ratio[c][r % 2] + out[m][r]
                tile = tile + (y,)
            new = new + (tile,)
        out = new
    return out


@triton.jit
def load_centre(page, q, OFFSET: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """The centre, a run of DP / 4 channels per q."""
    out = ()
    for i in tl.static_range(DP // 32):
        if D == DP:
            out = out + read4(page, q * (DP // 2), OFFSET + 16 * i)
        else:
            out = out + read4(page, 2 * tl.minimum(q * (DP // 4) + 8 * i, D - 8), OFFSET)
    return out


@triton.jit
def centre_products(centres, queries, DP: tl.constexpr, PAGES: tl.constexpr):
    """``centre . q``: rows g of the first page, rows g + 8 of the last."""
    zero = tl.zeros([32], tl.float32)
    acc = (zero, zero, zero, zero)
    first = centres[0]
    last = centres[PAGES - 1]
    for i in tl.static_range(DP // 16):
        a = (first[2 * i], last[2 * i], first[2 * i + 1], last[2 * i + 1])
        acc = mma16(a, queries[2 * i], queries[2 * i + 1], acc)
    return acc


@triton.jit
def load_value_block(page, g, q, OFFSET: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr, BITS: tl.constexpr):
    """32 channels of values, registers in order (block, channel)."""
    out = ()
    lane = q * (4 * WIDTH) + tl.minimum(g, GROUPS - 1) * 16
    for block in tl.static_range(BITS // 2):
        out = out + read4(page, lane, OFFSET + block * 16 * WIDTH)
    return out


@triton.jit
def load_values(page, g, q, V: tl.constexpr):
    """All values of a page: per class a tuple of blocks of 32 channels."""
    out = ()
    for c in tl.static_range(len(V)):
        blocks = ()
        for i in tl.static_range((V[c][1] + 31) // 32):
            blocks = blocks + (load_value_block(page, g, q, V[c][3] + i * 128, V[c][1], V[c][1] // 4 - i * 8, V[c][2]),)
        out = out + (blocks,)
    return out


@triton.jit
def value_step(x, w, acc, U: tl.constexpr, BITS: tl.constexpr):
    """Add 64 tokens' weighted values of channels ``4 g + U`` and ``4 g + U + 1`` of a block."""
    for k in tl.static_range(2):
        a = ()
        for half in tl.static_range(2):
            for u in tl.static_range(2):
                a = a + (plane32(x[4 * ((2 * k + half) % (BITS // 2)) + U + u], (2 * k + half) // (BITS // 2), BITS),)
        acc = mma8(a, w[2 * k], w[2 * k + 1], acc, True)
    return acc
