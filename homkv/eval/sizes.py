"""Bytes and speed beside quality: what a format stores and sends, and how long a decode step's attention takes."""

import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

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
    """One layer's attention of one new token over ``context`` stored ones, in turns with torch on unpacked KV.

    The peer is the faster of grouped matrix products in bfloat16 and in float32, its keys and values unpacked for free.
    """
    step, chosen = _attention_step(loaded, name, context, impl)
    peers = {f"torch matmul {str(d)[6:]}": _torch_step(loaded, context, d) for d in (torch.bfloat16, torch.float32)}
    peer = min(peers, key=lambda name: min(_seconds(peers[name]) for _ in range(3)))
    times, ratios = [], []
    for _ in range(ROUNDS):
        mine, other = _seconds(step), _seconds(peers[peer])
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
        peer=peer,
        machine=f"{platform.machine()}, {torch.get_num_threads()} threads",
    )


def _random(loaded: LoadedModel, context: int) -> tuple[Tensor, Tensor, Tensor]:
    """``q [H, 1, D]``, ``k v [G, context, D]`` on the model's device."""
    generator, dim = torch.Generator().manual_seed(0), loaded.head_dim
    shapes = (loaded.num_q_heads, 1, dim), (loaded.num_kv_heads, context, dim), (loaded.num_kv_heads, context, dim)
    q, k, v = (torch.randn(shape, generator=generator).to(loaded.model.device) for shape in shapes)
    return q, k, v


def _torch_step(loaded: LoadedModel, context: int, dtype: torch.dtype) -> Callable[[], object]:
    q, k, v = (x.to(dtype) for x in _random(loaded, context))
    rows = q.view(loaded.num_kv_heads, -1, loaded.head_dim) * loaded.head_dim**-0.5
    return lambda: torch.softmax((rows @ k.transpose(1, 2)).float(), -1).to(dtype) @ v


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
    q, k, v = _random(loaded, context)
    cache.append(0, sequence, k, v)
    view, scale = cache.view(0, [sequence]), loaded.head_dim**-0.5
    return lambda: api.attend(q[None], view, codec, scale, impl=cache.impl), cache.impl


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
