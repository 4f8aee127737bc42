"""Bytes and speed beside quality: what a format stores and sends, and how long a decode step's attention takes."""

import platform
import statistics
import time
from collections.abc import Callable, Container, Iterator, Sequence

import torch
from torch import Tensor

from homkv.attention import api
from homkv.cache import PagedCache
from homkv.eval.encoding import encoded_on_host
from homkv.eval.exact import ExactRun, run_exact
from homkv.eval.forced import bind
from homkv.eval.record import Size, Speed
from homkv.formats import PageCodec, make_codec
from homkv.formats.per_layer import PerLayerCodec
from homkv.models import LoadedModel
from homkv.seal import pack_layer

LONG, WIDE = 32_768, 128  # tokens and head_dim at which formats are compared in the literature
ROUNDS = 9


def measure_sizes(
    loaded: LoadedModel,
    ids: Tensor,
    names: Sequence[str],
    known: Container[str],
    *,
    impl: str | None = None,
    speed_context: int | None = None,
) -> Iterator[Size | Speed]:
    """Size of every format on the exact prefix ``ids[:-1]``, and speed at ``speed_context`` tokens unless None.

    Keys that are ``known`` were measured before.
    """
    exact: ExactRun | None = None
    for name in names:
        if size_key(loaded, name, len(ids) - 1) not in known:
            exact = exact or run_exact(loaded, ids, len(ids) - 1)
            yield measure_size(loaded, exact, name, impl)
        if speed_context is not None and speed_key(loaded, name, speed_context, impl) not in known:
            yield measure_speed(loaded, name, speed_context, impl)


def size_key(loaded: LoadedModel, name: str, context: int) -> str:
    """What a size is kept under."""
    return f"size {loaded.fingerprint} {bind(loaded, name).layout_id} {context}"


def speed_key(loaded: LoadedModel, name: str, context: int, impl: str | None) -> str:
    """What a speed is kept under: it belongs to the implementation and the device as well."""
    device = loaded.model.device
    chosen = api.resolve_impl(_computed(loaded, name), impl, device)
    layers = _num_layers(loaded, _computed(loaded, name), chosen)
    return f"speed {loaded.fingerprint} {bind(loaded, name).layout_id} {context} {chosen} {device.type} {layers} layers"


def _computed(loaded: LoadedModel, name: str) -> PageCodec:
    """The form that decode attends to: 16 bits where a format is restored on arrival."""
    codec = bind(loaded, name)
    return bind(loaded, "fp16") if codec.restored_on_arrival else codec


def measure_size(loaded: LoadedModel, exact: ExactRun, name: str, impl: str | None = None) -> Size:
    """Bits per element of the exact prefix in a format, everything counted; sent: behind the wire's entropy coder."""
    codec, sent = bind(loaded, name), 0
    encoder = encoded_on_host(codec, impl, loaded.model.device)
    for layer, (k, v) in enumerate(zip(exact.keys, exact.values, strict=True)):
        content = pack_layer(encoder.at_layer(layer, loaded.num_layers), k, v, impl=impl)
        sent += codec.sent_bytes(content.pages) + content.exact_k.nbytes + content.exact_v.nbytes
    elements = 2 * loaded.num_layers * loaded.num_kv_heads * loaded.head_dim * exact.prefix
    return Size(
        key=size_key(loaded, name, exact.prefix),
        model=loaded.name,
        format=name,
        context=exact.prefix,
        stored=codec.bits_per_element(exact.prefix),
        sent=8 * sent / elements,
        stored_32k=_wide_bits(name),
    )


def _wide_bits(name: str) -> float | None:
    """Bits at 32k tokens and head_dim 128; None for a format bound to a model of another head_dim."""
    if name.startswith("basis"):
        return None
    return make_codec(name, WIDE).bits_per_element(LONG)


def measure_speed(loaded: LoadedModel, name: str, context: int, impl: str | None = None) -> Speed:
    """Attention of one new token over ``context`` stored ones, in turns with torch on as many layers of unpacked KV.

    The time is that of a layer. A fused kernel computes all layers, each with KV of its own that no cache of the
    processor holds any more when its turn comes again, as in a decode step; a reference path, slower by far, only
    one, unless a plan makes them differ. The peer is the faster of grouped matrix products in bfloat16 and in
    float32, its keys and values unpacked for free.
    """
    step, chosen, layers = _attention_step(loaded, name, context, impl)
    dtypes = (torch.bfloat16, torch.float32)
    peers = {f"torch matmul {str(dtype)[6:]}": _torch_step(loaded, context, dtype, layers) for dtype in dtypes}
    peer = min(peers, key=lambda name: min(_seconds(peers[name]) for _ in range(3)))
    times, ratios = [], []
    for _ in range(ROUNDS):
        mine, other = _seconds(step) / layers, _seconds(peers[peer]) / layers
        times.append(mine)
        ratios.append(other / mine)
    return Speed(
        key=speed_key(loaded, name, context, impl),
        model=loaded.name,
        format=name,
        impl=chosen,
        context=context,
        layers=layers,
        heads=f"{loaded.num_q_heads}/{loaded.num_kv_heads}x{loaded.head_dim}",
        microseconds=1e6 * statistics.median(times),
        ratios=[round(r, 4) for r in ratios],
        peer=peer,
        machine=machine(loaded),
    )


def machine(loaded: LoadedModel) -> str:
    """What computes, for a record."""
    device = loaded.model.device
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()}, {torch.get_num_threads()} threads"


def _random(loaded: LoadedModel, context: int) -> tuple[Tensor, Tensor, Tensor]:
    """``q [H, 1, D]``, ``k v [G, context, D]`` on the model's device."""
    generator, dim = torch.Generator().manual_seed(0), loaded.head_dim
    shapes = (loaded.num_q_heads, 1, dim), (loaded.num_kv_heads, context, dim), (loaded.num_kv_heads, context, dim)
    q, k, v = (torch.randn(shape, generator=generator).to(loaded.model.device) for shape in shapes)
    return q, k, v


def _torch_step(loaded: LoadedModel, context: int, dtype: torch.dtype, layers: int) -> Callable[[], object]:
    q, k, v = (x.to(dtype) for x in _random(loaded, context))
    rows = q.view(loaded.num_kv_heads, -1, loaded.head_dim) * loaded.head_dim**-0.5
    stored = [(k.clone(), v.clone()) for _ in range(layers)]
    return lambda: [torch.softmax((rows @ k.transpose(1, 2)).float(), -1).to(dtype) @ v for k, v in stored]


def _attention_step(
    loaded: LoadedModel, name: str, context: int, impl: str | None
) -> tuple[Callable[[], object], str, int]:
    """A call that attends in layers, who computes it, and how many they are."""
    codec = _computed(loaded, name)
    layers = _num_layers(loaded, codec, api.resolve_impl(codec, impl, loaded.model.device))
    cache = PagedCache(
        encoded_on_host(codec, impl, loaded.model.device),
        num_layers=layers,
        num_kv_heads=loaded.num_kv_heads,
        num_blocks=codec.num_pages(context) + 1,
        max_sequences=1,
        impl=impl,
        device=loaded.model.device,
    )
    sequence = cache.new_sequence(context)
    q, k, v = _random(loaded, context)
    for layer in range(layers):
        cache.append(layer, sequence, k, v)
    views, scale = [cache.view(layer, [sequence]) for layer in range(layers)], loaded.head_dim**-0.5

    def step() -> None:
        for view, layer_codec in zip(views, cache.codecs, strict=True):
            api.attend(q[None], view, layer_codec, scale, impl=cache.impl)

    return step, cache.impl, layers


def _num_layers(loaded: LoadedModel, codec: PageCodec, impl: str) -> int:
    """Layers that a step computes."""
    return 1 if impl == "reference" and not isinstance(codec, PerLayerCodec) else loaded.num_layers


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
