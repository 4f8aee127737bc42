"""Everything that keeps a caller's mistake away from the C side: shapes, dtypes, contiguity, index ranges."""

import torch
from torch import Tensor

from homkv.attention.cpu import binding
from homkv.attention.view import LayerView
from homkv.errors import DTypeError, ShapeError
from homkv.spec import PAGE_TOKENS, PageLayout


def check_threads(num_threads: int | None) -> int:
    """Number of threads to use. Raises ShapeError for less than one."""
    threads = torch.get_num_threads() if num_threads is None else num_threads
    if threads < 1:
        raise ShapeError(f"expected num_threads of at least 1, found {threads}; leave it out to use torch's setting")
    return min(threads, 1024)


def check_order(order: Tensor) -> tuple[int, ...]:
    """The channel order as a tuple. Raises DTypeError unless it is int32 or int64; its values are checked later."""
    if order.dtype not in (torch.int32, torch.int64):
        raise DTypeError(
            f"expected order of int32 or int64, found {order.dtype}; take it from RopeSpec.channel_order()"
        )
    return tuple(order.flatten().tolist())


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


def check_range(name: str, x: Tensor | None, stop: int, of: str) -> None:
    """Raise ShapeError unless every element of x lies in ``0 .. stop - 1``."""
    if x is not None and x.numel() and (int(x.min()) < 0 or int(x.max()) >= stop):
        raise ShapeError(
            f"expected {name} in 0..{stop - 1} ({of}), found {int(x.min())}..{int(x.max())}; was it built for another "
            "cache?"
        )


def check_view_tensors(view: LayerView) -> None:
    """Raise ShapeError or DTypeError unless every tensor of the view has its dtype and number of dimensions."""
    int32, exact = (torch.int32,), tuple(binding.DTYPES)
    check_tensor("pool", view.pool, (torch.uint8,), 3)
    check_tensor("page_table", view.page_table, int32, 2)
    for name in ("num_pages", "exact_len", "slots"):
        check_tensor(name, getattr(view, name), int32, 1)
    check_tensor("exact_k", view.exact_k, exact, 4)
    check_tensor("exact_v", view.exact_v, (view.exact_k.dtype,), 4)


def check_view(view: LayerView, layout: PageLayout) -> tuple[int, int]:
    """Check shapes and dtypes of the view; index ranges are checked by the C side. Returns batch and kv heads.

    Raises ShapeError or DTypeError.
    """
    check_view_tensors(view)
    heads, page_bytes = view.pool.shape[1:]
    batch = view.page_table.shape[0]
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
    return batch, heads


def check_indices(view: LayerView) -> None:
    """Raise the ShapeError that tells which count or index of the view lies outside its array."""
    max_pages = view.page_table.shape[1]
    check_range("num_pages", view.num_pages, max_pages + 1, "columns of page_table")
    check_range("exact_len", view.exact_len, view.exact_k.shape[2] + 1, "tokens of exact_k")
    check_range("slots", view.slots, view.exact_k.shape[0], "rows of exact_k")
    used = view.page_table[torch.arange(max_pages).unsqueeze(0) < view.num_pages.unsqueeze(1)]
    check_range("page_table entries", used, view.pool.shape[0], "blocks of the pool")


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
