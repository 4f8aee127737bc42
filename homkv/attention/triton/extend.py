"""Extension: new tokens attend to stored pages, in int8, and exactly to exact tokens and, causally, to each other."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend
from triton.tools.tensor_descriptor import TensorDescriptor

from homkv.attention.triton.checks import MAX_GRID, check_view
from homkv.attention.triton.decode import classes
from homkv.attention.triton.exact import Prior, exact_kernel, sdpa_partial
from homkv.attention.triton.expand import Scratch, expand_kernel, query_kernel, rotations, tile_bytes
from homkv.attention.triton.lanes import LOG2E
from homkv.attention.triton.pages import merge_kernel, pages_kernel
from homkv.attention.triton.prefill import HEAD_DIMS, check_causal, descriptor, exact_backend
from homkv.attention.triton.runtime import num_processors
from homkv.attention.triton.tiles import TILE, has_descriptors
from homkv.attention.view import LayerView, check_query
from homkv.errors import CapacityError, ShapeError, UnsupportedError
from homkv.formats.rows import RowsCodec
from homkv.spec import PAGE_TOKENS

SCRATCH_BYTES = 256 << 20
MAX_SCRATCH_BYTES = 1 << 32  # more would need int64 indices inside a head
MAX_CHUNKS = 64  # of the pages, that a plan considers before single tiles
MANY_TOKENS = 1024  # new tokens from which on a library's causal attention is worth its launches
ROW_STEP = 128  # query rows of scratch come in multiples of this


@dataclass(frozen=True)
class ExtendConfig:
    """What does not change the result beyond rounding.

    ``rows warps stages max_registers``: of the kernel on pages; ``exact_*``: of the one on exact tokens; ``programs``:
    per multiprocessor, that the pages are split for where there are few query rows; ``causal``: who computes the new
    tokens' attention to each other: "triton", or torch's "cudnn" or "flash" on a GPU.
    """

    rows: int = 64
    warps: int = 4
    stages: int = 3
    max_registers: int | None = None
    query_rows: int = 64
    query_warps: int = 4
    exact_rows: int = 64
    exact_keys: int = 64
    exact_warps: int = 4
    exact_stages: int = 2
    programs: int = 2
    causal: str = "triton"


def default_config(q: Tensor, k: Tensor, v: Tensor) -> ExtendConfig:
    """Tile sizes by head_dim: 256 channels need the registers of eight warps and small tiles of exact tokens.

    Many 16-bit tokens attend to each other through cuDNN where it takes them.
    """
    use_cudnn = q.shape[2] >= MANY_TOKENS and exact_backend(q, k, v) == SDPBackend.CUDNN_ATTENTION
    causal = "cudnn" if use_cudnn else "triton"
    if q.shape[3] > 128:
        wide = {"warps": 8, "query_warps": 8, "exact_warps": 8, "stages": 2, "exact_keys": 32, "exact_stages": 1}
        return ExtendConfig(causal=causal, **wide)
    return ExtendConfig(causal=causal)


@dataclass(frozen=True)
class Plan:
    """How a call is cut to fit its scratch: tiles of pages and query rows per kv head that are held at a time."""

    tiles: int
    rows: int


def make_plan(heads: int, tiles: int, rows: int, padded: int, scratch_bytes: int) -> Plan:
    """Cut ``tiles`` tiles and ``rows`` query rows of each of ``heads`` kv heads to ``scratch_bytes``.

    Of all cuts that fit, the one with the fewest launches; of those, the one that keeps more pages together, because
    several chunks of pages are expanded again for every block of rows. Raises CapacityError.
    """
    room = min(scratch_bytes, MAX_SCRATCH_BYTES) // heads
    per_row = 5 * padded + 8  # the partial output and its log-sum-exp, the int8 query and its scale
    smallest = tile_bytes(padded, ROW_STEP) + ROW_STEP * per_row
    if smallest > room:
        raise CapacityError(
            f"expected at least {heads * smallest} bytes of scratch for {heads} kv heads, found {scratch_bytes}; raise "
            "scratch_bytes or split the batch"
        )
    best: tuple[int, Plan] | None = None
    for chunks in {*range(1, min(tiles, MAX_CHUNKS) + 1), tiles}:
        held = triton.cdiv(tiles, chunks)
        fitting = (room - held * tile_bytes(padded, 0)) // (per_row + 8 * held) // ROW_STEP * ROW_STEP
        if fitting > 0:
            blocks = triton.cdiv(rows, fitting)
            plan = Plan(held, triton.cdiv(triton.cdiv(rows, blocks), ROW_STEP) * ROW_STEP)
            best = min(best or (chunks * blocks, plan), (chunks * blocks, plan), key=lambda x: (x[0], -x[1].tiles))
    assert best is not None  # a single tile fits
    return best[1]


def extend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    view: LayerView,
    codec: RowsCodec,
    softmax_scale: float,
    *,
    scratch_bytes: int = SCRATCH_BYTES,
    config: ExtendConfig | None = None,
) -> Tensor:
    """Attention of new tokens to everything stored and, causally, to each other: ``[B, H, T, D]`` in q's dtype.

    ``q [B, H, T, D]``, ``k v [B, G, T, D]`` of float16, bfloat16 or float32, last dimension contiguous: T new tokens of
    each sequence, not yet in ``view``; query head h reads kv head ``h // (H / G)``. Any rows format and head_dim.

    Pages are expanded once per call to int8 (see expand.py), queries are rotated and rounded to int8 with one scale per
    row, weights to 8 bits with one scale per row and 128 tokens. These share a scale of the values too: exact where all
    values have 2 bits and scales within a factor of 4, one more rounding to 8 bits elsewhere. The centre's product is
    exact to float32; sinks, window and new tokens are exact in their dtype. At most ``scratch_bytes`` of scratch are
    held: what does not fit is cut into blocks of query rows and chunks of pages.
    Safe in a CUDA graph after one call outside: nothing is read back. Indices outside their array are clamped into it.
    Raises ShapeError, DTypeError, UnsupportedError, CapacityError before anything is launched.
    """
    check_extend(q, k, v, view, codec, softmax_scale)
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if o.numel() == 0:
        return o
    call = _Call(q, k, v, view, codec, softmax_scale * LOG2E.value, config or default_config(q, k, v), o)
    heads, tiles = view.page_table.shape[0] * call.groups, triton.cdiv(view.page_table.shape[1] * PAGE_TOKENS, TILE)
    plan = make_plan(heads, tiles, call.rows, call.padded, scratch_bytes)
    prior = None if call.config.causal == "triton" else sdpa_partial(q, k, v, softmax_scale, call.config.causal)
    scratch = Scratch.empty(heads, plan.tiles, plan.rows, call.padded, q.device)
    old = torch.empty(heads, plan.rows, codec.head_dim, device=q.device)
    old_lse = torch.empty(heads, plan.rows, device=q.device)
    step = plan.tiles * TILE // PAGE_TOKENS
    for first_row in range(0, call.rows, plan.rows):
        call.attend_exact(prior, old, old_lse, first_row)
        for first in range(0, view.page_table.shape[1], step):
            if first_row == 0 or plan.tiles < tiles:
                call.expand(scratch, first)
            call.attend_pages(scratch, old, old_lse, first, first_row)
    return o


@dataclass(frozen=True)
class _Call:
    """One extension: its arguments, and the launches that it is made of."""

    q: Tensor
    k: Tensor
    v: Tensor
    view: LayerView
    codec: RowsCodec
    scale_log2: float
    config: ExtendConfig
    o: Tensor

    @property
    def groups(self) -> int:
        return self.k.shape[1]

    @property
    def rows(self) -> int:
        """Query rows of a kv head: its query heads one after the other, T rows each."""
        return self.q.shape[1] // self.groups * self.q.shape[2]

    @property
    def padded(self) -> int:
        return triton.next_power_of_2(self.codec.head_dim)

    def grid(self, rows_room: int, first_row: int, block: int) -> tuple[int, int, int]:
        """Blocks of the rows from ``first_row`` on that exist, G, B."""
        return triton.cdiv(min(rows_room, self.rows - first_row), block), self.groups, self.q.shape[0]

    def attend_exact(self, prior: Prior | None, old: Tensor, old_lse: Tensor, first_row: int) -> None:
        view, config = self.view, self.config
        before, before_lse = (self.q, old_lse) if prior is None else prior
        exact_kernel[self.grid(old.shape[1], first_row, config.exact_rows)](
            self.q, self.k, self.v, before, before_lse, view.exact_k, view.exact_v, view.exact_len, view.slots, old,
            old_lse, self.rows, first_row, self.q.shape[2], old.shape[1], view.exact_k.shape[2], view.exact_k.shape[0],
            *self.q.stride()[:3], *self.k.stride()[:3], *self.v.stride()[:3], *before.stride()[:3], self.scale_log2,
            D=self.codec.head_dim, DP=self.padded, ROWS=config.exact_rows, KEYS=config.exact_keys,
            PRIOR=prior is not None, num_warps=config.exact_warps, num_stages=config.exact_stages,
        )  # fmt: skip

    def expand(self, scratch: Scratch, first: int) -> None:
        view, layout = self.view, self.codec.layout
        expand_kernel[(scratch.v_unit.shape[1], self.groups, self.q.shape[0])](
            view.pool.view(torch.int8), view.page_table, view.num_pages, rotations(self.codec, self.q.device).slot_of,
            scratch.k8, scratch.vt, scratch.k_scale, scratch.v_start, scratch.v_unit, scratch.centre, first,
            view.page_table.shape[1], view.pool.shape[0], K=classes(layout.k_classes), V=classes(layout.v_classes),
            CENTRE=layout.centre_offset, PAGE_BYTES=layout.page_bytes, D=self.codec.head_dim, DP=self.padded,
            PAGE=PAGE_TOKENS, num_warps=8,
        )  # fmt: skip

    def attend_pages(self, scratch: Scratch, old: Tensor, old_lse: Tensor, first: int, first_row: int) -> None:
        view, config, dim, rows_room = self.view, self.config, self.codec.head_dim, old.shape[1]
        turns = rotations(self.codec, self.q.device)
        tokens = scratch.k8.shape[1]
        shape = {"D": dim, "DP": self.padded, "PAGE": PAGE_TOKENS}
        grid = self.grid(rows_room, first_row, config.rows)
        query_kernel[self.grid(rows_room, first_row, config.query_rows)](
            self.q, turns.into, turns.into_scale, scratch.centre, view.num_pages, scratch.q8, scratch.q_scale,
            scratch.bias, first, self.rows, first_row, self.q.shape[2], tokens // PAGE_TOKENS, rows_room,
            *self.q.stride()[:3], self.scale_log2, D=dim, DP=self.padded, ROWS=config.query_rows, PAGES=64,
            SPLIT=self.q.dtype == torch.float32, num_warps=config.query_warps, num_stages=2,
        )  # fmt: skip
        splits = self.count_splits(math.prod(grid), tokens // TILE)
        part = [old.new_empty(splits, *shape) if splits > 1 else old for shape in self.part_shapes(old)]
        sources: tuple[Tensor | TensorDescriptor, ...] = (scratch.k8, scratch.vt)
        tma = has_descriptors(self.q.device)
        if tma:
            sources = (descriptor(scratch.k8, [TILE, self.padded]), descriptor(scratch.vt, [self.padded, TILE]))
        back = (turns.back, turns.back_scale, self.o, old, old_lse, *part, first, self.rows, first_row)
        pages_kernel[(grid[0] * splits, *grid[1:])](
            scratch.q8, scratch.q_scale, *sources, scratch.k_scale, scratch.v_start, scratch.v_unit, scratch.bias,
            view.num_pages, *back, splits, tokens, rows_room, **shape, ROWS=config.rows, BLOCK=TILE, SPLIT=splits > 1,
            TMA=tma, num_warps=config.warps, num_stages=config.stages, maxnreg=config.max_registers,
        )  # fmt: skip
        if splits > 1:
            merge_kernel[self.grid(rows_room, first_row, 16)](
                view.num_pages, *back, splits, tokens, rows_room, **shape, ROWS=16, num_warps=4
            )

    def part_shapes(self, old: Tensor) -> Iterator[tuple[int, ...]]:
        """Shapes of one split's output, maxima and denominators."""
        yield (*old.shape[:2], self.padded)
        yield from [tuple(old.shape[:2])] * 2

    def count_splits(self, programs: int, tiles: int) -> int:
        """Splits of the pages that fill the device where there are few query rows."""
        wanted = self.config.programs * num_processors(self.q.device)
        return max(1, min(wanted // programs, tiles))


def check_extend(q: Tensor, k: Tensor, v: Tensor, view: LayerView, codec: RowsCodec, softmax_scale: float) -> None:
    """Check the arguments of :func:`extend`. Raises ShapeError, DTypeError, UnsupportedError."""
    if not isinstance(codec, RowsCodec):
        raise UnsupportedError(f"expected a rows format, found {codec.name}; use impl='reference'")
    batch, groups = check_view(view, codec)
    check_query(q, batch, groups, codec.head_dim, view.pool.device)
    check_causal(q, k, v, softmax_scale)
    if k.shape[1] != groups:
        raise ShapeError(
            f"expected k and v of the view's {groups} kv heads, found {tuple(k.shape)}; pass the same layer's"
        )
    if codec.head_dim not in HEAD_DIMS:
        raise UnsupportedError(f"expected head_dim in {HEAD_DIMS}, found {codec.head_dim}; use impl='reference'")
    if q.numel() and any(x.stride(-1) != 1 for x in (q, k, v)):
        raise ShapeError("expected q, k, v with contiguous channels (last stride 1); call .contiguous()")
    rows = q.shape[1] // groups * q.shape[2]
    if max(groups, batch) > MAX_GRID or rows > 2**31 - ROW_STEP:
        raise UnsupportedError(
            f"expected at most {MAX_GRID} sequences and kv heads and int32 query rows, found {tuple(q.shape)}; split "
            "the call"
        )
