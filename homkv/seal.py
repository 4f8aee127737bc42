"""From exact tokens to pages: what one layer of one sequence stores, and how tokens leave the window."""

from dataclasses import dataclass

import torch
from torch import Tensor

from homkv.attention import api
from homkv.errors import FormatError
from homkv.formats.base import PageCodec


@dataclass(frozen=True)
class LayerContent:
    """One layer of one sequence, ready for the wire.

    ``pages [N, G, P] uint8``; ``exact_k exact_v [G, E, D]``: sinks, then window; ``num_tokens = N * page_tokens + E``.
    """

    num_tokens: int
    pages: Tensor
    exact_k: Tensor
    exact_v: Tensor


def to_exact(x: Tensor, dtype: torch.dtype, what: str) -> Tensor:
    """Cast new tokens to the dtype of sinks and window. Raises FormatError if any is not finite in it."""
    exact = x.to(dtype)
    if not bool(torch.isfinite(exact).all()):
        raise FormatError(
            f"expected finite {what} within {dtype}, found NaN, infinity or overflow; nothing was stored: use "
            "exact_dtype=torch.bfloat16 or torch.float32"
        )
    return exact


def seal(codec: PageCodec, k: Tensor, v: Tensor, pages_before: int, impl: str | None = None) -> LayerContent:
    """Turn every token that has left the window into pages.

    ``k v [G, E, D]``: exact tokens of one layer (sinks, then all behind page ``pages_before``), in the exact dtype.
    Returns the new pages and the exact tokens that remain. The bytes depend on the tokens alone, not on how many
    calls brought them.
    """
    total = pages_before * codec.page_tokens + k.shape[1]
    count = codec.num_pages(total) - pages_before
    start, position = codec.num_sinks, codec.num_sinks + pages_before * codec.page_tokens
    stop = start + count * codec.page_tokens
    pages = torch.empty(0, k.shape[0], codec.page_bytes, dtype=torch.uint8)
    if count:
        pages = api.encode(codec, k[:, start:stop], v[:, start:stop], position, impl=impl)
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
