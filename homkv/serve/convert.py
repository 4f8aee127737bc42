"""From the format in which a prefill instance keeps KV to the one that a decode instance holds."""

import torch

from homkv.formats import PageCodec
from homkv.seal import LayerContent, seal, to_exact

EXACT_DTYPE = torch.float16  # of sinks and window on the wire and in the cache


def convert(content: LayerContent, source: PageCodec, target: PageCodec, first_page: int = 0) -> LayerContent:
    """One layer in ``target``'s format, without its first ``first_page`` pages, which the receiver has.

    Equal formats: the very bytes. From 16 bits: what ``pack_layer`` makes of the same keys and values. Otherwise the
    source's reconstruction is encoded. Raises FormatError for values that the target cannot hold.
    """
    if source.name == target.name:
        return LayerContent(content.num_tokens, content.pages[first_page:], content.exact_k, content.exact_v)
    k, v = dense(content, source)
    sinks, skipped = target.num_sinks, target.num_sinks + first_page * target.page_tokens
    k, v = (torch.cat((x[:, :sinks], x[:, skipped:]), 1) for x in (k, v))
    made = seal(target, k, v, first_page)
    return LayerContent(content.num_tokens, made.pages, made.exact_k, made.exact_v)


def dense(content: LayerContent, codec: PageCodec) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values ``[G, T, D] float16`` of a whole layer."""
    pages = codec.dense(content.pages.transpose(0, 1))
    parts = zip((content.exact_k, content.exact_v), pages, ("keys", "values"), strict=True)
    sinks = codec.num_sinks
    k, v = (
        torch.cat((exact[:, :sinks], to_exact(page, EXACT_DTYPE, what), exact[:, sinks:]), 1)
        for exact, page, what in parts
    )
    return k, v
