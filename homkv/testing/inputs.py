"""Keys, values and queries like a model's, extremes included, and a layer's view built from them."""

import torch
from torch import Tensor

from homkv.attention.view import LayerView
from homkv.formats.base import PageCodec

KINDS = ("normal", "outliers", "constant", "zeros", "tiny", "huge")


def make_tokens(kind: str, *shape: int, seed: int = 0) -> Tensor:
    """Tokens ``[..., T, D] float32`` of one kind, the same for the same seed.

    ``normal``: standard normal. ``outliers``: a few channels far from zero, as QKV bias makes them, and a few wide
    ones. ``constant``: 2.5 everywhere. ``tiny``: up to 6e-8, below fp16's smallest number but one.
    ``huge``: up to 1e4. Raises KeyError for another kind.
    """
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(*shape, generator=generator)
    uniform = torch.rand(*shape, generator=generator) * 2 - 1
    channel = torch.arange(shape[-1])
    offset = torch.where(channel % 16 == 3, 150.0, 0.0)
    width = torch.where(channel % 16 == 7, 20.0, 1.0)
    return {
        "normal": normal,
        "outliers": normal * width + offset,
        "constant": torch.full(shape, 2.5),
        "zeros": torch.zeros(shape),
        "tiny": uniform * 6e-8,
        "huge": uniform * 1e4,
    }[kind]


def make_view(
    codec: PageCodec,
    lengths: list[int],
    num_kv_heads: int = 2,
    *,
    kind: str = "normal",
    exact_dtype: torch.dtype = torch.float16,
    seed: int = 0,
) -> LayerView:
    """One layer of sequences of these lengths, laid out as adversely as a cache may lay it out.

    Blocks and slots are shuffled. What attention must not read is poisoned: other blocks hold 0xFF, exact tokens
    behind the end are NaN, page table entries behind the end are -1.
    """
    generator = torch.Generator().manual_seed(seed)
    pages = [codec.num_pages(n) for n in lengths]
    blocks = torch.randperm(sum(pages) + 2, generator=generator)
    slots = torch.randperm(len(lengths) + 1, generator=generator)[: len(lengths)]
    exact_shape = (len(lengths) + 1, num_kv_heads, codec.num_sinks + codec.max_window, codec.head_dim)
    view = LayerView(
        pool=torch.full((sum(pages) + 2, num_kv_heads, codec.page_bytes), 0xFF, dtype=torch.uint8),
        page_table=torch.full((len(lengths), max([1, *pages])), -1, dtype=torch.int32),
        num_pages=torch.tensor(pages, dtype=torch.int32),
        exact_k=torch.full(exact_shape, torch.nan, dtype=exact_dtype),
        exact_v=torch.full(exact_shape, torch.nan, dtype=exact_dtype),
        exact_len=torch.tensor([codec.num_exact(n) for n in lengths], dtype=torch.int32),
        slots=slots.to(torch.int32),
    )
    for b, length in enumerate(lengths):
        k = make_tokens(kind, num_kv_heads, length, codec.head_dim, seed=seed + 2 * b + 1).to(exact_dtype)
        v = make_tokens(kind, num_kv_heads, length, codec.head_dim, seed=seed + 2 * b + 2).to(exact_dtype)
        first = sum(pages[:b])
        _fill(view, b, codec, blocks[first : first + pages[b]], k, v)
    return view


def _fill(view: LayerView, b: int, codec: PageCodec, blocks: Tensor, k: Tensor, v: Tensor) -> None:
    """Lay one sequence ``k v [G, S, D]`` down: sinks, pages, window."""
    sinks = codec.num_sinks
    body = sinks + len(blocks) * codec.page_tokens
    if len(blocks):
        view.pool[blocks] = codec.encode(k[:, sinks:body], v[:, sinks:body], sinks).transpose(0, 1)
        view.page_table[b, : len(blocks)] = blocks.to(torch.int32)
    for buffer, x in ((view.exact_k, k), (view.exact_v, v)):
        exact = torch.cat((x[:, :sinks], x[:, body:]), 1)
        buffer[int(view.slots[b]), :, : exact.shape[1]] = exact
