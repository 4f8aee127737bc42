"""Rows pages as plain int8 matrices in scratch memory: unpacked once per call, read by every block of queries.

One scale remains for a token's keys: that of the class that reaches furthest, whose codes stay as they are; codes of
other classes are rounded to its steps. One scale remains for 128 tokens' values, a power of two where all classes have
2 bits, so that codes times the four significant bits of their scales stay integers.
"""

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from homkv.attention.triton.lanes import MAGIC_BITS, NEVER, dot16, scale_value, to_int8
from homkv.attention.triton.tiles import TILE, token_at
from homkv.formats.rows import RowsCodec
from homkv.quant import hadamard
from homkv.spec import PAGE_TOKENS, ChannelClass

TILE_PAGES = TILE // PAGE_TOKENS
LANE_UNIT = tl.constexpr(2.0**24)


@triton.constexpr_function
def largest_lane(bits):
    """Largest lane value of a code: 96, 120, 127."""
    return 128 - (256 >> bits) // 2 if bits < 8 else 127


@triton.constexpr_function
def widest(classes):
    """Most bits of a class, 0 if there is none."""
    return max((bits for _, _, bits, _, _ in classes), default=0)


@triton.jit
def load_scales(page, token, OFFSET: tl.constexpr):
    """Scales of one class, float32."""
    return scale_value(tl.load(page + (OFFSET + token)).to(tl.uint8, bitcast=True))


@triton.jit
def unpack(packed, BITS: tl.constexpr, KEYS: tl.constexpr):
    """Lane values of all planes in the top byte of an int32, as float32: LANE_UNIT times as large.

    Bytes ``[lanes, width]`` to ``[64, width]`` with KEYS, else ``[width, lanes]`` to ``[width, 64]``.
    """
    x = packed.to(tl.int32)
    if BITS == 8:
        return (x << 24).to(tl.float32)
    else:
        shift = tl.arange(0, 8 // BITS) * BITS + 24
        x = x[None] << shift[:, None, None] if KEYS else x[:, None, :] << shift[None, :, None]
        x = (x & -(1 << (32 - BITS)) | (1 << (31 - BITS))).to(tl.float32)
        return x.reshape([64, packed.shape[1]] if KEYS else [packed.shape[0], 64])


@triton.jit
def common_scale(page, token, K: tl.constexpr):
    """Scale of the class of keys that reaches furthest, per token."""
    best = tl.zeros(token.shape, tl.float32)
    common = best
    for c in tl.static_range(len(K)):
        scale = load_scales(page, token, K[c][4])
        reach = scale * largest_lane(K[c][2])
        common = tl.where(reach > best, scale, common)
        best = tl.maximum(best, reach)
    return common


@triton.jit
def expand_keys(
    page, token, common, K8, START: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr, CODES: tl.constexpr,
    SCALES: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    """Codes of one class of a page's keys, ``[64, WIDTH]`` at ``K8``, in steps of their token's common scale."""
    LANES: tl.constexpr = 8 * BITS
    lane = tl.arange(0, LANES)
    s = tl.arange(0, triton.next_power_of_2(WIDTH))
    inside = (s < WIDTH)[None, :]
    at = (s // 4 * (4 * LANES) + s % 4)[None, :] + lane[:, None] * 4
    codes = unpack(tl.load(page + CODES + at, mask=inside, other=0), BITS, True)
    ratio = tl.div_rn(load_scales(page, token, SCALES), common) * (1.0 / LANE_UNIT)
    codes = to_int8(codes * ratio[:, None])
    tl.store(K8 + token[:, None] * DP + (START + s)[None, :], codes, mask=inside)


@triton.jit
def expand_values(
    page, position, factor, VT, stride, START: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr,
    CODES: tl.constexpr, SCALES: tl.constexpr,
):  # fmt: skip
    """Codes of one class of a page's values, ``[WIDTH, 64]`` at ``VT`` in stored order, scales times ``factor``.

    Returns the codes' sums per channel.
    """
    LANES: tl.constexpr = 8 * BITS
    lane = token_at(tl.arange(0, LANES))
    s = tl.arange(0, triton.next_power_of_2(WIDTH))
    inside = (s < WIDTH)[:, None]
    at = (lane // 4 * (4 * WIDTH) + lane % 4)[None, :] + s[:, None] * 4
    codes = unpack(tl.load(page + CODES + at, mask=inside, other=0), BITS, False)
    scale = load_scales(page, token_at(position), SCALES) * (factor * (1.0 / LANE_UNIT))
    codes = to_int8(codes * scale[None, :])
    tl.store(VT + (START + s).to(tl.int64)[:, None] * stride + position[None, :], codes, mask=inside)
    return tl.sum(codes.to(tl.int32), 1)


@triton.jit
def value_unit(page, live, other, other_live, V: tl.constexpr, PAGE: tl.constexpr):
    """One scale for the values of two pages: the largest magnitude is at most 127 of it."""
    token = tl.arange(0, PAGE)
    reach = tl.zeros(token.shape, tl.float32)
    for c in tl.static_range(len(V)):
        first = load_scales(page, token, V[c][4]) * tl.where(live, largest_lane(V[c][2]), 0)
        second = load_scales(other, token, V[c][4]) * tl.where(other_live, largest_lane(V[c][2]), 0)
        reach = tl.maximum(reach, tl.maximum(first, second))
    unit = tl.maximum(tl.max(reach, 0) * (1.0 / 127.0), 1.0 / (1 << 30))
    if widest(V) == 2:
        unit = ((unit.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
    return unit


@triton.jit
def expand_page(
    page,
    live,
    row,
    K8,
    KScale,
    Centre,
    SlotOf,
    K: tl.constexpr,
    CENTRE: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    PAGE: tl.constexpr,
):
    """Keys and centre of one page at scratch rows ``row ..``; a page that is not there gets scale 0."""
    token = tl.arange(0, PAGE)
    common = common_scale(page, token, K)
    tl.store(KScale + row + token, tl.where(live, common, 0.0))
    if live:
        for c in tl.static_range(len(K)):
            expand_keys(page, token, common, K8 + row * DP, K[c][0], K[c][1], K[c][2], K[c][3], K[c][4], DP)
        d = tl.arange(0, DP)
        slot = tl.load(SlotOf + d, mask=d < D, other=0)
        centre = tl.load((page + CENTRE).to(tl.pointer_type(tl.float16), bitcast=True) + slot, mask=d < D, other=0.0)
        tl.store(Centre + row // PAGE * DP + d, centre)


@triton.jit(do_not_specialize=["first", "max_pages", "num_blocks"])
def expand_kernel(
    Pool, PageTable, NumPages, SlotOf, K8, VT, KScale, VStart, VUnit, Centre, first, max_pages, num_blocks,
    K: tl.constexpr, V: tl.constexpr, CENTRE: tl.constexpr, PAGE_BYTES: tl.constexpr, D: tl.constexpr,
    DP: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Unpack the pages from ``first`` on of every sequence: two pages, a tile, of one kv head per program.

    Grid (tiles, G, B). With heads = B * G and tokens = tiles * 2 * PAGE: ``K8 [heads, tokens, DP]``, ``VT [heads, DP,
    tokens]`` int8; ``KScale [heads, tokens]``; ``VStart [heads, tiles, DP]`` int32; ``VUnit [heads, tiles]``;
    ``Centre [heads, tokens / PAGE, DP]`` float16 in the order of channels. Tokens behind the last page have scale 0 and
    values 0.
    """
    tile = tl.program_id(0)
    g = tl.program_id(1)
    b = tl.program_id(2)
    pages = tl.load(NumPages + b) - first
    if tile * 2 >= pages:
        return
    block = (b * tl.num_programs(1) + g).to(tl.int64) * tl.num_programs(0) + tile
    both = tile * 2 + 1 < pages
    page = find_page(Pool, PageTable, b, g, first + tile * 2, max_pages, num_blocks, PAGE_BYTES)
    other = find_page(Pool, PageTable, b, g, first + tile * 2 + tl.where(both, 1, 0), max_pages, num_blocks, PAGE_BYTES)
    row = block * (2 * PAGE)
    expand_page(page, True, row, K8, KScale, Centre, SlotOf, K, CENTRE, D, DP, PAGE)
    expand_page(other, both, row + PAGE, K8, KScale, Centre, SlotOf, K, CENTRE, D, DP, PAGE)

    unit = value_unit(page, True, other, both, V, PAGE)
    tl.store(VUnit + block, unit)
    stride = tl.num_programs(0) * (2 * PAGE)
    values = VT + (block - tile) * (2 * PAGE * DP) + tile * (2 * PAGE)
    factor = tl.div_rn(1.0, unit)
    n = tl.arange(0, PAGE)
    for c in tl.static_range(len(V)):
        total = expand_values(page, n, factor, values, stride, V[c][0], V[c][1], V[c][2], V[c][3], V[c][4])
        total += expand_values(
            other, n, tl.where(both, factor, 0.0), values + PAGE, stride, V[c][0], V[c][1], V[c][2], V[c][3], V[c][4]
        )
        store_start(VStart + block * DP + V[c][0], total, V[c][1])


@triton.jit
def store_start(VStart, total, WIDTH: tl.constexpr):
    """What an accumulator starts at: weights are stored less 128; as float32 bits the sum is MAGIC plus an integer."""
    s = tl.arange(0, triton.next_power_of_2(WIDTH))
    tl.store(VStart + s, total * 128 + MAGIC_BITS, mask=s < WIDTH)


@triton.jit
def find_page(Pool, PageTable, b, g, index, max_pages, num_blocks, PAGE_BYTES: tl.constexpr):
    """Pointer to page ``index`` of a sequence; a wrong table entry stays inside the pool."""
    block = tl.load(PageTable + b.to(tl.int64) * max_pages + tl.minimum(index, max_pages - 1))
    block = tl.minimum(tl.maximum(block, 0), num_blocks - 1).to(tl.int64)
    return Pool + (block * tl.num_programs(1) + g) * PAGE_BYTES


@triton.jit
def query_pointers(Q, b, g, i, rows, length, stride_b, stride_h, stride_t):
    """Pointers to query rows ``i`` of a kv head: row ``r * length + t`` is token t of its r-th query head."""
    h = g * (rows // length) + i // length
    return Q + (b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h + (i % length).to(tl.int64) * stride_t)


@triton.jit
def load_queries(Q, b, g, i, rows, length, stride_b, stride_h, stride_t, D: tl.constexpr, DP: tl.constexpr):
    """Query rows ``i`` of a kv head ``[ROWS, DP]``, zeros from ``rows`` on."""
    d = tl.arange(0, DP)
    at = query_pointers(Q, b, g, i, rows, length, stride_b, stride_h, stride_t)
    return tl.load(at[:, None] + d[None, :], mask=(i < rows)[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def split16(q):
    """A float32 of magnitude up to 2 in two float16 terms, the second in units of 2**-11."""
    high = q.to(tl.float16)
    return high, ((q - high.to(tl.float32)) * 2048.0).to(tl.float16)


@triton.jit
def rotate_queries(
    q_row, live, inverse, Into, IntoScale, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr, SPLIT: tl.constexpr
):
    """Query rows times ``inverse``, rotated, in slot order, ``[ROWS, DP]``: a product with a matrix of signs."""
    CHUNK: tl.constexpr = 64
    slot = tl.arange(0, DP)
    rotated = tl.zeros([ROWS, DP], tl.float32)
    rest = tl.zeros([ROWS, DP], tl.float32)
    for c in tl.static_range(DP // CHUNK):
        d = c * CHUNK + tl.arange(0, CHUNK)
        q = tl.load(q_row[:, None] + d[None, :], mask=live[:, None] & (d < D)[None, :], other=0.0)
        high, low = split16(q.to(tl.float32) * inverse[:, None])
        into = tl.load(Into + d[:, None] * DP + slot[None, :])
        rotated = dot16(high, into, rotated)
        if SPLIT:
            rest = dot16(low, into, rest)
    if SPLIT:
        rotated += rest * (1.0 / 2048.0)
    return rotated * tl.load(IntoScale + slot)[None, :]


@triton.jit(do_not_specialize=["first", "rows", "first_row", "length", "pages_room"])
def query_kernel(
    Q, Into, IntoScale, Centre, NumPages, Q8, QScale, Bias, first, rows, first_row, length, pages_room, rows_room,
    stride_b, stride_h, stride_t, scale_log2, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr,
    PAGES: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Query rows from ``first_row`` on in slot order, rotated, int8; and their products with the pages' centres.

    Grid (row blocks, G, B). With heads = B * G: ``Q8 [heads, rows_room, DP]`` int8, ``QScale [heads, rows_room]``,
    ``Bias [heads, pages_room, rows_room]``: scale_log2 q . centre for the pages of scratch, NEVER where there is none.
    float16 holds a 16-bit query exactly in units near the row's largest magnitude; a float32 one (SPLIT) takes two.
    """
    g = tl.program_id(1)
    b = tl.program_id(2)
    pages = tl.load(NumPages + b) - first
    if pages <= 0:
        return
    head = b * tl.num_programs(1) + g
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, DP)
    i = first_row + r
    q = load_queries(Q, b, g, i, rows, length, stride_b, stride_h, stride_t, D, DP).to(tl.float32)
    exponent = tl.maximum(tl.max(tl.abs(q), 1).to(tl.int32, bitcast=True) & 0x7F800000, 30 << 23)
    inverse = ((254 << 23) - exponent).to(tl.float32, bitcast=True)
    unit = exponent.to(tl.float32, bitcast=True) * scale_log2

    q_row = query_pointers(Q, b, g, i, rows, length, stride_b, stride_h, stride_t)
    rotated = rotate_queries(q_row, i < rows, inverse, Into, IntoScale, D, DP, ROWS, SPLIT)
    largest = tl.maximum(tl.max(tl.abs(rotated), 1), 1e-30)
    row = head.to(tl.int64) * rows_room + r
    tl.store(Q8 + row[:, None] * DP + d[None, :], to_int8(rotated * (127.0 / largest)[:, None]))
    tl.store(QScale + row, largest * unit * (1.0 / 127.0))

    # Loaded again: held until here, the rows would not fit into registers.
    q = load_queries(Q, b, g, i, rows, length, stride_b, stride_h, stride_t, D, DP).to(tl.float32)
    high, low = split16(q * inverse[:, None])
    for start in range(0, tl.minimum(pages, pages_room), PAGES):
        p = start + tl.arange(0, PAGES)
        at = (head * pages_room + p).to(tl.int64)
        some = (p < pages) & (p < pages_room)
        centre = tl.load(Centre + at[:, None] * DP + d[None, :], mask=some[:, None], other=0.0)
        bias = dot16(centre, high.T, tl.zeros([PAGES, ROWS], tl.float32))
        if SPLIT:
            bias += dot16(centre, low.T, tl.zeros([PAGES, ROWS], tl.float32)) * (1.0 / 2048.0)
        bias = tl.where(some[:, None], bias * unit[None, :], NEVER)
        tl.store(Bias + at[:, None] * rows_room + r[None, :], bias, mask=(p < pages_room)[:, None])


@dataclass(frozen=True)
class Scratch:
    """Buffers that :func:`expand_kernel` and :func:`query_kernel` fill, for ``tiles`` tiles and ``rows`` query rows."""

    k8: Tensor
    vt: Tensor
    k_scale: Tensor
    v_start: Tensor
    v_unit: Tensor
    centre: Tensor
    q8: Tensor
    q_scale: Tensor
    bias: Tensor

    @classmethod
    def empty(cls, heads: int, tiles: int, rows: int, padded: int, device: torch.device) -> "Scratch":
        """Allocate for ``heads`` kv heads of the whole batch."""

        def make(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(heads, *shape, dtype=dtype, device=device)

        return cls(
            k8=make(tiles * TILE, padded, dtype=torch.int8),
            vt=make(padded, tiles * TILE, dtype=torch.int8),
            k_scale=make(tiles * TILE),
            v_start=make(tiles, padded, dtype=torch.int32),
            v_unit=make(tiles),
            centre=make(tiles * TILE_PAGES, padded, dtype=torch.float16),
            q8=make(rows, padded, dtype=torch.int8),
            q_scale=make(rows),
            bias=make(tiles * TILE_PAGES, rows),
        )


def tile_bytes(padded: int, rows: int) -> int:
    """Bytes of scratch of one tile of one kv head, for ``rows`` query rows."""
    return TILE * (2 * padded + 4) + 4 * padded + 4 + TILE_PAGES * (2 * padded + 4 * rows)


@dataclass(frozen=True)
class Rotations:
    """Slot order and Hadamard as matrices of -1, 0, 1, and the scales that make them orthonormal.

    ``rotated = (q @ into) * into_scale``, ``v = (rotated @ back) * back_scale``; ``into back [DP, DP] float16``;
    ``into_scale back_scale [DP] float32``, 0 where nothing is stored; ``slot_of [D] int32``: channel to slot.
    """

    into: Tensor
    into_scale: Tensor
    back: Tensor
    back_scale: Tensor
    slot_of: Tensor


def rotations(codec: RowsCodec, device: torch.device) -> Rotations:
    """The matrices of a codec, made once per codec and device."""
    order, layout = tuple(codec.order.tolist()), codec.layout
    return _rotations(codec.head_dim, order, layout.k_classes, layout.v_classes, device)


@functools.lru_cache(maxsize=64)
def _rotations(
    dim: int,
    order: tuple[int, ...],
    k_classes: tuple[ChannelClass, ...],
    v_classes: tuple[ChannelClass, ...],
    device: torch.device,
) -> Rotations:
    padded = triton.next_power_of_2(dim)
    into, into_scale = _signs(padded, k_classes)
    back, back_scale = _signs(padded, v_classes)
    slot_of = torch.empty(dim, dtype=torch.int64, device="cpu")
    slot_of[list(order)] = torch.arange(dim, device="cpu")
    by_channel = torch.zeros_like(into)
    by_channel[:dim] = into[slot_of]
    return Rotations(
        into=by_channel.to(device, torch.float16),
        into_scale=into_scale.to(device),
        back=back.to(device, torch.float16),
        back_scale=back_scale.to(device),
        slot_of=slot_of.to(device, torch.int32),
    )


def _signs(padded: int, classes: tuple[ChannelClass, ...]) -> tuple[Tensor, Tensor]:
    """Block-diagonal Hadamard matrix without its scale ``[padded, padded]``, and the scale of each slot."""
    matrix, scale = (torch.zeros(shape, device="cpu") for shape in ((padded, padded), padded))
    for cls in classes:
        block = cls.hadamard_block
        part = matrix[cls.start : cls.stop, cls.start : cls.stop]
        part.copy_(hadamard(torch.eye(cls.width, device="cpu"), block).sign())
        scale[cls.start : cls.stop] = block**-0.5
    return matrix, scale
