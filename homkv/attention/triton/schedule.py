"""Which program does what: split-KV over sequences of unequal length, decided on the device.

A sequence's work is a row of units: exact tiles, one each, and pages, as many per unit as a kernel takes at a time. A
split is a run of units. Tiles are spread evenly over the row: each waits for its own loads, so that a program that took
them all would be the last one to end.
"""

import triton
import triton.language as tl


@triton.jit
def count_pages(NumPages, batch, BATCH_BLOCK: tl.constexpr):
    """Pages of every sequence, ``[BATCH_BLOCK] int32``, 0 behind the batch."""
    i = tl.arange(0, BATCH_BLOCK)
    return tl.load(NumPages + i, mask=i < batch, other=0)


@triton.jit
def count_tiles(ExactLen, exact_tokens, batch, TILE: tl.constexpr, BATCH_BLOCK: tl.constexpr):
    """Tiles of exact tokens of every sequence, ``[BATCH_BLOCK] int32``, 0 behind the batch."""
    i = tl.arange(0, BATCH_BLOCK)
    length = tl.minimum(tl.load(ExactLen + i, mask=i < batch, other=0), exact_tokens)
    return tl.cdiv(tl.maximum(length, 0), TILE)


@triton.jit
def split_counts(units, batch, max_items, STEP: tl.constexpr, BATCH_BLOCK: tl.constexpr):
    """Splits of every sequence, ``[BATCH_BLOCK] int32``, 0 behind the batch; their sum is at most ``max_items``.

    A sequence of n units gets ``ceil(n / c)`` splits, at least one; c units each make the whole fit into one wave.
    """
    i = tl.arange(0, BATCH_BLOCK)
    room = tl.maximum(max_items - batch, 1)
    chunk = (tl.sum(units, 0) + room - 1) // room
    chunk = tl.where(max_items > batch, tl.maximum((chunk + STEP - 1) // STEP * STEP, STEP), 1 << 30)
    return tl.where(i < batch, tl.maximum((units + chunk - 1) // chunk, 1), 0)


@triton.jit
def of_sequence(values, b, BATCH_BLOCK: tl.constexpr):
    """Entry b of ``values [BATCH_BLOCK]``; 0 if there is none."""
    return tl.sum(tl.where(tl.arange(0, BATCH_BLOCK) == b, values, 0), 0)


@triton.jit
def find_split(item, units, batch, max_items, STEP: tl.constexpr, BATCH_BLOCK: tl.constexpr):
    """Sequence, split and number of splits of work item ``item``; the sequence is ``batch`` if there is none."""
    splits = split_counts(units, batch, max_items, STEP, BATCH_BLOCK)
    ends = tl.cumsum(splits, 0)
    b = tl.minimum(tl.sum((ends <= item).to(tl.int32), 0), batch)
    count = of_sequence(splits, b, BATCH_BLOCK)
    return b, item - (of_sequence(ends, b, BATCH_BLOCK) - count), count


@triton.jit
def find_splits(b, units, batch, max_items, STEP: tl.constexpr, BATCH_BLOCK: tl.constexpr):
    """First work item of sequence ``b`` and how many it has."""
    splits = split_counts(units, batch, max_items, STEP, BATCH_BLOCK)
    before = tl.sum(tl.where(tl.arange(0, BATCH_BLOCK) < b, splits, 0), 0)
    return before, of_sequence(splits, b, BATCH_BLOCK)


@triton.jit
def split_range(split, count, units):
    """First and last + 1 unit of a split: equal shares."""
    return split * units // count, (split + 1) * units // count


@triton.jit
def tiles_before(unit, tiles, units):
    """How many of a row's tiles lie before a unit; the other units before it are pages."""
    return tl.cdiv(unit * tiles, tl.maximum(units, 1))
