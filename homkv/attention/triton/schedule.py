"""Which program reads which pages: split-KV over sequences of unequal length, decided on the device."""

import triton
import triton.language as tl


@triton.jit
def split_counts(NumPages, batch, max_items, STEP: tl.constexpr, BATCH_BLOCK: tl.constexpr):
    """Splits of every sequence, ``[BATCH_BLOCK] int32``, 0 behind the batch; their sum is at most ``max_items``.

    A sequence of n pages gets ``ceil(n / c)`` splits, at least one; c pages each make the whole fit into one wave.
    """
    i = tl.arange(0, BATCH_BLOCK)
    pages = tl.load(NumPages + i, mask=i < batch, other=0)
    room = tl.maximum(max_items - batch, 1)
    chunk = (tl.sum(pages, 0) + room - 1) // room
    chunk = tl.where(max_items > batch, tl.maximum((chunk + STEP - 1) // STEP * STEP, STEP), 1 << 30)
    return tl.where(i < batch, tl.maximum((pages + chunk - 1) // chunk, 1), 0), pages


@triton.jit
def find_split(item, NumPages, batch, max_items, STEP: tl.constexpr, BATCH_BLOCK: tl.constexpr):
    """Sequence, split, number of splits and pages of work item ``item``; the sequence is ``batch`` if there is none."""
    i = tl.arange(0, BATCH_BLOCK)
    splits, pages = split_counts(NumPages, batch, max_items, STEP, BATCH_BLOCK)
    ends = tl.cumsum(splits, 0)
    b = tl.sum((ends <= item).to(tl.int32), 0)
    here = i == b
    count = tl.sum(tl.where(here, splits, 0), 0)
    split = item - (tl.sum(tl.where(here, ends, 0), 0) - count)
    b = tl.minimum(b, batch)
    return b, split, count, tl.sum(tl.where(here, pages, 0), 0)


@triton.jit
def find_splits(b, NumPages, batch, max_items, STEP: tl.constexpr, BATCH_BLOCK: tl.constexpr):
    """First work item of sequence ``b`` and how many it has."""
    i = tl.arange(0, BATCH_BLOCK)
    splits, _ = split_counts(NumPages, batch, max_items, STEP, BATCH_BLOCK)
    return tl.sum(tl.where(i < b, splits, 0), 0), tl.sum(tl.where(i == b, splits, 0), 0)


@triton.jit
def split_range(split, count, pages, UNIT: tl.constexpr = 1):
    """First and last + 1 page of a split: equal shares in units of UNIT pages."""
    units = (pages + UNIT - 1) // UNIT
    return split * units // count * UNIT, tl.minimum((split + 1) * units // count * UNIT, pages)
