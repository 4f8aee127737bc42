"""A HACK page as operands of matrix instructions: codes to int8 lanes, weights to the other side, numbers to rows.

The cache is always the left operand (S^T = K Q^T, O^T = V^T P^T) and query rows are the columns. Codes that are
neighbours along the sum lie in one byte (docs/hack.md), and a sum may be taken in any order, so a 32-bit word of codes
is unpacked where it was loaded: a shift and a LOP3 give four int8 lanes ``(code - 2^(b-1)) 2^(8-b)``; nothing moves.

A **segment** is one row of codes to be summed: a partition of a token's channels, or a channel's tokens of a page. Its
size is padded to 32, 64 or 128. Thread (g, q) = (lane / 4, lane % 4) of ``mma.m16n8k32`` holds some words of rows g,
and each of their planes fills half a step of 32 slots: a **tile** of 4 codes per thread. In the order of a sum,
``(step, q, half, byte)``, the halves are two neighbouring tiles or, with PAIR = 2, the same tile of two pages: then the
columns are (page, query row), an operand is zero in the other page's half, and no column is idle where 4 query
rows or fewer share a kv head.

Rows are in the order (r, g). Row (r, g) of K is the token whose weight a thread of the second product wants, so that
weights change hands in one ``movmatrix`` per 64 of them. Per-row numbers are kept as ``[R, 8, PAIR, COPIES, 1]`` and
results as ``[R, 8, N / (2 COPIES), COPIES, 2]``, COPIES = 4 / PAIR: the last three dimensions are the columns.
"""

import triton
import triton.language as tl

from homkv.attention.triton.lanes import MAGIC_BITS, USE_PTX

OFFSET = tl.constexpr(128)  # what is subtracted from codes in units of lanes, whatever their width


@triton.constexpr_function
def top_bits(bits):
    """Mask of the highest ``bits`` bits of every byte of a word."""
    return (256 - (1 << (8 - bits))) * 0x01010101


@triton.constexpr_function
def unpack_asm(plane, bits):
    """``((x << s) & mask) ^ 0x80808080``: left to itself the compiler makes two instructions of the LOP3."""
    return (
        f"{{.reg .b32 t, m, c; mov.b32 m, {top_bits(bits):#x}; mov.b32 c, 0x80808080; "
        f"shl.b32 t, $1, {8 - bits - bits * plane}; lop3.b32 $0, t, m, c, 0x6A;}}"
    )


@triton.constexpr_function
def padded(size):
    """Slots of a segment of ``size`` codes: 32, 64 or 128."""
    return max(triton.next_power_of_2(size), 32)


@triton.constexpr_function
def count_words(size, bits):
    """32-bit words of one segment that a thread holds."""
    return max(padded(size) * bits // 128, 1)


@triton.constexpr_function
def count_planes(size, bits):
    """Planes of each word that a thread holds: all of them, or where 4 threads share 2 words half of them."""
    return padded(size) // 16 // count_words(size, bits)


@triton.constexpr_function
def is_shared(size, bits):
    """Whether two threads share a word, each holding half of its planes: 32 codes of 2 bits."""
    return count_planes(size, bits) < 8 // bits


@triton.jit
def load_words(row, SIZE: tl.constexpr, BITS: tl.constexpr):
    """Words of segments that start at the byte pointers ``row [1, 8, R, PAIR, 1]``: ``[4, 8, R, PAIR, WORDS] int32``.

    The order of dimensions is the one in which the compiler hands out lanes. Behind a segment whose size is no power
    of two the next bytes of the page are read; their slots meet zeros.
    """
    WORDS: tl.constexpr = count_words(SIZE, BITS)
    q = tl.arange(0, 4)[:, None, None, None, None]
    if is_shared(SIZE, BITS):
        q = q // 2
    word = (row + q * (4 * WORDS)).to(tl.pointer_type(tl.int32), bitcast=True)
    return tl.load(word + tl.arange(0, WORDS)[None, None, None, None, :])


@triton.jit
def load_keys(page, PAGE: tl.constexpr):
    """Words of the pages' keys, a tuple over partitions. ``page [PAIR]``: byte pointers."""
    T: tl.constexpr = PAGE[0]
    SIZE: tl.constexpr = PAGE[1]
    BITS: tl.constexpr = PAGE[2]
    D: tl.constexpr = PAGE[3]
    g = tl.arange(0, 8)[None, :, None, None, None]
    r = tl.arange(0, T // 8)[None, None, :, None, None]
    row = page[None, None, None, :, None] + (PAGE[4][0] + row_token(g, r, T, BITS) * (D * BITS // 8))
    out = ()
    for p in tl.static_range(D // SIZE):
        out = out + (load_words(row + p * SIZE * BITS // 8, SIZE, BITS),)
    return out


@triton.jit
def load_values(page, PAGE: tl.constexpr, CHUNK: tl.constexpr):
    """Words of the pages' values, a tuple over chunks of channels."""
    T: tl.constexpr = PAGE[0]
    BITS: tl.constexpr = PAGE[2]
    D: tl.constexpr = PAGE[3]
    g = tl.arange(0, 8)[None, :, None, None, None]
    r = tl.arange(0, CHUNK // 8)[None, None, :, None, None]
    row = page[None, None, None, :, None] + (PAGE[4][1] + (g * (CHUNK // 8) + r) * (T * BITS // 8))
    out = ()
    for c in tl.static_range(D // CHUNK):
        out = out + (load_words(row + c * CHUNK * T * BITS // 8, T, BITS),)
    return out


@triton.jit
def lanes_of(x, PLANE: tl.constexpr, BITS: tl.constexpr):
    """int8 lanes of one plane of words, still four to a word."""
    if USE_PTX:
        return tl.inline_asm_elementwise(unpack_asm(PLANE, BITS), "=r,r", [x], dtype=tl.int32, is_pure=True, pack=1)
    else:
        MASK: tl.constexpr = top_bits(BITS) - (1 << 32)
        return ((x << (8 - BITS - BITS * PLANE)) & MASK) ^ (0x80808080 - (1 << 32))


@triton.jit
def bytes_of(x):
    """Words ``[...] int32`` to bytes ``[..., 2, 2] int8``, the first lowest; they stay in their register."""
    even = tl.join(x.to(tl.int8), (x >> 16).to(tl.int8))
    odd = tl.join((x >> 8).to(tl.int8), (x >> 24).to(tl.int8))
    return tl.join(even, odd)


@triton.jit
def code_operand(x, SIZE: tl.constexpr, BITS: tl.constexpr, PAIR: tl.constexpr):
    """Words ``[4, 8, R, PAIR, WORDS]`` to the left operand ``[8 R, PAIR * padded size] int8``."""
    PLANES: tl.constexpr = count_planes(SIZE, BITS)
    FIRST: tl.constexpr = 8 // BITS - PLANES
    R: tl.constexpr = x.shape[2]
    TILES: tl.constexpr = padded(SIZE) // 16
    if is_shared(SIZE, BITS):
        x = x << (BITS * PLANES * (1 - tl.arange(0, 4) % 2))[:, None, None, None, None]
    if PLANES == 4:
        even = tl.join(lanes_of(x, 0, BITS), lanes_of(x, 2, BITS))
        y = tl.join(even, tl.join(lanes_of(x, 1, BITS), lanes_of(x, 3, BITS)))
    elif PLANES == 2:
        y = tl.join(lanes_of(x, FIRST, BITS), lanes_of(x, FIRST + 1, BITS))
    else:
        y = lanes_of(x, 0, BITS)
    if PAIR == 2:
        y = y.reshape([4, 8, R, 2, TILES]).permute(2, 1, 4, 0, 3)
    else:
        y = y.reshape([4, 8, R, TILES // 2, 2]).permute(2, 1, 3, 0, 4)
    return bytes_of(y).reshape([8 * R, PAIR * padded(SIZE)])


@triton.jit
def slot_element(q, tile, byte, SIZE: tl.constexpr, BITS: tl.constexpr):
    """Which code of its segment a byte of thread q's tile is; a tile is one plane of one word."""
    PLANES: tl.constexpr = count_planes(SIZE, BITS)
    word = q * count_words(SIZE, BITS) + tile // PLANES
    plane = tile % PLANES
    if is_shared(SIZE, BITS):
        word = q // 2
        plane += q % 2 * PLANES
    return (word * 4 + byte) * (8 // BITS) + plane


@triton.jit
def row_token(g, r, T: tl.constexpr, BITS: tl.constexpr):
    """Token of row (r, g): byte ``2 (g % 2) + r % 2`` of thread ``q = g / 2``'s tile ``r / 2``."""
    return slot_element(g // 2, r // 2, g % 2 * 2 + r % 2, T, BITS)


@triton.jit
def query_operand(x, PAIR: tl.constexpr):
    """Words ``[4, 8, N / 8, slots / 16] int32`` to the right operand ``[slots, N] int8``, slots = PAIR * padded size.

    Word [q, g, n, i] holds column ``8 n + g``'s codes for thread q: tile i of the page, or tile i / 2 of page i % 2.
    """
    WORDS: tl.constexpr = x.shape[3]
    x = bytes_of(x.reshape([4, 8, x.shape[2], WORDS // 2, 2]))
    return x.permute(3, 0, 4, 5, 6, 2, 1).reshape([WORDS * 16, x.shape[2] * 8])


@triton.jit
def load_query(codes, SIZE: tl.constexpr, PAIR: tl.constexpr, N: tl.constexpr):
    """Right operand from words ``[N, 4, slots / 16]`` in memory."""
    WORDS: tl.constexpr = PAIR * padded(SIZE) // 16
    RUN: tl.constexpr = min(WORDS, 4)
    q = tl.arange(0, 4)[:, None, None, None, None]
    g = tl.arange(0, 8)[None, :, None, None, None]
    tile = tl.arange(0, N // 8)[None, None, :, None, None]
    run = tl.arange(0, WORDS // RUN)[None, None, None, :, None]
    at = ((tile * 8 + g) * 4 + q) * WORDS + run * RUN + tl.arange(0, RUN)[None, None, None, None, :]
    return query_operand(tl.load(codes + at).reshape([4, 8, N // 8, WORDS]), PAIR)


@triton.jit
def pair_words(x, PAIR: tl.constexpr):
    """Words per tile ``[4, 8, N / 8, tiles]`` to words per slot: with PAIR = 2 zeros in the other page's half."""
    if PAIR == 2:
        own = (tl.arange(0, 8) < 4)[None, :, None, None]
        x = tl.join(tl.where(own, x, 0), tl.where(own, 0, x)).reshape([4, 8, x.shape[2], 2 * x.shape[3]])
    return x


@triton.jit
def ones_operand(SIZE: tl.constexpr, BITS: tl.constexpr, PAIR: tl.constexpr, N: tl.constexpr):
    """Right operand that sums a segment's codes: 1 where there is one."""
    TILES: tl.constexpr = padded(SIZE) // 16
    q = tl.arange(0, 4)[:, None, None, None]
    tile = tl.arange(0, TILES)[None, None, None, :]
    x = tl.zeros([4, 8, N // 8, TILES], tl.int32)
    for byte in tl.static_range(4):
        x += tl.where(slot_element(q, tile, byte, SIZE, BITS) < SIZE, 1 << (8 * byte), 0)
    return query_operand(pair_words(x, PAIR), PAIR)


@triton.jit
def split_last(x, COUNT: tl.constexpr):
    """``[A, 8, B, C, 1, COUNT]`` to a tuple of COUNT tensors ``[A, 8, B, C, 1]``; COUNT: a power of two up to 8."""
    A: tl.constexpr = x.shape[0]
    B: tl.constexpr = x.shape[2]
    C: tl.constexpr = x.shape[3]
    if COUNT == 1:
        return (x.reshape([A, 8, B, C, 1]),)
    else:
        even, odd = tl.split(x.reshape([A, 8, B, C, 1, COUNT // 2, 2]))
        evens = split_last(even, COUNT // 2)
        odds = split_last(odd, COUNT // 2)
        out = ()
        for i in tl.static_range(COUNT // 2):
            out = out + (evens[i], odds[i])
        return out


@triton.jit
def load_tokens(
    page, START: tl.constexpr, DTYPE: tl.constexpr, PARTS: tl.constexpr, T: tl.constexpr, BITS: tl.constexpr
):  # fmt: skip
    """Numbers ``[T][PARTS]`` at byte START of the pages, as the rows of K: a tuple of ``[T / 8, 8, PAIR, COPIES, 1]``.

    ``page [PAIR]``: byte pointers. A row's neighbours in memory are loaded together, 16 bytes at a time.
    """
    PAIR: tl.constexpr = page.shape[0]
    COPIES: tl.constexpr = 4 // PAIR
    PLANES: tl.constexpr = count_planes(T, BITS)
    PADDED: tl.constexpr = triton.next_power_of_2(PARTS)
    TOKENS: tl.constexpr = 2 if is_shared(T, BITS) else 2 * PLANES  # in a row's runs of neighbours
    STEP: tl.constexpr = 8 // BITS if is_shared(T, BITS) else 4 * 8 // BITS  # from one run to the next
    RUN: tl.constexpr = min(TOKENS, max(128 // DTYPE.primitive_bitwidth // PADDED, 1))
    copy = tl.arange(0, COPIES)[:, None, None, None, None, None]
    g = tl.arange(0, 8)[None, None, :, None, None, None]
    i = tl.arange(0, T // 8 // TOKENS)[None, None, None, :, None, None]
    j = tl.arange(0, TOKENS // RUN)[None, None, None, None, :, None]
    k = tl.arange(0, RUN * PADDED)[None, None, None, None, None, :]
    token = row_token(g, 0, T, BITS) + i * STEP + j * RUN + copy * 0
    number = token * PARTS + k
    if PARTS < PADDED:
        number = (token + k // PADDED) * PARTS + tl.minimum(k % PADDED, PARTS - 1)
    section = (page + START).to(tl.pointer_type(DTYPE), bitcast=True)[None, :, None, None, None, None]
    x = tl.load(section + number).reshape([COPIES, PAIR, 8, T // 16 // PLANES, 2, PLANES, PADDED])
    x = x.permute(3, 5, 4, 2, 1, 0, 6).reshape([T // 8, 8, PAIR, COPIES, 1, PADDED])
    return split_last(x, PADDED)


@triton.constexpr_function
def sum_type(size, bits):
    """How a page stores sums of ``size`` codes."""
    return tl.uint8 if size * ((1 << bits) - 1) <= 255 else tl.int16


@triton.constexpr_function
def chunk_width(size):
    """Channels of the output computed together: 16, 32 or 64, so that chunks cut ``size`` channels evenly."""
    return min(size & -size, 64)


@triton.jit
def load_channels(
    page, SECTION: tl.constexpr, DTYPE: tl.constexpr, START: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """Numbers ``[D]`` at byte SECTION of the pages, of channels from START on: ``[CHUNK / 8, 8, PAIR, COPIES, 1]``.

    Row (r, g) of a chunk is its channel ``CHUNK / 8 g + r``.
    """
    PAIR: tl.constexpr = page.shape[0]
    COPIES: tl.constexpr = 4 // PAIR
    g = tl.arange(0, 8)[None, None, :, None]
    channel = START + g * (CHUNK // 8) + tl.arange(0, CHUNK // 8)[None, None, None, :]
    channel += 0 * tl.arange(0, COPIES)[:, None, None, None]
    section = (page + SECTION).to(tl.pointer_type(DTYPE), bitcast=True)[None, :, None, None]
    return tl.load(section + channel).permute(3, 2, 1, 0).reshape([CHUNK // 8, 8, PAIR, COPIES, 1])


@triton.jit
def pack4(a, b, c, d):
    """Lowest bytes of four float32's bits, in one word, the first lowest."""
    a, b, c, d = (
        a.to(tl.int32, bitcast=True), b.to(tl.int32, bitcast=True), c.to(tl.int32, bitcast=True),
        d.to(tl.int32, bitcast=True),
    )  # fmt: skip
    if USE_PTX:
        return tl.inline_asm_elementwise(
            "{.reg .b32 t, u; prmt.b32 t, $1, $2, 0x0040; prmt.b32 u, $3, $4, 0x0040; prmt.b32 $0, t, u, 0x5410;}",
            "=r,r,r,r,r", [a, b, c, d], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return (a & 255) | ((b & 255) << 8) | ((c & 255) << 16) | ((d & 255) << 24)


@triton.jit
def transpose8(x, PTX: tl.constexpr):
    """Transpose matrices of 8 x 8 16-bit values, two to a word: ``x [M, 8, TILES, 4] int32``, rows second.

    With PTX: a warp's threads exchange words in one instruction. It takes x to lie as results of matrix instructions
    do, thread (g, q) holding word [., g, ., q].
    """
    if PTX:
        return tl.inline_asm_elementwise(
            "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", "=r,r", [x], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        M: tl.constexpr = x.shape[0]
        TILES: tl.constexpr = x.shape[2]
        x = tl.join(x & 0xFFFF, (x >> 16) & 0xFFFF).reshape([M, 4, 2, TILES, 8]).permute(0, 4, 3, 1, 2)
        low, high = tl.split(x)
        return low | (high << 16)


@triton.jit
def weight_words(w, N: tl.constexpr, PTX: tl.constexpr = USE_PTX):
    """Weights ``[R, 8, N / (2 COPIES), COPIES, 2]``, in the lowest bytes of float32, to words ``[R / 2, 8, N / 8, 4]``.

    Word [tile, g, n, q] holds four tokens' weights of column ``8 n + g``, those of bytes 0..3 of thread q's tile.
    """
    M: tl.constexpr = w.shape[0] // 2
    first, second = tl.split(w.reshape([M, 2, 8, N // 8, 4, 2]).permute(0, 2, 3, 4, 1, 5))
    a, b = tl.split(first)
    c, d = tl.split(second)
    return transpose8(pack4(a, b, c, d), PTX)


@triton.jit
def weight_operand(x, PAIR: tl.constexpr, N: tl.constexpr):
    """Words ``[M, 8, N / 8, 4]`` to the right operand ``[16 M PAIR, N] int8``; zero in other columns' pages."""
    M: tl.constexpr = x.shape[0]
    if PAIR == 2:
        own = (tl.arange(0, 8) < 4)[None, :, None, None]
        x = bytes_of(tl.join(tl.where(own, x, 0), tl.where(own, 0, x)))
        return x.permute(0, 3, 4, 5, 6, 2, 1).reshape([M * 32, N])
    else:
        x = bytes_of(x.reshape([M // 2, 2, 8, N // 8, 4]))
        return x.permute(0, 4, 1, 5, 6, 3, 2).reshape([M * 16, N])


@triton.jit
def column_sums(b, N: tl.constexpr, COPIES: tl.constexpr):
    """Sums over a right operand's slots, ``[8, N / (2 COPIES), COPIES, 2] int32``, 8 equal rows."""
    ones = tl.full([16, b.shape[0]], 1, tl.int8)
    sums = tl.dot(ones, b, tl.zeros([16, N], tl.int32), out_dtype=tl.int32)
    first, _ = tl.split(sums.reshape([2, 8, N]).permute(1, 2, 0))
    return first.reshape([8, N // (2 * COPIES), COPIES, 2])


@triton.jit
def column_start(x, ROWS: tl.constexpr, N: tl.constexpr):
    """Accumulator ``[ROWS, N]`` that starts at integers ``[8, ., COPIES, 2]`` plus MAGIC_BITS: bits of a float32."""
    x = tl.broadcast_to((x + MAGIC_BITS)[None], [ROWS // 8, 8, x.shape[1], x.shape[2], 2])
    return x.reshape([ROWS, N])
