"""Attention and page encoding in C++ for the CPU, called through ctypes. Nothing a caller passes may crash it.

Sources: this folder. The GIL is released while they run. Threads: an own pool that sleeps between calls.
"""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from homkv.attention.cpu import binding
from homkv.attention.view import LayerView
from homkv.errors import DTypeError, ShapeError, UnsupportedError
from homkv.spec import PAGE_TOKENS, PageLayout

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
    batch, heads, exact_tokens = check_view(view, layout)
    slots = check_order(order, layout)
    check_query(q, batch, heads, layout.head_dim)
    num_q_heads, num_queries = q.shape[1], q.shape[2]
    rows = num_q_heads // heads * num_queries
    q = q.to(torch.float32).contiguous()
    o = torch.empty(q.shape, dtype=torch.float32)
    lse = torch.empty(q.shape[:3], dtype=torch.float32)
    if o.numel() == 0:
        return o, lse
    args = binding.AttendArgs(
        layout=ctypes.pointer(binding.layout_struct(layout, slots)),
        q=q.data_ptr(),
        pool=view.pool.data_ptr(),
        page_table=view.page_table.data_ptr(),
        num_pages=view.num_pages.data_ptr(),
        exact_k=view.exact_k.data_ptr(),
        exact_v=view.exact_v.data_ptr(),
        exact_len=view.exact_len.data_ptr(),
        slots=view.slots.data_ptr(),
        o=o.data_ptr(),
        lse=lse.data_ptr(),
        softmax_scale=softmax_scale,
        batch=batch,
        heads=heads,
        rows=rows,
        max_pages=view.page_table.shape[1],
        exact_tokens=exact_tokens,
        exact_dtype=binding.DTYPES[view.exact_k.dtype],
        pages_per_split=PAGES_PER_SPLIT,
        threads=check_threads(num_threads),
        isa=library.isa_index(isa),
    )
    binding.raise_status(library.handle.homkv_attend(ctypes.byref(args)))
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
    slots = check_order(order, layout)
    heads, num_pages = check_tokens(k, v, layout)
    pages = torch.empty(num_pages, heads, layout.page_bytes, dtype=torch.uint8) if out is None else out
    check_pages_out(pages, num_pages, heads, layout, block_ids)
    if num_pages == 0 or heads == 0:
        return pages
    args = binding.EncodeArgs(
        layout=ctypes.pointer(binding.layout_struct(layout, slots)),
        k=k.data_ptr(),
        v=v.data_ptr(),
        k_head_stride=k.stride(0),
        k_token_stride=k.stride(1),
        v_head_stride=v.stride(0),
        v_token_stride=v.stride(1),
        pages=pages.data_ptr(),
        block_ids=None if block_ids is None else block_ids.data_ptr(),
        heads=heads,
        num_pages=num_pages,
        dtype=binding.DTYPES[k.dtype],
        threads=check_threads(num_threads),
        isa=library.isa_index(isa),
    )
    binding.raise_status(library.handle.homkv_encode(ctypes.byref(args)))
    return pages


def check_threads(num_threads: int | None) -> int:
    """Number of threads to use. Raises ShapeError for less than one."""
    threads = torch.get_num_threads() if num_threads is None else num_threads
    if threads < 1:
        raise ShapeError(f"expected num_threads of at least 1, found {threads}; leave it out to use torch's setting")
    return min(threads, 1024)


def check_order(order: Tensor | Sequence[int], layout: PageLayout) -> tuple[int, ...]:
    """The channel order as a tuple. Raises ShapeError unless it is a permutation of the head's channels."""
    found = tuple(int(c) for c in (order.tolist() if isinstance(order, Tensor) else order))
    if sorted(found) != list(range(layout.head_dim)):
        raise ShapeError(
            f"expected order to be a permutation of {layout.head_dim} channels, found {len(found)} entries "
            f"{found[:8]}...; take it from RopeSpec.channel_order()"
        )
    return found


def check_query(q: Tensor, batch: int, heads: int, head_dim: int) -> None:
    """Raise ShapeError or DTypeError unless q is ``[batch, multiple of heads, T, head_dim]`` on the CPU."""
    shape = q.shape
    if q.ndim != 4 or shape[0] != batch or shape[3] != head_dim or heads == 0 or shape[1] % heads:
        raise ShapeError(
            f"expected q [B={batch}, H multiple of {heads}, T, D={head_dim}], found {tuple(shape)}; "
            "transpose it to [B, H, T, D]"
        )
    if not q.is_floating_point() or q.device.type != "cpu":
        raise DTypeError(f"expected a floating point q on the CPU, found {q.dtype} on {q.device}; move or cast it")


def check_tensor(name: str, x: Tensor, dtypes: tuple[torch.dtype, ...], ndim: int) -> None:
    """Raise DTypeError or ShapeError unless x is a contiguous CPU tensor of this kind."""
    if x.dtype not in dtypes or x.device.type != "cpu":
        expected = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise DTypeError(f"expected {name} of {expected} on the CPU, found {x.dtype} on {x.device}; cast or move it")
    if x.ndim != ndim or not x.is_contiguous():
        raise ShapeError(
            f"expected a contiguous {name} of {ndim} dimensions, found {tuple(x.shape)} with strides {x.stride()}; "
            "call .contiguous()"
        )


def check_range(name: str, x: Tensor, stop: int, of: str) -> None:
    """Raise ShapeError unless every element of x lies in ``0 .. stop - 1``."""
    if x.numel() and (int(x.min()) < 0 or int(x.max()) >= stop):
        raise ShapeError(
            f"expected {name} in 0..{stop - 1} ({of}), found {int(x.min())}..{int(x.max())}; was it built for another "
            "cache?"
        )


def check_view(view: LayerView, layout: PageLayout) -> tuple[int, int, int]:
    """Check everything the kernel will index with. Returns batch, kv heads and exact tokens per slot.

    Raises ShapeError or DTypeError.
    """
    int32, exact = (torch.int32,), tuple(binding.DTYPES)
    check_tensor("pool", view.pool, (torch.uint8,), 3)
    check_tensor("page_table", view.page_table, int32, 2)
    for name in ("num_pages", "exact_len", "slots"):
        check_tensor(name, getattr(view, name), int32, 1)
    check_tensor("exact_k", view.exact_k, exact, 4)
    check_tensor("exact_v", view.exact_v, (view.exact_k.dtype,), 4)
    num_blocks, heads, page_bytes = view.pool.shape
    batch, max_pages = view.page_table.shape
    if page_bytes != layout.page_bytes:
        raise ShapeError(
            f"expected a pool of pages of {layout.page_bytes} bytes, found {page_bytes}; was the cache built for "
            "another format or head_dim?"
        )
    lengths = {name: getattr(view, name).shape[0] for name in ("num_pages", "exact_len", "slots")}
    if set(lengths.values()) != {batch}:
        raise ShapeError(f"expected one entry per sequence of page_table ({batch}), found {lengths}; pass [B] tensors")
    num_slots, _, exact_tokens, _ = view.exact_k.shape
    expected = (num_slots, heads, exact_tokens, layout.head_dim)
    if tuple(view.exact_k.shape) != expected or tuple(view.exact_v.shape) != expected:
        raise ShapeError(
            f"expected exact_k and exact_v [slots, G={heads}, E, D={layout.head_dim}], found "
            f"{tuple(view.exact_k.shape)} and {tuple(view.exact_v.shape)}; one row per sequence slot"
        )
    check_range("num_pages", view.num_pages, max_pages + 1, "columns of page_table")
    check_range("exact_len", view.exact_len, exact_tokens + 1, "tokens of exact_k")
    check_range("slots", view.slots, num_slots, "rows of exact_k")
    used = view.page_table[torch.arange(max_pages).unsqueeze(0) < view.num_pages.unsqueeze(1)]
    check_range("page_table entries", used, num_blocks, "blocks of the pool")
    return batch, heads, exact_tokens


def check_tokens(k: Tensor, v: Tensor, layout: PageLayout) -> tuple[int, int]:
    """Check ``k v [G, n * 64, D]``. Returns G and n. Raises ShapeError or DTypeError."""
    if k.shape != v.shape or k.ndim != 3 or k.shape[2] != layout.head_dim or k.shape[1] % PAGE_TOKENS:
        raise ShapeError(
            f"expected k and v [G, n * {PAGE_TOKENS}, {layout.head_dim}], found {tuple(k.shape)} and "
            f"{tuple(v.shape)}; pass whole pages and keep the rest in the window"
        )
    if k.dtype != v.dtype or k.dtype not in binding.DTYPES or {k.device.type, v.device.type} != {"cpu"}:
        raise DTypeError(
            f"expected k and v both float32, float16 or bfloat16 on the CPU, found {k.dtype} on {k.device} and "
            f"{v.dtype} on {v.device}; cast or move them"
        )
    if k.numel() and (k.stride(2) != 1 or v.stride(2) != 1):
        raise ShapeError(f"expected a contiguous last dimension, found strides {k.stride()} and {v.stride()}")
    return k.shape[0], k.shape[1] // PAGE_TOKENS


def check_pages_out(pages: Tensor, num_pages: int, heads: int, layout: PageLayout, block_ids: Tensor | None) -> None:
    """Check where encoded pages go. Raises ShapeError or DTypeError."""
    check_tensor("out", pages, (torch.uint8,), 3)
    blocks = num_pages if block_ids is None else pages.shape[0]
    if tuple(pages.shape) != (blocks, heads, layout.page_bytes):
        raise ShapeError(
            f"expected out [{'blocks' if block_ids is not None else num_pages}, G={heads}, P={layout.page_bytes}], "
            f"found {tuple(pages.shape)}; was the pool built for another format?"
        )
    if block_ids is None:
        return
    check_tensor("block_ids", block_ids, (torch.int32,), 1)
    if block_ids.shape[0] != num_pages or block_ids.unique().numel() != num_pages:
        raise ShapeError(f"expected {num_pages} different block_ids, found {block_ids.tolist()}; one per page")
    check_range("block_ids", block_ids, blocks, "blocks of out")
