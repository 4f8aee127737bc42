"""Quality and bytes of several formats on one model, in one table."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from homkv.errors import ShapeError
from homkv.eval.quality import divergence, passkey, run_exact
from homkv.formats import make_codec
from homkv.models import LoadedModel
from homkv.texts import essays, passkey_prompts

Begin = Callable[[str, int], Callable[[], None]]  # (what, steps) -> called once per step


@dataclass(frozen=True)
class QualityOptions:
    """What to measure. Each chunk is ``prefix`` tokens computed exactly, then ``scored`` tokens on the pages."""

    formats: tuple[str, ...]
    chunks: int = 5
    prefix: int = 1792
    scored: int = 256
    passkey_prompts: int = 8
    passkey_tokens: int = 1900
    impl: str | None = None


@dataclass(frozen=True)
class QualityRow:
    """One format's results. ``bits_per_element`` counts everything stored for ``prefix + scored`` tokens."""

    model: str
    kv_cache_dtype: str
    kl: float
    top1: float
    num_tokens: int
    kl_per_chunk: list[float]
    passkey_found: int
    passkey_prompts: int
    bits_per_element: float
    bits_per_element_32k: float


def chunk_ids(loaded: LoadedModel, count: int, length: int) -> torch.Tensor:
    """Consecutive pieces of the essays, ``[count, length]``. Raises ShapeError if they are too short."""
    text = essays()
    wanted = count * length
    ids = loaded.tokenizer.encode(text[: max(8 * wanted, 1)], add_special_tokens=False)
    if len(ids) < wanted or not wanted:
        raise ShapeError(f"expected at least one token and at most {len(ids)}, found {count} chunks of {length} tokens")
    return torch.tensor(ids[:wanted]).view(count, length)


def measure(loaded: LoadedModel, options: QualityOptions, begin: Begin) -> list[QualityRow]:
    """Run every format on the same exact prefixes. ``begin`` reports progress."""
    total = options.prefix + options.scored
    names = options.formats
    codecs = {name: make_codec(name, loaded.head_dim, loaded.rope) for name in names}
    begin("exact model", 1)
    exact = run_exact(loaded, chunk_ids(loaded, options.chunks, total), options.prefix)
    scores = {}
    for name in names:
        step = begin(f"{name}: divergence", options.scored)
        scores[name] = divergence(loaded, exact, name, impl=options.impl, step=step)
    prompts = passkey_prompts(loaded.tokenizer, options.passkey_tokens, options.passkey_prompts)
    step = begin("pass-key", len(prompts) * len(names))
    found = passkey(loaded, prompts, names, step=step)
    return [
        QualityRow(
            model=loaded.name,
            kv_cache_dtype=name,
            kl=scores[name].kl,
            top1=scores[name].top1,
            num_tokens=scores[name].num_tokens,
            kl_per_chunk=scores[name].kl_per_row,
            passkey_found=found[name],
            passkey_prompts=len(prompts),
            bits_per_element=codecs[name].bits_per_element(total),
            bits_per_element_32k=codecs[name].bits_per_element(32_768),
        )
        for name in names
    ]
