"""Find a plan: which layers of a model deserve more bits, within a budget that counts everything stored.

For every layer and candidate format the model runs with that layer in the format and all others in 8 bits; the KL to
the exact model is the layer's sensitivity. A greedy choice then spends the budget where a byte lowers the sum of the
sensitivities most. At last the plan and the candidates themselves are
measured on other texts. The idea of searching layer by layer is KVTuner's (arXiv 2502.04420); its pairs of bits are
rows formats here.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from homkv.cache import PagedCache
from homkv.errors import FormatError, ShapeError
from homkv.formats import make_codec
from homkv.hf import Attachment, KVCache
from homkv.models import LoadedModel
from homkv.models.forward import forward_with_cache, returned_cache
from homkv.plan import LayerPlan
from homkv.spec import NUM_SINKS, PAGE_TOKENS, RowsSpec
from homkv.texts import SHA256, essays

BACKGROUND = (8, 8, 8, 8)  # bits of the layers that are not being measured
CANDIDATES = ("k2220v2222", "k4220v2222", "k4420v2222", "k8420v2222", "k4420v4222", "k8420v4222", "k8440v4444")
Begin = Callable[[str, int], Callable[[], None]]  # (what, steps) -> called once per step


@dataclass(frozen=True)
class CalibrationOptions:
    """What to search and on what. ``budget_bits``: per element at ``context`` tokens, sinks and window included."""

    budget_bits: float
    candidates: tuple[str, ...] = CANDIDATES
    texts: int = 4
    prefix_pages: int = 16
    scored: int = 64
    seed: int = 0
    context: int = 32_768


@dataclass(frozen=True)
class Calibration:
    """The plan, and ``(format, bits per element, KL)`` of candidates and plan on texts that it was not chosen on."""

    plan: LayerPlan
    verified: list[tuple[str, float, float]]


@dataclass(frozen=True)
class _Exact:
    """Texts whose first ``prefix`` tokens were read exactly: KV per layer ``[B, G, prefix, D]``, ``logp [B, T, V]``."""

    ids: Tensor
    prefix: int
    keys: list[Tensor]
    values: list[Tensor]
    logp: Tensor


def choose(sensitivity: Sequence[Mapping[str, float]], bits: Mapping[str, float], budget_bits: float) -> list[str]:
    """Formats of the layers whose mean of ``bits`` is within the budget and whose sum of KL is low.

    ``sensitivity[layer][format]``: KL with only this layer in the format. Every layer starts at its cheapest format;
    of all changes that fit, the one with the steepest fall of KL per bit goes first. While everything fits, this walks
    along the lower convex hulls of the layers; the last bits go to whoever can use them. Raises FormatError if the
    cheapest format is above the budget.
    """
    cheapest = min(bits, key=lambda name: (bits[name], name))
    room = (budget_bits - bits[cheapest]) * len(sensitivity)
    if room < 0:
        raise FormatError(f"expected a budget of at least {bits[cheapest]:.3f} bits, found {budget_bits}; allow more")
    chosen = [cheapest] * len(sensitivity)
    while True:
        steps = [
            ((kl[name] - kl[now]) / (bits[name] - bits[now]), layer, name)
            for layer, (kl, now) in enumerate(zip(sensitivity, chosen, strict=True))
            for name in bits
            if 0 < bits[name] - bits[now] <= room + 1e-9 and kl[name] < kl[now]
        ]
        if not steps:
            return chosen
        _, layer, name = min(steps)
        room -= bits[name] - bits[chosen[layer]]
        chosen[layer] = name


@torch.no_grad()
def calibrate(loaded: LoadedModel, options: CalibrationOptions, begin: Begin) -> Calibration:
    """Search a plan for a model. The same seed, model and machine give the same plan.

    Raises FormatError for an unknown candidate or a budget that none fits, ShapeError for texts that are too short.
    """
    names = tuple(RowsSpec.parse(name).name for name in options.candidates)
    bits = {n: make_codec(n, loaded.head_dim, loaded.rope).bits_per_element(options.context) for n in names}
    choose([dict.fromkeys(names, 0.0)], bits, options.budget_bits)  # a budget that is too small is said at once
    step = begin("exact model", 2)
    chosen_on, verified_on = (_read(loaded, options, part, step) for part in (1, 0))
    step = begin("sensitivity of layers", loaded.num_layers * len(names))
    sensitivity = []
    for layer in range(loaded.num_layers):
        plans = {name: _one_layer(loaded, layer, name) for name in names}
        sensitivity.append({name: _divergence(loaded, chosen_on, plan.spelling, step) for name, plan in plans.items()})
    layers = tuple(choose(sensitivity, bits, options.budget_bits))
    provenance: dict[str, Any] = {
        "model": loaded.name,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "method": "KL of one layer at a time on exact prefixes, greedy per bit",
        "budget_bits": options.budget_bits,
        "bits_per_element": sum(bits[name] for name in layers) / len(layers),
        "context": options.context,
        "seed": options.seed,
        "texts": options.texts,
        "prefix_tokens": chosen_on.prefix,
        "scored_tokens": options.scored,
        "text_sha256": SHA256,
        "candidates": bits,
        "sensitivity": sensitivity,
    }
    plan = LayerPlan(loaded.fingerprint, layers, f"{loaded.name} {options.budget_bits:g} bits", provenance=provenance)
    step = begin("verification", len(names) + 1)
    bits_of = bits | {plan.spelling: provenance["bits_per_element"]}
    rows = [(n, float(b), _divergence(loaded, verified_on, n, step)) for n, b in bits_of.items()]
    verified = [(plan.title if n == plan.spelling else n, b, kl) for n, b, kl in rows]
    return Calibration(plan, sorted(verified, key=lambda row: row[1]))


def _one_layer(loaded: LoadedModel, layer: int, name: str) -> LayerPlan:
    """``name`` in one layer, 8 bits in all others."""
    background = RowsSpec(BACKGROUND, BACKGROUND, RowsSpec.parse(name).min_window).name
    formats = [background] * loaded.num_layers
    formats[layer] = name
    return LayerPlan(loaded.fingerprint, tuple(formats))


def _read(loaded: LoadedModel, options: CalibrationOptions, part: int, step: Callable[[], None]) -> _Exact:
    """Texts of one half of the essays, at places that the seed decides; predictions behind their prefixes."""
    prefix = NUM_SINKS + options.prefix_pages * PAGE_TOKENS
    text = essays()
    half = text[part * len(text) // 2 : (part + 1) * len(text) // 2]
    all_ids = loaded.tokenizer.encode(half, add_special_tokens=False, verbose=False)
    length = prefix + options.scored
    if not 0 < length < len(all_ids) or options.texts < 1 or options.scored < 1:
        raise ShapeError(f"expected texts of 1 to {len(all_ids) - 1} tokens, found {options.texts} of {length}")
    rng = random.Random(options.seed)
    starts = [rng.randrange(len(all_ids) - length) for _ in range(options.texts)]
    ids = torch.tensor([all_ids[start : start + length] for start in starts])
    outputs = [loaded.model(row[None], use_cache=True, logits_to_keep=options.scored) for row in ids]
    caches = [returned_cache(output) for output in outputs]
    keys, values = (
        [torch.cat([getattr(c.layers[i], side)[:, :, :prefix] for c in caches]) for i in range(loaded.num_layers)]
        for side in ("keys", "values")
    )
    step()
    return _Exact(ids, prefix, keys, values, torch.cat([o.logits for o in outputs]).float().log_softmax(-1))


def _divergence(loaded: LoadedModel, exact: _Exact, kv_cache_dtype: str, step: Callable[[], None]) -> float:
    """Mean KL (nats) behind the prefixes, a page's worth of tokens at a time: what decoding one by one would see."""
    codec = make_codec(kv_cache_dtype, loaded.head_dim, loaded.rope)
    count, total = exact.ids.shape
    cache = PagedCache(
        codec,
        num_layers=loaded.num_layers,
        num_kv_heads=loaded.num_kv_heads,
        num_blocks=count * (codec.num_pages(total) + 1),
        max_sequences=count,
    )
    sequences = [cache.new_sequence(total) for _ in range(count)]
    for layer, (k, v) in enumerate(zip(exact.keys, exact.values, strict=True)):
        for row, sequence in enumerate(sequences):
            cache.append(layer, sequence, k[row], v[row])
    past, found = KVCache.adopt(cache, sequences), []
    with Attachment(loaded.model, codec, {}):
        for start in range(exact.prefix, total, PAGE_TOKENS):
            ids = exact.ids[:, start : start + PAGE_TOKENS]
            found.append(forward_with_cache(loaded.model, ids, past).logits.float())
    q = torch.cat(found, 1).log_softmax(-1)
    step()
    return float((exact.logp.exp() * (exact.logp - q)).sum(-1).mean())
