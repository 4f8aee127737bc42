"""A format on one text: the exact prefix stored compressed, the tail fed token by token as the text has it.

This is the disaggregated case. As an option the prefix itself attends to the stored form (``prefill="quantized"``).
Many tokens are computed in one pass where that changes nothing: up to the next page that is sealed, all of them see the
same pages and the same exact tokens. New tokens of one pass see each other before they are rounded to 16 bits.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from homkv.attention.api import computes_quantized_prefill
from homkv.cache import PagedCache
from homkv.errors import FormatError
from homkv.eval.encoding import encoded_on_host
from homkv.eval.exact import ExactRun
from homkv.eval.metrics import TokenScores, head_error, joined, token_scores
from homkv.formats import PageCodec, make_codec
from homkv.formats.per_layer import require_model
from homkv.hf import Attachment, KVCache
from homkv.models import LoadedModel
from homkv.models.forward import forward_with_cache
from homkv.seal import pack_layer

PREFILLS = ("exact", "quantized")


def bind(loaded: LoadedModel, name: str) -> PageCodec:
    """A format bound to the model's heads. Raises FormatError, also for a plan of another model."""
    codec = make_codec(name, loaded.head_dim, loaded.rope)
    require_model(codec, lambda: loaded.fingerprint, loaded.num_layers)
    return codec


def passes(codec: PageCodec, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Cut tokens ``start .. stop`` into passes after which a page may be sealed, or single tokens if a format's open
    block changes with every token."""
    changes = (PageCodec.see_window, PageCodec.requantize_window)
    if (type(codec).see_window, type(codec).requantize_window) != changes:
        yield from ((t, t + 1) for t in range(start, stop))
        return
    while start < stop:
        sealed = codec.num_sinks + codec.num_pages(start) * codec.page_tokens
        end = min(max(sealed + codec.max_window, start + 1), stop)
        yield start, end
        start = end


def open_cache(loaded: LoadedModel, codec: PageCodec, tokens: int, impl: str | None, forks: int = 0) -> KVCache:
    """An empty cache for one sequence of ``tokens`` tokens, and room to fork it ``forks`` times."""
    paged = PagedCache(
        encoded_on_host(codec, impl, loaded.model.device),
        num_layers=loaded.num_layers,
        num_kv_heads=loaded.num_kv_heads,
        num_blocks=(1 + forks) * (codec.num_pages(tokens) + 1),
        max_sequences=1 + forks,
        impl=impl,
        device=loaded.model.device,
    )
    return KVCache.adopt(paged, [paged.new_sequence(tokens)])


def store_prefix(loaded: LoadedModel, exact: ExactRun, codec: PageCodec, *, impl: str | None = None) -> KVCache:
    """Put the exact prefix into a paged cache with room for the rest of the text.

    What a format of the wire alone delivers is restored on arrival: the cache then holds 16 bits.
    """
    held = make_codec("fp16", loaded.head_dim) if codec.restored_on_arrival else codec
    cache = open_cache(loaded, held, len(exact.ids), impl, forks=1)
    for layer, (k, v) in enumerate(zip(exact.keys, exact.values, strict=True)):
        if codec.restored_on_arrival:
            k, v = _arrive(codec.at_layer(layer, loaded.num_layers), k, v)
        cache.paged.append(layer, cache.seq_ids[0], k, v)
        cache.layers[layer].num_seen = exact.prefix
    return cache


def _arrive(codec: PageCodec, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values ``[G, T, D]`` after they were packed, sent and restored."""
    content = pack_layer(codec, k, v)
    pages_k, pages_v = codec.dense(content.pages.transpose(0, 1), torch.float32)
    return torch.cat((pages_k, content.exact_k.float()), 1), torch.cat((pages_v, content.exact_v.float()), 1)


@torch.no_grad()
def prefill_quantized(loaded: LoadedModel, ids: Tensor, codec: PageCodec, tokens: int, impl: str | None) -> KVCache:
    """Let the prefix ``ids [T]`` attend to the stored form of itself, as decoding it would."""
    cache = open_cache(loaded, codec, tokens, impl)
    whole = computes_quantized_prefill(codec)  # the format does it by its own algorithm
    with Attachment(loaded.model, codec, {}):
        for start, stop in [(0, len(ids))] if whole else passes(codec, 0, len(ids)):
            forward_with_cache(loaded.model, ids[None, start:stop], cache, logits_to_keep=1)
    return cache


@torch.no_grad()
def feed(loaded: LoadedModel, ids: Tensor, start: int, cache: KVCache) -> Iterator[Tensor]:
    """Feed ``ids[start:]`` to a cache that holds what is before; yields logits ``[t, V]`` of consecutive passes."""
    with Attachment(loaded.model, cache.codec, {}):
        for begin, end in passes(cache.codec, start, len(ids)):
            yield forward_with_cache(loaded.model, ids[None, begin:end], cache).logits[0].float()


def score(
    loaded: LoadedModel, exact: ExactRun, name: str, *, impl: str | None = None, prefill: str = "exact"
) -> tuple[TokenScores, list[list[float]]]:
    """Scores of every prediction whose next token the text has, and errors of attention ``[L][H]`` if recorded.

    Raises FormatError for an unknown format or prefill.
    """
    if prefill not in PREFILLS:
        raise FormatError(f"expected a prefill out of {', '.join(PREFILLS)}, found {prefill!r}")
    codec = bind(loaded, name)
    errors: list[list[float]] = []
    if prefill == "exact":
        cache = store_prefix(loaded, exact, codec, impl=impl)
        errors = attention_errors(loaded, exact, cache)
    else:
        cache = prefill_quantized(loaded, exact.ids[: exact.prefix], codec, len(exact.ids), impl)
    parts, at = [], 0
    for logits in feed(loaded, exact.ids[:-1], exact.prefix, cache):
        stop = at + len(logits)
        targets = exact.ids[exact.prefix + 1 + at : exact.prefix + 1 + stop]
        parts.append(token_scores(exact.logits[at:stop], logits, targets))
        at = stop
    return joined(parts), errors


@torch.no_grad()
def write(loaded: LoadedModel, exact: ExactRun, name: str, num_equal: int, *, impl: str | None = None) -> list[int]:
    """Greedy tokens on the stored prefix, as many as the exact model wrote: ``ids[prefix + 1:]``.

    ``num_equal``: how many of them are known to be the same (``first_miss`` of the forced scores); they are not
    searched for again.
    """
    start, wanted = exact.prefix + 1, len(exact.ids) - exact.prefix - 1
    tokens: list[int] = exact.ids[start : start + num_equal].tolist()
    if len(tokens) == wanted:
        return tokens
    cache = store_prefix(loaded, exact, bind(loaded, name), impl=impl)
    *_, logits = feed(loaded, exact.ids[: start + num_equal], exact.prefix, cache)
    with Attachment(loaded.model, cache.codec, {}):
        while len(tokens) < wanted:
            tokens.append(int(logits[-1].argmax()))
            step = torch.tensor([[tokens[-1]]], device=loaded.model.device)
            logits = forward_with_cache(loaded.model, step, cache).logits[0]
    return tokens


@torch.no_grad()
def attention_errors(loaded: LoadedModel, exact: ExactRun, cache: KVCache) -> list[list[float]]:
    """Relative error of attention per layer and head: exact queries on the stored prefix, ``[L][H]``.

    Takes the tail's first pass, whose inputs are exact: no error of earlier layers is in it. The cache stays as it is.
    """
    if not exact.tail:
        return []
    begin, end = next(passes(cache.codec, exact.prefix, len(exact.ids)))
    count = end - begin
    fork = cache.paged.fork(cache.seq_ids[0])
    found = []
    for layer, tail in enumerate(exact.tail):
        q, k, v = (x[None, :, :count] for x in (tail.q, tail.k, tail.v))
        o = cache.paged.attend(layer, [fork], q, k, v, tail.softmax_scale)[0]
        found.append(head_error(tail.o[:, :count], o))
    cache.paged.free(fork)
    return found
