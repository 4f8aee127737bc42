"""Merging the partial outputs of a decode call by their log-sum-exp."""

import triton
import triton.language as tl

from homkv.attention.triton.lanes import NEVER, hadamard
from homkv.attention.triton.schedule import count_pages, count_tiles, find_splits, of_sequence


@triton.jit
def load_rows(O, at, live, channel, inside, D: tl.constexpr):
    """Channels of some partial outputs, ``[rows, channels]``; zero where not live or not inside."""
    use = live[:, None] & inside[None, :]
    return tl.load(O + at.to(tl.int64)[:, None] * D + channel[None, :], mask=use, other=0.0)


@triton.jit(do_not_specialize=["batch", "max_items", "exact_tokens"])
def combine_kernel(
    O, Lse, PartO, PartM, PartL, NumPages, batch, max_items, ExactO, ExactM, ExactL, ExactLen, exact_tokens,
    V: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr, EXACT_TILE: tl.constexpr,
    EXACT_TILES: tl.constexpr, SPLITS: tl.constexpr, PAGES: tl.constexpr, STEP: tl.constexpr, BATCH_BLOCK: tl.constexpr,
    PDL: tl.constexpr, ROTATE: tl.constexpr = False,
):  # fmt: skip
    """Merge the partial outputs of one query row and one run of channels.

    Grid (batch * HEADS * ROWS, len(V)). Rows of O and Lse: ``[batch, HEADS, ROWS]``. ``V``: runs of channels
    ``(start, width, stored)`` that cover the head; those not stored have exact tokens only. ROTATE: runs are blocks in
    which the pages' part is still to be rotated back.
    """
    row = tl.program_id(0) % ROWS
    head = tl.program_id(0) // ROWS % HEADS
    b = tl.program_id(0) // (ROWS * HEADS)
    all_tiles = count_tiles(ExactLen, exact_tokens, batch, EXACT_TILE, BATCH_BLOCK)
    units = all_tiles + tl.cdiv(count_pages(NumPages, batch, BATCH_BLOCK), PAGES)
    item, count = find_splits(b, units, batch, max_items, STEP, BATCH_BLOCK)
    tiles = of_sequence(all_tiles, b, BATCH_BLOCK)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    e = tl.arange(0, EXACT_TILES)
    exact_at = ((b * HEADS + head) * EXACT_TILES + e) * ROWS + row
    exact_m = tl.load(ExactM + exact_at, mask=e < tiles, other=NEVER)
    exact_l = tl.load(ExactL + exact_at, mask=e < tiles, other=0.0)
    for c in tl.static_range(len(V)):
        if tl.program_id(1) == c:
            total, top = combine_run(
                O, PartO, PartM, PartL, ExactO, exact_at, exact_m, exact_l, e < tiles, item, count, head, row, V, c, D,
                ROWS, HEADS, SPLITS, ROTATE,
            )  # fmt: skip
            if c == 0:
                lse = tl.where(total > 0, (top + tl.log2(total)) * 0.6931471805599453, -float("inf"))
                tl.store(Lse + tl.program_id(0), lse)


@triton.jit
def combine_run(
    O, PartO, PartM, PartL, ExactO, exact_at, exact_m, exact_l, exact_live, item, count, head, row, V: tl.constexpr,
    C: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr, SPLITS: tl.constexpr,
    ROTATE: tl.constexpr,
):  # fmt: skip
    """Output of one run of channels; returns the denominator and the maximum it is relative to."""
    WIDTH: tl.constexpr = V[C][1]
    PADDED: tl.constexpr = triton.next_power_of_2(WIDTH)
    c = tl.arange(0, PADDED)
    channel = V[C][0] + c
    s = tl.arange(0, SPLITS)
    exact = load_rows(ExactO, exact_at, exact_live, channel, c < WIDTH, D)
    top = tl.max(exact_m, 0)
    total = tl.sum(exact_l * tl.exp2(exact_m - top), 0)
    exact = tl.sum(exact * tl.exp2(exact_m - top)[:, None], 0)
    pages = tl.zeros([PADDED], tl.float32)
    for i in range(0, count, SPLITS):
        # All loads of a round before anything that waits for one of them.
        live = i + s < count
        at = ((item + i + s) * HEADS + head) * ROWS + row
        m = tl.load(PartM + at, mask=live, other=NEVER)
        l = tl.load(PartL + at, mask=live, other=0.0)
        part = load_rows(PartO, at, live & (V[C][2] == 1), channel, c < WIDTH, D)
        new = tl.maximum(top, tl.max(m, 0))
        decay = tl.exp2(top - new)
        share = tl.exp2(m - new)
        total = total * decay + tl.sum(l * share, 0)
        exact = exact * decay
        pages = pages * decay + tl.sum(part * share[:, None], 0)
        top = new
    if not ROTATE:
        exact += pages
    elif V[C][2]:
        exact += hadamard(pages[None, :], 1, PADDED, WIDTH & -WIDTH).reshape([PADDED])
    out = exact * tl.where(total > 0, 1.0 / total, 0.0)
    tl.store(O + tl.program_id(0).to(tl.int64) * D + channel, out, mask=c < WIDTH)
    return total, top
