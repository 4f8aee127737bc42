"""What must hold before a kernel is launched. Nothing is read back: counts and indices are clamped on the device."""

import math

import torch
from torch import Tensor

from homkv.attention.triton.runtime import check_device
from homkv.attention.view import LayerView, check_query
from homkv.errors import DTypeError, ShapeError, UnsupportedError
from homkv.formats.base import PageCodec

MAX_ROWS = 16  # query rows per kv head: columns of one matrix instruction, twice
MAX_BATCH = 4096  # sequences whose splits one program can lay out
INT32_MAX = 2**31 - 1
MAX_PAGES = 2**20  # of a sequence: splits times pages are int32 numbers
MAX_GRID = 65535  # blocks along the second and third dimension of a launch
EXACT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
ALIGNMENT = 16  # bytes: what one access of a thread takes


def check_tensor(name: str, x: Tensor, dtypes: tuple[torch.dtype, ...], ndim: int, device: torch.device) -> None:
    """Raise DTypeError or ShapeError unless x is a contiguous tensor of this kind on the device."""
    if x.dtype not in dtypes or x.device != device:
        expected = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise DTypeError(f"expected {name} of {expected} on {device}, found {x.dtype} on {x.device}; cast or move it")
    if x.ndim != ndim or not x.is_contiguous():
        raise ShapeError(
            f"expected a contiguous {name} of {ndim} dimensions, found {tuple(x.shape)} with strides {x.stride()}; "
            "call .contiguous()"
        )


def check_aligned(name: str, x: Tensor) -> None:
    """Raise ShapeError unless x starts at a multiple of ALIGNMENT bytes."""
    if x.data_ptr() % ALIGNMENT:
        raise ShapeError(
            f"expected {name} at a multiple of {ALIGNMENT} bytes, found {x.data_ptr():#x}; cut it from its buffer at "
            "whole pages"
        )


def check_status_word(status: Tensor, device: torch.device) -> None:
    """Raise DTypeError or ShapeError unless status is ``[1] int32`` on the device."""
    check_tensor("status", status, (torch.int32,), 1, device)
    if status.shape[0] != 1:
        raise ShapeError(f"expected status [1], found {tuple(status.shape)}; pass torch.zeros(1, dtype=torch.int32)")


def check_view(view: LayerView, codec: PageCodec) -> tuple[int, int]:
    """Check devices, dtypes and shapes of a view; returns batch and kv heads.

    Raises ShapeError, DTypeError, UnsupportedError.
    """
    device = view.pool.device
    check_device(device)
    check_tensor("pool", view.pool, (torch.uint8,), 3, device)
    check_tensor("page_table", view.page_table, (torch.int32,), 2, device)
    for name in ("num_pages", "exact_len", "slots"):
        check_tensor(name, getattr(view, name), (torch.int32,), 1, device)
    check_tensor("exact_k", view.exact_k, EXACT_DTYPES, 4, device)
    check_tensor("exact_v", view.exact_v, (view.exact_k.dtype,), 4, device)
    for name in ("pool", "exact_k", "exact_v"):
        check_aligned(name, getattr(view, name))
    blocks, heads, page_bytes = view.pool.shape
    batch, slots = view.page_table.shape[0], view.exact_k.shape[0]
    if page_bytes != codec.page_bytes or blocks == 0:
        raise ShapeError(
            f"expected a pool of at least one block of pages of {codec.page_bytes} bytes ({codec.name}), found "
            f"{tuple(view.pool.shape)}; was the cache built for another format or head_dim?"
        )
    lengths = {name: getattr(view, name).shape[0] for name in ("num_pages", "exact_len", "slots")}
    if set(lengths.values()) != {batch} or view.page_table.shape[1] == 0 or slots == 0:
        raise ShapeError(
            f"expected one entry per row of page_table {tuple(view.page_table.shape)}, at least one page column and "
            f"one slot, found {lengths} and {slots} slots; pass [B] tensors"
        )
    if view.page_table.shape[1] > MAX_PAGES:
        raise UnsupportedError(
            f"expected at most {MAX_PAGES} pages per sequence, found a page_table {tuple(view.page_table.shape)}; make "
            "it as wide as the longest sequence"
        )
    expected = (slots, heads, view.exact_k.shape[2], codec.head_dim)
    if tuple(view.exact_k.shape) != expected or tuple(view.exact_v.shape) != expected:
        raise ShapeError(
            f"expected exact_k and exact_v [slots, G={heads}, E, D={codec.head_dim}], found "
            f"{tuple(view.exact_k.shape)} and {tuple(view.exact_v.shape)}; one row per sequence slot"
        )
    return batch, heads


def check_attend(q: Tensor, view: LayerView, codec: PageCodec, softmax_scale: float) -> None:
    """Check the arguments of decode attention. Raises ShapeError, DTypeError, UnsupportedError."""
    batch, heads = check_view(view, codec)
    check_query(q, batch, heads, codec.head_dim, view.pool.device)
    if q.dtype not in EXACT_DTYPES:
        raise DTypeError(f"expected q of float16, bfloat16 or float32, found {q.dtype}; cast it")
    rows = q.shape[1] // heads * q.shape[2]
    if rows > MAX_ROWS:
        raise UnsupportedError(
            f"expected at most {MAX_ROWS} query rows per kv head, found {q.shape[1]} heads over {heads} kv heads times "
            f"{q.shape[2]} tokens; use extend() for more tokens"
        )
    if batch > MAX_BATCH or batch * heads * rows * codec.head_dim > INT32_MAX:
        raise UnsupportedError(
            f"expected at most {MAX_BATCH} sequences of int32 offsets, found {batch}; split the batch"
        )
    if not (math.isfinite(softmax_scale) and softmax_scale > 0):
        raise ShapeError(f"expected a positive, finite softmax_scale, found {softmax_scale}; use head_dim ** -0.5")


def reachable(q: Tensor) -> Tensor:
    """``q [B, H, T, D]``, or a copy where channels are not neighbours, or rows of a sequence beyond int32 offsets."""
    furthest = sum((size - 1) * stride for size, stride in zip(q.shape[1:], q.stride()[1:], strict=True))
    return q if q.stride(-1) == 1 and furthest <= INT32_MAX else q.contiguous()
