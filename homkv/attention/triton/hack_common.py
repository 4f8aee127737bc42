"""What HACK's kernels share beside the pages' layout: quantizer and noise, exact tokens, merging of partials."""

from typing import Any

import triton
import triton.language as tl

from homkv.attention.triton.lanes import MAGIC, NEVER
from homkv.formats.hack import KEY_STREAM, VALUE_STREAM, HackCodec
from homkv.formats.hack2026 import Hack2026Codec
from homkv.formats.minmax import MASK32

Codec = HackCodec | Hack2026Codec
SECTIONS = ("k_code", "v_code", "k_scale", "k_minimum", "v_scale", "v_minimum", "k_sum", "v_sum")
SMALLEST_SCALE = tl.constexpr(2.0**-24)
LN2 = tl.constexpr(0.6931471805599453)


def mix32(x: int) -> int:
    """The hash of one 32-bit integer (docs/hack.md), on the host."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & MASK32
    x = ((x ^ (x >> 15)) * 0x846CA68B) & MASK32
    return x ^ (x >> 16)


def noise_key(seed: int, stream: int) -> int:
    """What a kernel needs of seed and stream, ``h(h(seed) ^ stream)``, as a signed 32-bit argument."""
    key = mix32(mix32(seed & MASK32) ^ stream)
    return key - (1 << 32) if key >> 31 else key


def is_stochastic(codec: Codec) -> bool:
    """Whether a codec rounds keys and values stochastically."""
    return isinstance(codec, HackCodec) and codec.options.rounding == "stochastic"


def noise_keys(codec: Codec) -> tuple[int, int]:
    """The keys of K's and of V's noise; anything if the codec draws none."""
    seed = codec.options.seed if isinstance(codec, HackCodec) else 0
    return noise_key(seed, KEY_STREAM), noise_key(seed, VALUE_STREAM)


def page_constants(codec: Codec) -> tuple[Any, ...]:
    """A codec's page as a kernel's constant: ``(T, partition, bits, D, offsets of SECTIONS or -1, page bytes)``."""
    offsets = tuple(codec.record.offsets.get(name, -1) for name in SECTIONS)
    return (codec.page_tokens, codec.partition, codec.options.bits, codec.head_dim, offsets, codec.page_bytes)


@triton.jit
def mix(x):
    """The hash of docs/hack.md, of uint32."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def uniform_noise(key, position, channel):
    """homkv.formats.minmax.uniform_noise at any positions and channels that broadcast."""
    row = mix(key.to(tl.uint32, bitcast=True) ^ position.to(tl.uint32))
    return (mix(row ^ channel.to(tl.uint32)) >> 8).to(tl.float32) * (2.0**-24)


@triton.jit
def over(x, AXES: tl.constexpr, KIND: tl.constexpr):
    """Minimum, maximum or sum over some axes, which stay with size 1."""
    for i in tl.static_range(len(AXES)):
        if KIND == "min":
            x = tl.min(x, AXES[i], keep_dims=True)
        elif KIND == "max":
            x = tl.max(x, AXES[i], keep_dims=True)
        else:
            x = tl.sum(x, AXES[i], keep_dims=True)
    return x


@triton.jit
def quantize(x, inside, noise, BITS: tl.constexpr, STOCHASTIC: tl.constexpr, AXES: tl.constexpr):
    """homkv.formats.minmax.quantize over some axes: codes (0 outside), and scale and minimum as float16 holds them.

    ``inside``: which elements exist. Results are float32; scale and minimum keep the axes, with size 1. Operation by
    operation the reference's: launch with enable_fp_fusion=False where bytes count.
    """
    LEVELS: tl.constexpr = (1 << BITS) - 1
    low = over(tl.where(inside, x, float("inf")), AXES, "min").to(tl.float16).to(tl.float32)
    high = over(tl.where(inside, x, float("-inf")), AXES, "max")
    scale = tl.maximum(tl.div_rn(high - low, LEVELS * 1.0), SMALLEST_SCALE).to(tl.float16).to(tl.float32)
    u = tl.div_rn(x - low, tl.broadcast_to(scale, x.shape))
    if STOCHASTIC:
        floor = tl.floor(u)
        u = floor + (noise < u - floor).to(tl.float32)
        code = tl.minimum(tl.maximum(u, 0.0), LEVELS * 1.0)
    else:
        # MAGIC rounds half to even below 2^22.
        code = (tl.minimum(tl.maximum(u, 0.0), LEVELS * 1.0) + MAGIC) - MAGIC
    return tl.where(inside, code, 0.0), scale, low


@triton.jit
def query_rows(
    Q, n, b, head, stride_b, stride_h, stride_t, ROWS: tl.constexpr, Q_LEN: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Pointers to the query rows of one kv head that columns ``n`` hold, and which exist. Rows repeat after COLUMNS."""
    n = n % COLUMNS
    row = (head * (ROWS // Q_LEN) + n // Q_LEN).to(tl.int64) * stride_h + n % Q_LEN * stride_t
    return Q + b.to(tl.int64) * stride_b + row, n < ROWS


@triton.jit
def find_page(pool, table, at, last, num_blocks, BLOCK_BYTES: tl.constexpr):
    """Pointer to page ``at`` of one kv head; behind ``last``, where there is none, to that one."""
    block = tl.load(table + tl.minimum(at, last))
    return pool + tl.minimum(tl.maximum(block, 0), num_blocks - 1).to(tl.int64) * BLOCK_BYTES


@triton.jit
def find_pages(pool, table, at, last, num_blocks, BLOCK_BYTES: tl.constexpr, PAIR: tl.constexpr):
    """Pointers to pages ``at .. at + PAIR - 1``, a tuple: every layout that needs them would load a tensor anew."""
    out = ()
    for i in tl.static_range(PAIR):
        out = out + (find_page(pool, table, at + i, last, num_blocks, BLOCK_BYTES),)
    return out


@triton.jit
def as_tensor(pages):
    """``[PAIR]`` of a tuple of one or two pointers."""
    i = tl.arange(0, len(pages))
    return tl.where(i == 0, pages[0], pages[len(pages) - 1])


@triton.jit
def store_chunk(PartO, o, share, at, START: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, PAIR: tl.constexpr):
    """Merge a chunk's columns of a pair of pages, ``sum_page share o``, and store it as ``[ROWS, D]`` from row ``at``.

    ``o [CHUNK / 8, 8, ., COPIES, 2]``, ``share [., COPIES, 2]``.
    """
    R: tl.constexpr = o.shape[0]
    N: tl.constexpr = o.shape[2] * o.shape[3] * 2
    o = o * share[None, None]
    if PAIR == 2:
        o = tl.sum(o, 2)
    column = tl.arange(0, N // PAIR)[None, None, :]
    channel = START + tl.arange(0, 8)[None, :, None] * R + tl.arange(0, R)[:, None, None]
    place = PartO + (at + column) * D + channel
    tl.store(place, o.reshape([R, 8, N // PAIR]), mask=(column < ROWS) & (channel < D))


@triton.jit
def store_partial(
    PartO, PartM, PartL, o, m, l, at, CHUNK: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, PAIR: tl.constexpr
):  # fmt: skip
    """Store a program's partial output: chunks ``o``, maximum ``m [., COPIES, 2]``, denominator ``l`` likewise."""
    COLUMNS: tl.constexpr = m.shape[0] * m.shape[1] * 2 // PAIR
    top = m
    if PAIR == 2:
        top = tl.broadcast_to(tl.max(m, 0, keep_dims=True), m.shape)
    share = tl.exp2(m - top)
    l = l * share
    if PAIR == 2:
        l = tl.sum(l, 0)
        m = tl.max(m, 0)
    n = tl.arange(0, COLUMNS)
    tl.store(PartM + at + n, m.reshape([COLUMNS]), mask=n < ROWS)
    tl.store(PartL + at + n, l.reshape([COLUMNS]), mask=n < ROWS)
    for c in tl.static_range(len(o)):
        store_chunk(PartO, o[c], share, at, c * CHUNK, D, ROWS, PAIR)


@triton.jit
def weighted(O, at, m, top, live, channel, D: tl.constexpr):
    """``sum_i exp2(m[i] - top) O[at[i], channel]``."""
    use = live[:, None] & (channel < D)[None, :]
    o = tl.load(O + at.to(tl.int64)[:, None] * D + channel[None, :], mask=use, other=0.0)
    return tl.sum(o * tl.exp2(m - top)[:, None], 0)


@triton.jit(do_not_specialize=["exact_tokens"])
def hack_combine(
    O, Lse, PartO, PartM, PartL, Items, ExactO, ExactM, ExactL, ExactLen, exact_tokens, D: tl.constexpr,
    ROWS: tl.constexpr, HEADS: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr, SPLITS: tl.constexpr,
    WIDTH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Merge the partial outputs of one query row, WIDTH channels. Grid (batch * HEADS * ROWS, D / WIDTH)."""
    row = tl.program_id(0) % ROWS
    head = tl.program_id(0) // ROWS % HEADS
    b = tl.program_id(0) // (ROWS * HEADS)
    channel = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    tiles = tl.cdiv(tl.minimum(tl.load(ExactLen + b), exact_tokens), TILE)
    if PDL:
        tl.extra.cuda.gdc_wait()
    item = tl.load(Items + b * 2)
    count = tl.load(Items + b * 2 + 1)
    e = tl.arange(0, TILES)
    exact_at = ((b * HEADS + head) * TILES + e) * ROWS + row
    exact_m = tl.load(ExactM + exact_at, mask=e < tiles, other=NEVER)
    top = tl.max(exact_m, 0)
    total = tl.sum(tl.load(ExactL + exact_at, mask=e < tiles, other=0.0) * tl.exp2(exact_m - top), 0)
    out = weighted(ExactO, exact_at, exact_m, top, e < tiles, channel, D)
    s = tl.arange(0, SPLITS)
    for i in range(0, count, SPLITS):
        live = i + s < count
        at = ((item + i + s) * HEADS + head) * ROWS + row
        m = tl.load(PartM + at, mask=live, other=NEVER)
        l = tl.load(PartL + at, mask=live, other=0.0)
        new = tl.maximum(top, tl.max(m, 0))
        total = total * tl.exp2(top - new) + tl.sum(l * tl.exp2(m - new), 0)
        out = out * tl.exp2(top - new) + weighted(PartO, at, m, new, live, channel, D)
        top = new
    out *= tl.where(total > 0, 1.0 / total, 0.0)
    tl.store(O + tl.program_id(0).to(tl.int64) * D + channel, out, mask=channel < D)
    if tl.program_id(1) == 0:
        lse = tl.where(total > 0, (top + tl.log2(total)) * LN2, -float("inf"))
        tl.store(Lse + tl.program_id(0), lse)
