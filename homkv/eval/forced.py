"""A format on one text: the exact prefix stored compressed, the tail fed token by token as the text has it.

This is the disaggregated case. As an option the prefix itself attends to the stored form (``prefill="quantized"``).
Many tokens are computed in one pass where that changes nothing: up to the next page that is sealed, all of them see the
same pages and the same exact tokens. New tokens of one pass see each other before they are rounded to 16 bits. Texts of
one length are computed side by side: a pass over several takes hardly longer, above all where it is a single token.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from homkv.attention.api import computes_quantized_prefill
from homkv.cache import PagedCache
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


def open_cache(
    loaded: LoadedModel, codec: PageCodec, batch: int, tokens: int, impl: str | None, forks: int = 0
) -> KVCache:
    """An empty cache for ``batch`` sequences of ``tokens`` tokens, and room to fork each ``forks`` times."""
    num_sequences = batch * (1 + forks)
    paged = PagedCache(
        encoded_on_host(codec, impl, loaded.model.device),
        num_layers=loaded.num_layers,
        num_kv_heads=loaded.num_kv_heads,
        num_blocks=num_sequences * (codec.num_pages(tokens) + 1),
        max_sequences=num_sequences,
        impl=impl,
        device=loaded.model.device,
    )
    return KVCache.adopt(paged, [paged.new_sequence(tokens) for _ in range(batch)], loaded.sliding_windows)


def store_prefix(
    loaded: LoadedModel, runs: Sequence[ExactRun], codec: PageCodec, *, impl: str | None = None
) -> KVCache:
    """Put the exact prefixes of texts of one length into a paged cache with room for the rest of each.

    What a format of the wire alone delivers is restored on arrival: the cache then holds 16 bits.
    """
    held = make_codec("fp16", loaded.head_dim) if codec.restored_on_arrival else codec
    cache = open_cache(loaded, held, len(runs), len(runs[0].ids), impl, forks=1)
    for seq_id, exact in zip(cache.seq_ids, runs, strict=True):
        for layer, (k, v) in enumerate(zip(exact.keys, exact.values, strict=True)):
            if codec.restored_on_arrival:
                k, v = _arrive(codec.at_layer(layer, loaded.num_layers), k, v)
            cache.paged.append(layer, seq_id, k, v)
    for layer in cache.paged_layers:
        layer.num_seen = runs[0].prefix
    for i, layer in enumerate(cache.sliding_layers):
        k, v = (torch.stack([exact.sliding[i][part] for exact in runs]) for part in (0, 1))
        layer.keep(k, v, runs[0].prefix)
    return cache


def _arrive(codec: PageCodec, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values ``[G, T, D]`` after they were packed, sent and restored."""
    content = pack_layer(codec, k, v)
    pages_k, pages_v = codec.dense(content.pages.transpose(0, 1), torch.float32)
    return torch.cat((pages_k, content.exact_k.float()), 1), torch.cat((pages_v, content.exact_v.float()), 1)


@torch.no_grad()
def prefill_quantized(loaded: LoadedModel, ids: Tensor, codec: PageCodec, tokens: int, impl: str | None) -> KVCache:
    """Let prefixes ``ids [B, T]`` attend to the stored form of themselves, as decoding them would."""
    cache = open_cache(loaded, codec, len(ids), tokens, impl)
    length = ids.shape[1]
    whole = computes_quantized_prefill(codec)  # the format does it by its own algorithm
    with Attachment(loaded.model, codec, {}):
        for start, stop in [(0, length)] if whole else passes(codec, 0, length):
            forward_with_cache(loaded.model, ids[:, start:stop], cache, logits_to_keep=1)
    return cache


@torch.no_grad()
def feed(loaded: LoadedModel, ids: Tensor, start: int, cache: KVCache) -> Iterator[Tensor]:
    """Feed ``ids[:, start:]`` to a cache that holds what is before; yields logits ``[B, t, V]`` of passes in order."""
    with Attachment(loaded.model, cache.codec, {}):
        for begin, end in passes(cache.codec, start, ids.shape[1]):
            yield forward_with_cache(loaded.model, ids[:, begin:end], cache).logits.float()


Scored = tuple[TokenScores, list[list[float]]]  # of every prediction; errors of attention [L][H], if recorded


def score(
    loaded: LoadedModel, runs: Sequence[ExactRun], name: str, *, impl: str | None = None, prefill: str = "exact"
) -> list[Scored]:
    """Scores of every prediction whose next token the text has, for texts of one length, computed side by side.

    ``prefill``: one of PREFILLS. Raises FormatError for an unknown format.
    """
    codec, prefix = bind(loaded, name), runs[0].prefix
    ids = torch.stack([exact.ids for exact in runs])
    errors: list[list[list[float]]] = [[] for _ in runs]
    if prefill == "exact":
        cache = store_prefix(loaded, runs, codec, impl=impl)
        errors = attention_errors(runs, cache)
    else:
        cache = prefill_quantized(loaded, ids[:, :prefix], codec, ids.shape[1], impl)
    parts: list[list[TokenScores]] = [[] for _ in runs]
    at = 0
    for logits in feed(loaded, ids[:, :-1], prefix, cache):
        stop = at + logits.shape[1]
        for exact, rows, found in zip(runs, logits, parts, strict=True):
            found.append(token_scores(exact.logits[at:stop], rows, exact.ids[prefix + 1 + at : prefix + 1 + stop]))
        at = stop
    return list(zip(map(joined, parts), errors, strict=True))


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
    cache = store_prefix(loaded, [exact], bind(loaded, name), impl=impl)
    *_, logits = feed(loaded, exact.ids[None, : start + num_equal], exact.prefix, cache)
    with Attachment(loaded.model, cache.codec, {}):
        while len(tokens) < wanted:
            tokens.append(int(logits[0, -1].argmax()))
            step = torch.tensor([[tokens[-1]]], device=loaded.model.device)
            logits = forward_with_cache(loaded.model, step, cache).logits
    return tokens


@torch.no_grad()
def attention_errors(runs: Sequence[ExactRun], cache: KVCache) -> list[list[list[float]]]:
    """Relative error of attention of each text, layer and head: exact queries on the stored prefixes, ``[B][L][H]``.

    Takes the tails' first pass, whose inputs are exact: no error of earlier layers is in it. The cache stays as it is.
    """
    found: list[list[list[float]]] = [[] for _ in runs]
    if not runs[0].tail:
        return found
    begin, end = next(passes(cache.codec, runs[0].prefix, len(runs[0].ids)))
    forks = [cache.paged.fork(seq_id) for seq_id in cache.seq_ids]
    for layer in range(len(runs[0].tail)):
        tails = [exact.tail[layer] for exact in runs]
        q, k, v = (torch.stack([getattr(t, x)[:, : end - begin] for t in tails]) for x in "qkv")
        outs = cache.paged.attend(layer, forks, q, k, v, tails[0].softmax_scale)
        for t, o, errors in zip(tails, outs, found, strict=True):
            errors.append(head_error(t.o[:, : end - begin], o))
    for fork in forks:
        cache.paged.free(fork)
    return found
