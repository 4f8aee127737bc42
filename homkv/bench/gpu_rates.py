"""Rates beside decode: quantize and pack, prefill, and extension over pages. Checked first, then timed in turns."""

import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from homkv.attention import api, reference
from homkv.attention.prefill import causal, causal_partial
from homkv.attention.view import LayerView
from homkv.bench.cpu import LARGE_MODEL
from homkv.bench.gpu_candidates import DTYPE, INTEGER_TOLERANCE, Case, codec_for, random_view, relative_norm
from homkv.bench.gpu_clock import Replay, measure
from homkv.bench.gpu_stats import spread, tera_per_second
from homkv.errors import FormatError
from homkv.formats.base import PageCodec
from homkv.formats.hack import HackCodec, HackOptions
from homkv.formats.hack2026 import Hack2026Codec, Hack2026Options
from homkv.formats.hack_prefill import quantized_prefill
from homkv.formats.rows import RowsCodec
from homkv.testing.inputs import make_view

PACK_TOKENS = 131072  # keys and values of 8 heads: more than any L2 cache
PREFILL_TOKENS = (4096, 16384, 32768)
EXTEND_OLD = 16384
EXTEND_NEW = (2048, 16384)
SHAPE = LARGE_MODEL
SCALE = SHAPE.head_dim**-0.5
TIE_FRACTION = 1e-3  # of the bytes may differ from the reference by a rounding tie

Calls = dict[str, Callable[[], object]]


def rate_rows(format_name: str, device: torch.device, rounds: int) -> Iterator[dict[str, Any]]:
    """All rates of one format. What fails becomes a row with the reason."""
    codec = codec_for(format_name, SHAPE.head_dim)
    if not isinstance(codec, RowsCodec):
        raise FormatError(f"expected a rows format, found {format_name!r}; name small or balanced first")
    yield from pack_rows(codec, device, rounds)
    yield from prefill_rows(device, rounds)
    yield from extend_rows(codec, device, rounds)


def timed(kind: str, size: str, calls: Calls, amount: dict[str, float], rounds: int) -> Iterator[dict[str, Any]]:
    """Rows of calls that take turns; ``amount``: bytes or operations of one call."""
    samplers: dict[str, Callable[[], float]] = {}
    for name, call in calls.items():
        try:
            samplers[name] = Replay([call])
        except Exception as problem:  # a rival's refusal must not end the run
            yield failed(kind, size, name, problem)
    times = measure(samplers, rounds)
    for name, samples in times.items():
        us = statistics.median(samples)
        yield {
            "kind": kind, "shape": str(SHAPE), "size": size, "candidate": name, "status": "ok", "us": us,
            "spread": spread(samples), "rounds": rounds, "amount": amount[name],
            "rate": tera_per_second(amount[name], us),
        }  # fmt: skip


def failed(kind: str, size: str, name: str, problem: Exception) -> dict[str, Any]:
    """Row without a time."""
    lines = str(problem).strip().splitlines() or [""]
    reason = f"{type(problem).__name__}: {lines[0][:160]}"
    return {"kind": kind, "shape": str(SHAPE), "size": size, "candidate": name, "status": "failed", "reason": reason}


def right(o: Tensor, exact: Tensor) -> None:
    """Raise FormatError if the result is not attention within the tolerance of int8 arithmetic."""
    error = relative_norm(o, exact)
    if not error <= INTEGER_TOLERANCE:
        raise FormatError(f"expected a relative error up to {INTEGER_TOLERANCE}, found {error:.2g}")


# -- quantize and pack -------------------------------------------------------------------------------------------


def pack_rows(codec: RowsCodec, device: torch.device, rounds: int) -> Iterator[dict[str, Any]]:
    """Keys and values of one layer, 16 bits, to pages: of the format and of both of HACK's."""
    size = f"{PACK_TOKENS:,} x {SHAPE.num_kv_heads} heads"
    shape = SHAPE.num_kv_heads, PACK_TOKENS, SHAPE.head_dim
    k, v = (torch.empty(shape, dtype=DTYPE, device=device).normal_() for _ in "kv")
    calls: Calls = {}
    amount: dict[str, float] = {}
    for other in (codec, codec_for("hack", SHAPE.head_dim), codec_for("hack-2026", SHAPE.head_dim)):
        name = f"homkv {other.name}"
        try:
            calls[name] = packing(other, k, v)
        except Exception as problem:
            yield failed("pack", size, name, problem)
        amount[name] = k.nbytes + v.nbytes + PACK_TOKENS // other.page_tokens * SHAPE.num_kv_heads * other.page_bytes
    yield from timed("pack", size, calls, amount, rounds)


def packing(codec: PageCodec, k: Tensor, v: Tensor) -> Callable[[], object]:
    """The format's kernel on ``k v [G, T, D]``, after a check on a few pages."""
    status = torch.zeros(1, dtype=torch.int32, device=k.device)
    check_pack(codec, api.encode, status)
    return lambda: api.encode(codec, k, v, impl="triton", status=status)


def check_pack(codec: PageCodec, encode: Callable[..., Tensor], status: Tensor) -> None:
    """Raise FormatError unless a few pages have the reference's bytes, rounding ties aside."""
    k, v = (torch.randn(2, 4 * codec.page_tokens, codec.head_dim).to(DTYPE) for _ in "kv")
    found = encode(codec, k.to(status.device), v.to(status.device), impl="triton", status=status).cpu()
    expected = codec.encode(k, v).transpose(0, 1)
    different = float((found != expected).float().mean())
    if different > TIE_FRACTION:
        raise FormatError(f"expected the reference's bytes, found {different:.2%} of them different")


# -- prefill -----------------------------------------------------------------------------------------------------


def prefill_rows(device: torch.device, rounds: int) -> Iterator[dict[str, Any]]:
    """Causal attention of one prompt: int8, on HACK's codes, and PyTorch's backends."""
    for tokens in PREFILL_TOKENS:
        q, k, v = random_prompt(tokens, device)
        operations = 2.0 * tokens * tokens * SHAPE.head_dim * SHAPE.num_q_heads  # both products, half of the square
        calls: Calls = {f"sdpa {backend}": sdpa_causal(q, k, v, backend) for backend in ("flash", "cudnn")}
        for name, prepare in {"homkv int8": int8_causal, "hack": hack_causal, "hack-2026": hack_2026_causal}.items():
            try:
                calls[name] = prepare(q, k, v)
            except Exception as problem:
                yield failed("prefill", f"{tokens:,}", name, problem)
        yield from timed("prefill", f"{tokens:,}", calls, dict.fromkeys(calls, operations), rounds)


def random_prompt(tokens: int, device: torch.device, new: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """``q [1, H, new, D]``, ``k v [1, G, tokens, D]``."""
    q = torch.randn(1, SHAPE.num_q_heads, new or tokens, SHAPE.head_dim, device=device).to(DTYPE)
    k, v = (torch.randn(1, SHAPE.num_kv_heads, tokens, SHAPE.head_dim, device=device).to(DTYPE) for _ in "kv")
    return q, k, v


def sdpa_causal(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Callable[[], object]:
    """PyTorch's causal attention."""
    from homkv.bench.peers import sdpa

    return lambda: sdpa.attend(q, k, v, SCALE, backend, is_causal=True)


def int8_causal(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], object]:
    """Our int8 prefill, after a check on the first tokens."""
    from homkv.attention.triton.prefill import causal_int8

    some_q, some_k, some_v = (x[:, :, :512].contiguous() for x in (q, k, v))
    exact = causal(some_q.double().cpu(), some_k.double().cpu(), some_v.double().cpu(), SCALE)
    right(causal_int8(some_q, some_k, some_v, SCALE), exact)
    return lambda: causal_int8(q, k, v, SCALE)


def hack_causal(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], object]:
    """HACK's prefill on 2-bit codes, after a check on the first tokens against its readable form."""
    from homkv.attention.triton.hack_prefill import hack_prefill

    codec = HackCodec(SHAPE.head_dim, HackOptions(prefill="int8"))
    some_q, some_k, some_v = (x[:, :, :512].contiguous() for x in (q, k, v))
    readable = quantized_prefill(some_q.cpu().float(), some_k.cpu().float(), some_v.cpu().float(), codec, SCALE)
    right(hack_prefill(some_q, some_k, some_v, codec, SCALE), readable)
    return lambda: hack_prefill(q, k, v, codec, SCALE)


def hack_2026_causal(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], object]:
    """The algebra of hack-2026 as a prefill, checked at 8 bits: at 2 the error is the format's."""
    from homkv.attention.triton.hack2026_prefill import hack2026_prefill

    some_q, some_k, some_v = (x[:, :, :512].contiguous() for x in (q, k, v))
    exact = causal(some_q.double().cpu(), some_k.double().cpu(), some_v.double().cpu(), SCALE)
    eight = Hack2026Codec(SHAPE.head_dim, Hack2026Options(bits=8))
    right(hack2026_prefill(some_q, some_k, some_v, eight, SCALE), exact)
    codec = Hack2026Codec(SHAPE.head_dim)
    return lambda: hack2026_prefill(q, k, v, codec, SCALE)


# -- extension ---------------------------------------------------------------------------------------------------


def extend_rows(codec: RowsCodec, device: torch.device, rounds: int) -> Iterator[dict[str, Any]]:
    """New tokens over a stored context, and beside them cuDNN over as many old tokens in 16 bits, without a mask."""
    name = f"homkv {codec.name}"
    for new in EXTEND_NEW:
        size = f"{new:,} over {EXTEND_OLD:,}"
        q, k, v = random_prompt(new, device)
        _, old_k, old_v = random_prompt(EXTEND_OLD, device, new=1)
        flat = 4.0 * SHAPE.head_dim * SHAPE.num_q_heads * new
        amount = {name: flat * (EXTEND_OLD + new / 2), "sdpa cudnn, old only": flat * EXTEND_OLD}
        calls: Calls = {"sdpa cudnn, old only": sdpa_all(q, old_k, old_v)}
        try:
            calls[name] = extension(codec, q, k, v, device)
        except Exception as problem:
            yield failed("extend", size, name, problem)
        yield from timed("extend", size, calls, amount, rounds)


def sdpa_all(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], object]:
    """PyTorch's attention of every query to every key."""
    from homkv.bench.peers import sdpa

    return lambda: sdpa.attend(q, k, v, SCALE, "cudnn")


def extension(codec: RowsCodec, q: Tensor, k: Tensor, v: Tensor, device: torch.device) -> Callable[[], object]:
    """Our extension, after a check on a small case."""
    from homkv.attention.triton.extend import extend

    small = make_view(codec, [400], SHAPE.num_kv_heads, exact_dtype=DTYPE)
    there = LayerView(**{name: x.to(device) for name, x in vars(small).items()})
    some_q, some_k, some_v = (x[:, :, :100].contiguous() for x in (q, k, v))
    old = reference.oracle(some_q.cpu(), small, codec, SCALE)
    new = causal_partial(some_q.cpu(), some_k.cpu(), some_v.cpu(), SCALE)
    right(extend(some_q, some_k, some_v, there, codec, SCALE), reference.merge_partials(*old, *new)[0])
    view = random_view(codec, Case(SHAPE, 1, EXTEND_OLD), device)
    return lambda: extend(q, k, v, view, codec, SCALE)
