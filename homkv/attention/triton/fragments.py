"""A rows page as operands of matrix instructions: from bytes to scores, from weights to outputs.

The cache is always the left operand (S^T = K Q^T, O^T = V^T P^T) and query rows are the columns, so that tokens and
channels, of which there are many, fill the tall side of the matrix instructions. One warp computes on one page. Its
bytes are loaded in 8- and 16-byte pieces that are fragments of ``mma.m16n8k32`` as they lie: thread (g, q) =
(lane / 4, lane % 4) of a fragment holds rows g and g + 8 and four neighbours along the sum. Tile m of K holds token
``16 m + 2 g + pair`` in row ``pair * 8 + g``. A sum over 32 channels runs in the order (half, q, neighbour), one over
32 tokens in the order (q, half, neighbour): what the compiler picks for operands without and with a join, so that
nothing moves.

Channel classes are constants of the kernel, ``(start, width, bits, codes_offset, scales_offset)``.
"""

import triton
import triton.language as tl

from homkv.attention.triton.lanes import MAGIC, MAGIC_BITS, plane, scale_value


@triton.constexpr_function
def count_blocks(classes, count):
    """Blocks of 32 channels in the first ``count`` classes."""
    return sum((width + 31) // 32 for _, width, *_ in classes[:count])


@triton.jit
def load_scales(page, OFFSET: tl.constexpr):
    """Scale bytes of 64 tokens as four ``[16]``, one per tile: small enough to be loaded in the layout of their use."""
    r = tl.arange(0, 16)
    token = r % 8 * 2 + r // 8
    out = ()
    for m in tl.static_range(4):
        out = out + (tl.load(page + (OFFSET + 16 * m + token)),)
    return out


@triton.jit
def row_scale(byte):
    """One tile's scales, ``[16, 1]`` float32."""
    return scale_value(byte.to(tl.uint8, bitcast=True))[:, None]


@triton.jit
def load_keys(page, OFFSET: tl.constexpr, GROUPS: tl.constexpr, BITS: tl.constexpr):
    """Packed keys of 32 channels, ``[4, 8, 2, BITS / 2, 8]`` bytes: q, g, half, token block, (pair, channel).

    GROUPS: dwords of channels the class has left. Fewer than 8: the last one is read again and meets zero queries.
    The order of dimensions is the one in which the compiler hands out lanes.
    """
    q = tl.arange(0, 4)[:, None, None, None, None]
    g = tl.arange(0, 8)[None, :, None, None, None]
    half = tl.arange(0, 2)[None, None, :, None, None]
    block = tl.arange(0, BITS // 2)[None, None, None, :, None]
    byte = tl.arange(0, 8)[None, None, None, None, :]
    group = tl.minimum(half * 4 + q, GROUPS - 1)
    return tl.load(page + (OFFSET + group * (32 * BITS) + block * 64 + g * 8 + byte))


@triton.jit
def key_tile(packed, PLANE: tl.constexpr, BITS: tl.constexpr):
    """Packed keys of 16 tokens a plane ``[4, 8, 2, 2, 4]`` (q, g, half, pair, channel) as left operand."""
    return plane(packed, PLANE, BITS).permute(3, 1, 2, 0, 4).reshape([16, 32])


@triton.jit
def key_step(x, q8, acc, BITS: tl.constexpr):
    """Add the products of 32 channels to four tiles."""
    if BITS == 2:
        x = x.reshape([4, 8, 2, 2, 4])
        out = ()
        for i in tl.static_range(4):
            out = out + (tl.dot(key_tile(x, i, 2), q8, acc[i], out_dtype=tl.int32),)
        return out
    elif BITS == 4:
        x0, x1 = tl.split(x.reshape([4, 8, 2, 2, 2, 4]).permute(0, 1, 2, 4, 5, 3))
        a0 = tl.dot(key_tile(x0, 0, 4), q8, acc[0], out_dtype=tl.int32)
        a1 = tl.dot(key_tile(x1, 0, 4), q8, acc[1], out_dtype=tl.int32)
        a2 = tl.dot(key_tile(x0, 1, 4), q8, acc[2], out_dtype=tl.int32)
        a3 = tl.dot(key_tile(x1, 1, 4), q8, acc[3], out_dtype=tl.int32)
        return (a0, a1, a2, a3)
    else:
        low, high = tl.split(x.reshape([4, 8, 2, 2, 2, 2, 4]).permute(0, 1, 2, 5, 6, 4, 3))
        x0, x1 = tl.split(low)
        x2, x3 = tl.split(high)
        a0 = tl.dot(key_tile(x0, 0, 8), q8, acc[0], out_dtype=tl.int32)
        a1 = tl.dot(key_tile(x1, 0, 8), q8, acc[1], out_dtype=tl.int32)
        a2 = tl.dot(key_tile(x2, 0, 8), q8, acc[2], out_dtype=tl.int32)
        a3 = tl.dot(key_tile(x3, 0, 8), q8, acc[3], out_dtype=tl.int32)
        return (a0, a1, a2, a3)


@triton.jit
def load_page_keys(page, K: tl.constexpr):
    """All packed keys and their scales: per class ``(steps, scales)``."""
    out = ()
    for c in tl.static_range(len(K)):
        steps = ()
        for s in tl.static_range((K[c][1] + 31) // 32):
            steps = steps + (load_keys(page, K[c][3] + s * 256 * K[c][2], K[c][1] // 4 - s * 8, K[c][2]),)
        out = out + ((steps, load_scales(page, K[c][4])),)
    return out


@triton.jit
def page_scores(keys, q8, q_ratio, K: tl.constexpr, N: tl.constexpr):
    """Scores of a page without the centre's term, four tiles ``[16, N]``, in units of the first class's query scale."""
    out = (tl.zeros([16, N], tl.float32),) * 4
    for c in tl.static_range(len(K)):
        acc = (tl.full([16, N], MAGIC_BITS, tl.int32),) * 4
        for s in tl.static_range((K[c][1] + 31) // 32):
            acc = key_step(keys[c][0][s], q8[c][s], acc, K[c][2])
        new = ()
        for m in tl.static_range(4):
            scale = row_scale(keys[c][1][m])
            # (acc + MAGIC) * scale - MAGIC * scale is exact up to one rounding: scale has four significant bits.
            y = acc[m].to(tl.float32, bitcast=True) * scale - scale * MAGIC
            if c > 0:
                y = y * q_ratio[c][None, :] + out[m]
            new = new + (y,)
        out = new
    return out


@triton.jit
def load_centre(page, CENTRE: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """The centre in chunks ``[4, 8, 8]`` float16: a run of DP / 4 channels for every q, the same for every g."""
    pointer = (page + CENTRE).to(tl.pointer_type(tl.float16), bitcast=True)
    q = tl.arange(0, 4)[:, None, None] + tl.zeros([1, 8, 1], tl.int32)
    out = ()
    for i in tl.static_range(DP // 32):
        start = tl.minimum(q * (DP // 4) + 8 * i, D - 8)
        out = out + (tl.load(pointer + start + tl.arange(0, 8)[None, None, :]),)
    return out


@triton.jit
def centre_scores(centre, queries, DP: tl.constexpr, N: tl.constexpr):
    """``centre . q`` as ``[8, N]``, 8 equal rows, for queries ``(even, odd)``, tuples of ``[16, N] float16``.

    A thread's chunk of the centre fills four registers of the left operand: rows g take the even pairs of channels and
    rows g + 8 the odd ones. So each product is right in one half of its rows, and the halves are added.
    """
    even = tl.zeros([16, N], tl.float32)
    odd = tl.zeros([16, N], tl.float32)
    for i in tl.static_range(DP // 32):
        x = centre[i].reshape([4, 8, 2, 2, 2]).permute(3, 1, 2, 0, 4).reshape([16, 16])
        even = tl.dot(x, queries[0][i], even)
        odd = tl.dot(x, queries[1][i], odd)
    first, _ = tl.split(even.reshape([2, 8, N]).permute(1, 2, 0))
    _, second = tl.split(odd.reshape([2, 8, N]).permute(1, 2, 0))
    return first + second


@triton.jit
def load_values(page, OFFSET: tl.constexpr, WIDTH: tl.constexpr, GROUPS: tl.constexpr, BITS: tl.constexpr):
    """Packed values of 32 channels, ``[4, 8, BITS / 2, 16]`` bytes: q, g, token block, (channel, token).

    GROUPS: runs of four channels the class has left. Fewer than 8: the last one is read again and not stored.
    """
    q = tl.arange(0, 4)[:, None, None, None]
    g = tl.minimum(tl.arange(0, 8), GROUPS - 1)[None, :, None, None]
    block = tl.arange(0, BITS // 2)[None, None, :, None]
    byte = tl.arange(0, 16)[None, None, None, :]
    return tl.load(page + (OFFSET + (block * 4 + q) * (4 * WIDTH) + g * 16 + byte))


@triton.jit
def value_tile(packed, PLANE: tl.constexpr, BITS: tl.constexpr):
    """Packed values ``[4, 8, 2, 4, 4]`` (q, g, half, channel, token) to the left operand ``[32, 32]``."""
    return plane(packed, PLANE, BITS).permute(3, 1, 0, 2, 4).reshape([32, 32])


@triton.jit
def plane_pair(x, LOW: tl.constexpr):
    """Planes LOW and LOW + 1 of 2-bit values ``[4, 8, 4, 4]`` to the left operand ``[32, 32]``."""
    both = tl.join(plane(x, LOW, 2), plane(x, LOW + 1, 2))
    return both.permute(2, 1, 0, 4, 3).reshape([32, 32])


@triton.jit
def value_block(x, w0, w1, BITS: tl.constexpr, N: tl.constexpr, SHIFTED: tl.constexpr):
    """``sum_t p8[t] lane[t]`` of 32 channels, ``[32, N]`` int32, with MAGIC_BITS added: bits of a float32.

    Row ``8 u + g`` is channel ``4 g + u`` of the block. SHIFTED weights are 128 less than they stand for, so that 8
    bits fit a signed operand: the same sum of lanes is added twice with weights of 64.
    """
    acc = tl.full([32, N], MAGIC_BITS, tl.int32)
    if BITS == 2:
        x = x.reshape([4, 8, 4, 4])
        low = plane_pair(x, 0)
        high = plane_pair(x, 2)
    elif BITS == 4:
        x = x.reshape([4, 8, 2, 4, 4])
        low = value_tile(x, 0, 4)
        high = value_tile(x, 1, 4)
    else:
        x0, x1 = tl.split(x.reshape([4, 8, 2, 2, 4, 4]).permute(0, 1, 3, 4, 5, 2))
        low = value_tile(x0, 0, 8)
        high = value_tile(x1, 0, 8)
    if SHIFTED:
        half = tl.full([32, N], 64, tl.int8)
        for _ in tl.static_range(2):
            acc = tl.dot(high, half, tl.dot(low, half, acc, out_dtype=tl.int32), out_dtype=tl.int32)
    return tl.dot(high, w1, tl.dot(low, w0, acc, out_dtype=tl.int32), out_dtype=tl.int32)


@triton.jit
def weight_tile(low, high, N: tl.constexpr):
    """Weights of two tiles ``[16, N]`` to the right operand ``[32, N]``."""
    both = tl.join(low, high).reshape([2, 4, 2, N, 2]).permute(1, 4, 2, 0, 3)
    return both.reshape([32, N])


@triton.jit
def load_page_values(page, V: tl.constexpr):
    """All packed values and their scales: per class ``(blocks, scales)``."""
    out = ()
    for c in tl.static_range(len(V)):
        blocks = ()
        for i in tl.static_range((V[c][1] + 31) // 32):
            blocks = blocks + (load_values(page, V[c][3] + i * 128, V[c][1], V[c][1] // 4 - i * 8, V[c][2]),)
        out = out + ((blocks, load_scales(page, V[c][4])),)
    return out


@triton.jit
def value_blocks(blocks, p8, BITS: tl.constexpr, N: tl.constexpr, SHIFTED: tl.constexpr):
    """One class of the output, a tuple of blocks of 32 channels, from four tiles of weights."""
    w0 = weight_tile(p8[0], p8[1], N)
    w1 = weight_tile(p8[2], p8[3], N)
    out = ()
    for i in tl.static_range(len(blocks)):
        out = out + (value_block(blocks[i], w0, w1, BITS, N, SHIFTED),)
    return out


@triton.jit
def max4(x):
    """Elementwise largest of four tiles."""
    return tl.maximum(tl.maximum(x[0], x[1]), tl.maximum(x[2], x[3]))
