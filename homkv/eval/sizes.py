"""Bytes and speed beside quality: what a format stores and sends, and how long a decode step's attention takes."""

import platform
import statistics
import time
from collections.abc import Callable

import torch

from homkv.attention import api
from homkv.cache import PagedCache
from homkv.eval.exact import ExactRun
from homkv.eval.forced import bind
from homkv.eval.record import Size, Speed
from homkv.formats import make_codec
from homkv.models import LoadedModel
from homkv.seal import pack_layer

LONG, WIDE = 32_768, 128  # tokens and head_dim at which formats are compared in the literature
ROUNDS = 9


def measure_size(loaded: LoadedModel, exact: ExactRun, name: str) -> Size:
    """Bits per element of the exact prefix in a format, everything counted; sent: behind the wire's entropy coder."""
    codec, sent = bind(loaded, name), 0
    for layer, (k, v) in enumerate(zip(exact.keys, exact.values, strict=True)):
        content = pack_layer(codec.at_layer(layer, loaded.num_layers), k, v)
        sent += codec.sent_bytes(content.pages) + content.exact_k.nbytes + content.exact_v.nbytes
    elements = 2 * loaded.num_layers * loaded.num_kv_heads * loaded.head_dim * exact.prefix
    return Size(
        key=f"size {loaded.fingerprint} {codec.layout_id} {exact.prefix}",
        model=loaded.name,
        format=name,
        context=exact.prefix,
        stored=codec.bits_per_element(exact.prefix),
        sent=8 * sent / elements,
        stored_32k=_wide_bits(name),
    )


def _wide_bits(name: str) -> float:
    """Bits at 32k tokens and head_dim 128, NaN for a format bound to a model of another head_dim."""
    if name.startswith(("per-layer", "basis")):
        return float("nan")
    return make_codec(name, WIDE).bits_per_element(LONG)


def measure_speed(loaded: LoadedModel, name: str, context: int, impl: str | None = None) -> Speed:
    """One layer's attention of one new token over ``context`` stored ones, in turns with 16-bit KV in torch."""
    step, chosen = _attention_step(loaded, name, context, impl)
    peer, _ = _attention_step(loaded, "fp16", context, None)
    times, ratios = [], []
    for _ in range(ROUNDS):
        mine, other = _seconds(step), _seconds(peer)
        times.append(mine)
        ratios.append(other / mine)
    return Speed(
        key=f"speed {loaded.fingerprint} {bind(loaded, name).layout_id} {context} {chosen}",
        model=loaded.name,
        format=name,
        impl=chosen,
        context=context,
        heads=f"{loaded.num_q_heads}/{loaded.num_kv_heads}x{loaded.head_dim}",
        microseconds=1e6 * statistics.median(times),
        ratios=[round(r, 4) for r in ratios],
        peer="fp16",
        machine=platform.machine(),
    )


def _attention_step(loaded: LoadedModel, name: str, context: int, impl: str | None) -> tuple[Callable[[], object], str]:
    codec = bind(loaded, "fp16" if bind(loaded, name).restored_on_arrival else name)
    cache = PagedCache(
        codec,
        num_layers=1,
        num_kv_heads=loaded.num_kv_heads,
        num_blocks=codec.num_pages(context) + 1,
        max_sequences=1,
        impl=impl,
        device=loaded.model.device,
    )
    sequence = cache.new_sequence(context)
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(loaded.num_kv_heads, context, loaded.head_dim, generator=generator) for _ in "kv")
    cache.append(0, sequence, k.to(loaded.model.device), v.to(loaded.model.device))
    view, scale = cache.view(0, [sequence]), loaded.head_dim**-0.5
    q = torch.randn(1, loaded.num_q_heads, 1, loaded.head_dim, generator=generator).to(loaded.model.device)
    return lambda: api.attend(q, view, codec, scale, impl=cache.impl), cache.impl


def _seconds(call: Callable[[], object]) -> float:
    """The shorter of two calls: what interrupts a process only makes it slower."""
    found = []
    for _ in range(2):
        start = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return min(found)
