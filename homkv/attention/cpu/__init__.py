"""Attention and page encoding in C++ for the CPU, called through ctypes. Nothing a caller passes may crash it.

Sources: this folder. The GIL is released while they run. Threads: an own pool that sleeps between calls.
"""

import ctypes

import torch
from torch import Tensor

from homkv.attention.cpu import binding, checks
from homkv.attention.view import LayerView, check_query
from homkv.errors import UnsupportedError
from homkv.spec import PageLayout

PAGES_PER_SPLIT = 64  # part of the rounding of the result, so fixed: 4,096 tokens


def is_available() -> bool:
    """Whether the native library was built and loads."""
    try:
        binding.load()
    except UnsupportedError:
        return False
    return True


def require() -> None:
    """Raise UnsupportedError, with the remedy, unless the native library loads."""
    binding.load()


def available_isas() -> tuple[str, ...]:
    """Instruction sets that this machine can run, best first. Raises UnsupportedError if the library is missing."""
    return binding.load().isas


def best_isa() -> str:
    """The instruction set used when none is asked for. Raises UnsupportedError if the library is missing."""
    return available_isas()[0]


def attend(
    q: Tensor,
    view: LayerView,
    layout: PageLayout,
    order: Tensor,
    softmax_scale: float,
    *,
    num_threads: int | None = None,
    isa: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of ``q [B, H, T, D]`` (floating point) over every token of ``view``, on the pages' codes.

    ``o = softmax(softmax_scale q . k) v`` with int8 queries and uint8 weights (docs/format.md, "Computing with a
    page"); sinks and window in float32. Query head h reads kv head ``h // (H / G)``; every row sees the whole view.
    ``order [D]`` int32 or int64: slot -> channel. ``num_threads``: default torch.get_num_threads(); the result does
    not depend on it. ``isa``: one of available_isas(), default the best.

    Returns ``o [B, H, T, D] float32`` and ``lse [B, H, T] float32`` (natural logarithm; -inf and o = 0 for an empty
    sequence). Raises ShapeError, DTypeError, UnsupportedError. NaN in q gives NaN in its rows.
    """
    library = binding.load()
    batch, heads = checks.check_view(view, layout)
    check_query(q, batch, heads, layout.head_dim)
    shape = binding.layout_struct(layout, checks.check_order(order))
    q = q.to(torch.float32).contiguous()
    o, lse = torch.empty_like(q), torch.empty(q.shape[:3], dtype=torch.float32)
    if o.numel() == 0:
        return o, lse
    args = binding.AttendArgs(
        layout=ctypes.pointer(shape),
        softmax_scale=softmax_scale,
        num_blocks=view.pool.shape[0],
        num_slots=view.exact_k.shape[0],
        batch=batch,
        heads=heads,
        rows=q.shape[1] // heads * q.shape[2],
        max_pages=view.page_table.shape[1],
        exact_tokens=view.exact_k.shape[2],
        exact_dtype=binding.DTYPES[view.exact_k.dtype],
        pages_per_split=PAGES_PER_SPLIT,
        threads=checks.check_threads(num_threads),
        isa=library.isa_index(isa),
        **{name: x.data_ptr() for name, x in {**vars(view), "q": q, "o": o, "lse": lse}.items()},
    )
    status = library.handle.homkv_attend(ctypes.byref(args))
    if status == binding.INDEX_RANGE:
        checks.check_indices(view)
    binding.raise_status(status)
    return o, lse


def encode(
    k: Tensor,
    v: Tensor,
    layout: PageLayout,
    order: Tensor,
    *,
    out: Tensor | None = None,
    block_ids: Tensor | None = None,
    num_threads: int | None = None,
    isa: str | None = None,
) -> Tensor:
    """Quantize and pack ``k v [G, n * 64, D]`` into pages, byte for byte as docs/format.md says.

    ``k v``: float32, float16 or bfloat16, any strides with the last dimension contiguous. Without ``out`` returns new
    pages ``[n, G, P] uint8``; ``out [blocks, G, P]`` with ``block_ids [n] int32``: page i of every head goes to
    ``out[block_ids[i]]``, which is returned whole; ``out`` alone must be ``[n, G, P]``.

    Raises ShapeError, DTypeError, UnsupportedError, and FormatError for values the format cannot hold; then the
    pages named by ``block_ids`` hold undefined bytes and no others were touched.
    """
    library = binding.load()
    shape = binding.layout_struct(layout, checks.check_order(order))
    heads, num_pages = checks.check_tokens(k, v, layout)
    pages = torch.empty(num_pages, heads, layout.page_bytes, dtype=torch.uint8) if out is None else out
    checks.check_pages_out(pages, num_pages, heads, layout, block_ids)
    if num_pages == 0 or heads == 0:
        return pages
    args = binding.EncodeArgs(
        layout=ctypes.pointer(shape),
        k=k.data_ptr(),
        v=v.data_ptr(),
        k_head_stride=k.stride(0),
        k_token_stride=k.stride(1),
        v_head_stride=v.stride(0),
        v_token_stride=v.stride(1),
        pages=pages.data_ptr(),
        block_ids=None if block_ids is None else block_ids.data_ptr(),
        num_blocks=pages.shape[0],
        heads=heads,
        num_pages=num_pages,
        dtype=binding.DTYPES[k.dtype],
        threads=checks.check_threads(num_threads),
        isa=library.isa_index(isa),
    )
    status = library.handle.homkv_encode(ctypes.byref(args))
    if status == binding.INDEX_RANGE:
        checks.check_range("block_ids", block_ids, pages.shape[0], "blocks of out")
    binding.raise_status(status)
    return pages
