"""Find a plan: which layers of a model deserve more bits, within a budget that counts everything stored.

For every layer and candidate format the model runs with that layer in the format and all others in 8 bits; the KL to
the exact model is the layer's sensitivity. A greedy choice then spends the budget where a byte lowers the sum of the
sensitivities most. At last the plan and the candidates themselves are measured on other texts. The idea of searching
layer by layer is KVTuner's (arXiv 2502.04420); its pairs of bits are rows formats here.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from homkv.errors import FormatError, ShapeError
from homkv.eval.items import Item
from homkv.eval.record import CALIBRATION, Case
from homkv.eval.run import Conditions, measure_cases
from homkv.eval.summary import mean
from homkv.formats import make_codec
from homkv.models import LoadedModel
from homkv.plan import LayerPlan
from homkv.spec import NUM_SINKS, PAGE_TOKENS, RowsSpec
from homkv.texts import SHA256, essays, token_ids

BACKGROUND = (8, 8, 8, 8)  # bits of the layers that are not being measured
CANDIDATES = (
    "k2200v2222",
    "k2220v2222",
    "k4200v2222",
    "k4220v2222",
    "k4420v2222",
    "k8420v2222",
    "k4420v4222",
    "k8420v4222",
    "k8440v4444",
)
Step = Callable[[str], None]


@dataclass(frozen=True)
class CalibrationOptions:
    """What to search and on what. ``budget_bits``: per element at ``context`` tokens, sinks and window included.

    ``head_dim``: channels at which bits are counted; None for the model's. ``window``: shortest exact window of the
    plan; None for the candidates' own, which must be equal. Layers are measured with the candidates' own, whatever the
    plan's: a longer window lowers the loss of all of them.
    """

    budget_bits: float
    candidates: tuple[str, ...] = CANDIDATES
    window: int | None = None
    texts: int = 4
    prefix_pages: int = 16
    scored: int = 64
    seed: int = 0
    context: int = 32_768
    head_dim: int | None = None

    @property
    def prefix(self) -> int:
        """Exact tokens before the scored ones."""
        return NUM_SINKS + self.prefix_pages * PAGE_TOKENS

    def names(self) -> dict[str, str]:
        """Canonical name of every candidate, and the same with the plan's window. Raises FormatError."""
        specs = [RowsSpec.parse(name) for name in self.candidates]
        window = {spec.min_window for spec in specs} if self.window is None else {self.window}
        if len(window) != 1:
            raise FormatError(f"expected candidates with one window, found {sorted(window)}; choose it with --window")
        (chosen,) = window
        return {spec.name: replace(spec, min_window=chosen).name for spec in specs}


@dataclass(frozen=True)
class Calibration:
    """The plan, and ``(format, bits per element, KL)`` of candidates and plan on texts that it was not chosen on."""

    plan: LayerPlan
    verified: list[tuple[str, float, float]]


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


def num_cases(loaded: LoadedModel, options: CalibrationOptions) -> int:
    """Steps that :func:`calibrate` takes."""
    names = len(options.names())
    return options.texts * ((1 + loaded.num_layers * names) + (1 + names + 1))


def calibrate(
    loaded: LoadedModel,
    options: CalibrationOptions,
    path: Path,
    step: Step = lambda _: None,
    impl: str | None = None,
) -> Calibration:
    """Search a plan for a model. The same seed, model and machine give the same plan.

    Every case is appended to ``path`` as homkv.eval.run does: a search goes on where it stopped, and another budget
    needs no new measurements but those of its plan. Raises FormatError for an unknown candidate or a budget that none
    fits, ShapeError for texts that are too short.
    """
    names, head_dim = options.names(), options.head_dim or loaded.head_dim
    bits = {n: make_codec(final, head_dim).bits_per_element(options.context) for n, final in names.items()}
    choose([dict.fromkeys(names, 0.0)], bits, options.budget_bits)  # a budget that is too small is said at once
    chosen_on, verified_on = (calibration_items(loaded, options, part) for part in (1, 0))
    alone = {(layer, n): _one_layer(loaded, layer, n).spelling for layer in range(loaded.num_layers) for n in names}
    kl = _divergences(loaded, chosen_on, tuple(alone.values()), path, step, impl)
    sensitivity = [{n: kl[alone[layer, n]] for n in names} for layer in range(loaded.num_layers)]
    chosen = choose(sensitivity, bits, options.budget_bits)
    provenance: dict[str, Any] = {
        "model": loaded.name,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "device": loaded.model.device.type,
        "method": "KL of one layer at a time on exact prefixes, greedy per bit",
        "budget_bits": options.budget_bits,
        "bits_per_element": mean([bits[name] for name in chosen]),
        "context": options.context,
        "window": RowsSpec.parse(names[chosen[0]]).min_window,
        "head_dim": head_dim,
        "seed": options.seed,
        "texts": options.texts,
        "prefix_tokens": options.prefix,
        "scored_tokens": options.scored,
        "text_sha256": SHA256,
        "candidates": bits,
        "sensitivity": sensitivity,
    }
    layers = tuple(names[name] for name in chosen)
    plan = LayerPlan(loaded.fingerprint, layers, f"{loaded.name} {options.budget_bits:g} bits", provenance=provenance)
    kl = _divergences(loaded, verified_on, (*names.values(), plan.spelling), path, step, impl)
    rows = [(plan.title, float(provenance["bits_per_element"]), kl[plan.spelling])]
    rows += [(final, float(bits[name]), kl[final]) for name, final in names.items()]
    return Calibration(plan, sorted(rows, key=lambda row: row[1]))


def _one_layer(loaded: LoadedModel, layer: int, name: str) -> LayerPlan:
    """``name`` in one layer, 8 bits in all others."""
    background = RowsSpec(BACKGROUND, BACKGROUND, RowsSpec.parse(name).min_window).name
    formats = [background] * loaded.num_layers
    formats[layer] = name
    return LayerPlan(loaded.fingerprint, tuple(formats))


def calibration_items(loaded: LoadedModel, options: CalibrationOptions, part: int) -> list[Item]:
    """Texts of one half of the essays, at places that the seed decides. Raises ShapeError if they are too short."""
    text = essays()
    ids = token_ids(loaded.tokenizer, text[part * len(text) // 2 : (part + 1) * len(text) // 2])
    length = options.prefix + options.scored + 1  # the last token is only predicted
    if not 0 < length < len(ids) or options.texts < 1 or options.scored < 1:
        raise ShapeError(f"expected texts of 1 to {len(ids) - 1} tokens, found {options.texts} of {length}")
    rng = random.Random(options.seed)
    starts = [rng.randrange(len(ids) - length) for _ in range(options.texts)]
    return [
        Item(CALIBRATION, f"half {part + 1}, token {start}", tuple(ids[start : start + length]), options.prefix)
        for start in starts
    ]


def _divergences(
    loaded: LoadedModel, items: Sequence[Item], names: tuple[str, ...], path: Path, step: Step, impl: str | None
) -> dict[str, float]:
    """Mean KL (nats) of every format over all texts. Raises FormatError if one could not be measured."""
    cases = measure_cases(loaded, items, Conditions(names, impl=impl, bf16=False, batch=len(items)), path, step)
    by_format: dict[str, list[Case]] = {}
    for case in cases:
        if case.error:
            raise FormatError(f"expected a measurement of {case.format}, found: {case.error}; leave the format out")
        by_format.setdefault(case.format, []).append(case)
    return {name: mean([x for case in found for x in case.kl]) for name, found in by_format.items()}
