"""Encode and attend with an explicit implementation. Validates; never falls back in silence."""

import torch
from torch import Tensor

from homkv.attention import cpu, reference
from homkv.attention.prefill import causal, causal_partial
from homkv.attention.view import LayerView, check_query
from homkv.errors import ShapeError, UnsupportedError
from homkv.formats.base import PageCodec
from homkv.formats.hack import HackCodec
from homkv.formats.hack2026 import Hack2026Codec
from homkv.formats.hack_prefill import quantized_prefill
from homkv.formats.rows import RowsCodec

CPU = torch.device("cpu")


def resolve_impl(codec: PageCodec, impl: str | None, device: torch.device = CPU) -> str:
    """Name of the implementation to use on ``device``; None means the format's first that runs there.

    Raises UnsupportedError if the format has no such implementation, its native library or Triton is missing, or it
    does not run on the device.
    """
    first = "cpu" if device.type == "cpu" else "triton"
    chosen = impl or (first if first in codec.impls else "reference")
    if chosen not in codec.impls:
        raise UnsupportedError(
            f"expected impl in {codec.impls} for {codec.name}, found {chosen!r}; choose one of these or another format"
        )
    if chosen == "cpu":
        if device.type != "cpu":
            raise UnsupportedError(f"expected tensors on the CPU for impl='cpu', found {device}; use impl='triton'")
        cpu.require()
    if chosen == "triton":
        from homkv.attention.triton import runtime  # Triton is optional

        runtime.require()
        runtime.check_device(device)
    return chosen


def encode(
    codec: PageCodec,
    k: Tensor,
    v: Tensor,
    first_position: int = 0,
    *,
    impl: str | None = None,
    status: Tensor | None = None,
) -> Tensor:
    """Quantize and pack whole pages: ``k v [G, N * page_tokens, D]`` to ``[N, G, P] uint8``.

    ``first_position``: absolute position of the first token (keys stochastic rounding). All implementations
    give the same bytes. Raises ShapeError, FormatError (values that the format cannot hold).
    ``status [1] int32``: a kernel on a GPU sets it instead of raising FormatError, so that nothing is read back.
    """
    codec.check_tokens(k, v)
    chosen = resolve_impl(codec, impl, k.device)
    if isinstance(codec, RowsCodec) and chosen == "cpu":
        return cpu.encode(k, v, codec.layout, codec.order)
    if isinstance(codec, RowsCodec) and chosen == "triton":
        from homkv.attention.triton import encode as kernels

        return kernels.encode(k, v, codec.layout, codec.order, status=status)
    if isinstance(codec, HackCodec | Hack2026Codec) and chosen == "triton":
        from homkv.attention.triton import hack_encode

        return hack_encode.encode(k, v, codec, first_position, status=status)
    return codec.encode(k, v, first_position).transpose(0, 1).contiguous()


def attend(
    q: Tensor, view: LayerView, codec: PageCodec, softmax_scale: float, *, impl: str | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of ``q [B, H, T, D]`` over all tokens of the view, computed on the pages' codes.

    Returns ``o [B, H, T, D] float32`` and ``lse [B, H, T] float32`` (natural log; -inf where nothing is stored).
    ``impl``: "cpu" (C++), "triton" (GPU), "reference" (torch); None takes the format's first on q's device.
    Raises ShapeError, DTypeError, UnsupportedError.
    """
    chosen = resolve_impl(codec, impl, q.device)
    if chosen == "cpu":
        assert isinstance(codec, RowsCodec)
        return cpu.attend(q, view, codec.layout, codec.order, softmax_scale)  # checks for itself
    if chosen == "triton":
        from homkv.attention import triton  # Triton is optional

        return triton.attend(q, view, codec, softmax_scale)
    check_query(q, view.slots.shape[0], view.pool.shape[1], codec.head_dim, view.pool.device)
    check_pool(view, codec)
    return reference.attend(q, view, codec, softmax_scale)


def extend(
    q: Tensor, k: Tensor, v: Tensor, view: LayerView, codec: PageCodec, softmax_scale: float, *, impl: str | None = None
) -> Tensor:
    """Attention of new tokens to what is stored and, causally, to each other: ``[B, H, T, D]`` in q's dtype.

    ``q [B, H, T, D]``, ``k v [B, G, T, D]``: the new tokens, not yet in the view. Raises as :func:`attend` does.
    """
    chosen = resolve_impl(codec, impl, q.device)
    if isinstance(codec, RowsCodec) and chosen == "triton":
        from homkv.attention.triton import extend as kernels

        return kernels.extend(q, k, v, view, codec, softmax_scale).to(q.dtype)
    old, old_lse = _attend_many(q, view, codec, softmax_scale, chosen)
    new, new_lse = causal_partial(q, k, v, softmax_scale)
    return reference.merge_partials(old, old_lse, new, new_lse)[0].to(q.dtype)


def _attend_many(
    q: Tensor, view: LayerView, codec: PageCodec, softmax_scale: float, impl: str
) -> tuple[Tensor, Tensor]:
    """:func:`attend` for any number of tokens: the decode kernels take a few rows per kv head, one call after another.

    Only HACK's formats come here with many tokens on a GPU; they have no kernel for extension.
    """
    at_once = q.shape[2]
    if impl == "triton":
        from homkv.attention.triton.checks import MAX_ROWS  # Triton is optional

        at_once = MAX_ROWS * view.pool.shape[1] // q.shape[1]
    if q.shape[2] <= at_once or at_once == 0:
        return attend(q, view, codec, softmax_scale, impl=impl)
    parts = [attend(x, view, codec, softmax_scale, impl=impl) for x in q.split(at_once, 2)]
    return torch.cat([o for o, _ in parts], 2), torch.cat([lse for _, lse in parts], 2)


def prefill(
    codec: PageCodec, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, *, impl: str | None = None
) -> Tensor:
    """Causal attention of a whole prompt, ``q [B, H, T, D]``, ``k v [B, G, T, D]``, in q's dtype.

    Exact, unless the format quantizes its prefill as well (``hack:prefill=int8``). Raises as :func:`attend` does.
    """
    if computes_quantized_prefill(codec):
        assert isinstance(codec, HackCodec)
        if resolve_impl(codec, impl, q.device) == "triton":
            from homkv.attention.triton.hack_prefill import hack_prefill

            return hack_prefill(q, k, v, codec, softmax_scale)
        return quantized_prefill(q.float(), k.float(), v.float(), codec, softmax_scale).to(q.dtype)
    return causal(q, k, v, softmax_scale)


def computes_quantized_prefill(codec: PageCodec) -> bool:
    """Whether a format's prompts attend to quantized keys and values: only HACK's ablation does."""
    return isinstance(codec, HackCodec) and codec.options.prefill == "int8"


def check_pool(view: LayerView, codec: PageCodec) -> None:
    """Raise ShapeError unless the view's pages are this codec's."""
    if view.pool.dtype != torch.uint8 or view.pool.shape[-1] != codec.page_bytes:
        raise ShapeError(
            f"expected a pool of uint8 pages of {codec.page_bytes} bytes ({codec.name}), found {view.pool.dtype} "
            f"{tuple(view.pool.shape)}; was the cache built for another format?"
        )
