"""From exact tokens to pages: what one layer of one sequence stores, and how tokens leave the window.

Functions that take ``status [1] int32`` set it where they would raise FormatError, so that nothing is read back from a
GPU; :func:`check_status` raises later.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from homkv.attention import api
from homkv.attention.view import LayerView
from homkv.errors import FormatError
from homkv.formats.base import PageCodec
from homkv.formats.rows import RowsCodec


@dataclass(frozen=True)
class LayerContent:
    """One layer of one sequence, ready for the wire.

    ``pages [N, G, P] uint8``; ``exact_k exact_v [G, E, D]``: sinks, then window; ``num_tokens = N * page_tokens + E``.
    """

    num_tokens: int
    pages: Tensor
    exact_k: Tensor
    exact_v: Tensor


def to_exact(x: Tensor, dtype: torch.dtype, what: str, status: Tensor | None = None) -> Tensor:
    """Cast new tokens to the dtype of sinks and window. Raises FormatError if any is not finite in it."""
    exact = x.to(dtype)
    finite = torch.isfinite(exact).all()
    if status is not None:
        status |= ~finite
    elif not bool(finite):
        raise FormatError(
            f"expected finite {what} within {dtype}, found NaN, infinity or overflow; nothing was stored: use "
            "exact_dtype=torch.bfloat16 or torch.float32"
        )
    return exact


def check_status(status: Tensor) -> None:
    """Raise FormatError if ``status`` was set since it was last checked. Waits for the device."""
    if int(status):
        status.zero_()
        raise FormatError(
            "expected keys and values that the format and the exact dtype can hold, found NaN, infinity or numbers too "
            "large; free the sequences of this batch, and use exact_dtype=torch.bfloat16 or --kv-cache-dtype fp16"
        )


def seal(
    codec: PageCodec, k: Tensor, v: Tensor, pages_before: int, impl: str | None = None, status: Tensor | None = None
) -> LayerContent:
    """Turn every token that has left the window into pages.

    ``k v [G, E, D]``: exact tokens of one layer (sinks, then all behind page ``pages_before``), in the exact dtype.
    Returns the new pages and the exact tokens that remain, on k's device. The bytes depend on the tokens alone, not on
    how many calls brought them.
    """
    total = pages_before * codec.page_tokens + k.shape[1]
    count = codec.num_pages(total) - pages_before
    start, position = codec.num_sinks, codec.num_sinks + pages_before * codec.page_tokens
    stop = start + count * codec.page_tokens
    pages = torch.empty(0, k.shape[0], codec.page_bytes, dtype=torch.uint8, device=k.device)
    if count:
        pages = api.encode(codec, k[:, start:stop], v[:, start:stop], position, impl=impl, status=status)
        k, v = (torch.cat((x[:, :start], x[:, stop:]), 1) for x in (k, v))
    window = codec.requantize_window(v[:, start:], position + stop - start).to(v.dtype)
    return LayerContent(total, pages, k, torch.cat((v[:, :start], window), 1))


def pack_layer(
    codec: PageCodec, k: Tensor, v: Tensor, exact_dtype: torch.dtype = torch.float16, impl: str | None = None
) -> LayerContent:
    """Compress one layer of a whole prompt, ``k v [G, T, D]``: what a cache would hold after appending it.

    Raises FormatError for values that the format or ``exact_dtype`` cannot hold.
    """
    return seal(codec, to_exact(k, exact_dtype, "keys"), to_exact(v, exact_dtype, "values"), 0, impl)


def advance(codec: PageCodec, view: LayerView) -> Tensor:
    """Count one more token in every sequence of the view, in place; returns ``due [B] bool``: whose window was full.

    ``num_pages += due; exact_len += 1 - page_tokens * due``. Layers whose views share these counters advance once, and
    each then takes its token with :func:`append_one`. Waits for nothing: CUDA graphs can replay it.
    """
    due = view.exact_len == codec.num_sinks + codec.max_window
    view.num_pages.add_(due)
    view.exact_len.add_(1).add_(due, alpha=-codec.page_tokens)
    return due


def append_one(
    codec: PageCodec,
    view: LayerView,
    due: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    impl: str | None = None,
    status: Tensor | None = None,
) -> None:
    """Store one token per sequence, ``k v [B, G, D]``, at the end of a layer whose counters :func:`advance` moved.

    Where ``due``, the oldest tokens of the window first become page ``num_pages - 1``. The same bytes as sealing behind
    the token that filled the window. impl "triton" (rows formats) is one kernel that waits for nothing. Values that
    cannot be stored set ``status``; without it (not for that kernel) they raise FormatError.
    """
    chosen = api.resolve_impl(codec, impl, k.device)
    if chosen == "triton" and isinstance(codec, RowsCodec):
        from homkv.attention.triton import window  # Triton is optional

        assert status is not None
        window.append(k, v, view, due, codec, status)
        return
    for b in due.nonzero().flatten().tolist():
        seal_oldest(codec, view, b, chosen, status)
    rows, at = view.slots.long(), view.exact_len.long() - 1
    view.exact_k[rows, :, at] = to_exact(k, view.exact_k.dtype, "keys", status)
    view.exact_v[rows, :, at] = to_exact(v, view.exact_v.dtype, "values", status)


def seal_oldest(codec: PageCodec, view: LayerView, b: int, impl: str, status: Tensor | None) -> None:
    """The oldest window tokens of row ``b`` become its newest page; the view's counters are already those of after."""
    slot, pages, start = int(view.slots[b]), int(view.num_pages[b]), codec.num_sinks
    stop, end = start + codec.page_tokens, start + codec.max_window
    k, v = view.exact_k[slot], view.exact_v[slot]
    position = start + (pages - 1) * codec.page_tokens
    try:
        page = api.encode(codec, k[:, start:stop], v[:, start:stop], position, impl=impl, status=status)
        view.pool[int(view.page_table[b, pages - 1])] = page[0]
    except FormatError:
        if status is None:
            raise
        status.fill_(1)
    for x in (k, v):
        x[:, start : end - codec.page_tokens] = x[:, stop:end].clone()
