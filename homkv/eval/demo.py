"""The main job, measured: one prompt through two processes, with 16-bit KV and with pages, over the same link."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from homkv.errors import ShapeError
from homkv.eval.compare import Agreement, agreement
from homkv.serve.client import Answer, Client, Query

EXACT = "fp16"


@dataclass(frozen=True)
class Listener:
    """What a caller may want to know while a run goes on."""

    on_run: Callable[[str], None] = lambda name: None
    on_layer: Callable[[int], None] = lambda layers: None
    on_token: Callable[[int], None] = lambda token: None


@dataclass(frozen=True)
class Run:
    """One format's side of the comparison; the fields of a row of machine-readable output."""

    kv_cache_dtype: str
    tokens: list[int]
    text: str
    ttft_s: float
    phases_s: dict[str, float]  # on the critical path; sums to ttft_s
    busy_s: dict[str, float]  # pack, send, verify, hidden or not
    tpot_s: float
    num_prompt_tokens: int
    raw_kv_bytes: int  # the prompt's KV in 16 bits
    wire_bytes: int  # everything that crossed the link for it
    kv_bytes: int  # in the decode instance at the end: prompt and answer
    bits_per_element: float  # on the wire, sinks, window and frame heads counted


@dataclass(frozen=True)
class Comparison:
    """The demo's result."""

    model: str
    link_gbps: float | None
    exact: Run
    compressed: Run
    agreement: Agreement

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def compare(
    client: Client,
    decode_text: Callable[[list[int]], str],
    prompt_ids: list[int],
    *,
    model: str,
    kv_cache_dtype: str,
    max_new_tokens: int,
    link_gbps: float | None,
    listener: Listener,
) -> Comparison:
    """Answer a prompt with 16-bit KV and with ``kv_cache_dtype``, then score the latter on the former's text.

    Both timed runs return their logits, so both pay for it alike. The third run feeds the exact answer. Raises what
    ``Client.generate`` raises, and ShapeError if the exact model answers with less than two tokens.
    """

    def ask(title: str, name: str, **extra: Any) -> Answer:
        listener.on_run(title)
        length = len(extra.get("forced_ids") or ()) or max_new_tokens
        query = Query(prompt_ids, name, length, return_logits=True, **extra)
        return client.generate(query, on_layer=listener.on_layer, on_token=listener.on_token)

    for name in (EXACT, kv_cache_dtype):  # the first pass over a prompt of this length pays for memory and threads
        listener.on_run(f"warming up {name}")
        warm_up = Query(prompt_ids, name, 4, return_logits=True)
        client.generate(warm_up, on_layer=listener.on_layer, on_token=listener.on_token)
    exact = ask("16-bit KV", EXACT)
    if len(exact.tokens) < 2:
        raise ShapeError(
            f"expected an answer of two tokens or more to compare, found {len(exact.tokens)}: the model stopped at "
            "once; ask another question"
        )
    compressed = ask(kv_cache_dtype, kv_cache_dtype)
    forced = ask(f"{kv_cache_dtype} on the exact text", kv_cache_dtype, forced_ids=exact.tokens)
    runs = [_run(a, n, decode_text, len(prompt_ids)) for a, n in ((exact, EXACT), (compressed, kv_cache_dtype))]
    scores = agreement(exact.tokens, compressed.tokens, _logits(exact), _logits(forced))
    return Comparison(model, link_gbps, runs[0], runs[1], scores)


def _logits(answer: Answer) -> NDArray[np.float32]:
    """Logits ``[N - 1, V]`` of all tokens but the first, which the prefill instance computed exactly."""
    rows = [row for row in answer.logits if row is not None]
    return np.stack(rows) if rows else np.empty((0, 0), np.float32)


def _run(answer: Answer, name: str, decode_text: Callable[[list[int]], str], num_prompt_tokens: int) -> Run:
    assert answer.prefill is not None  # generate() returns finished answers only
    done, times = answer.prefill, answer.prefill.times
    busy = {"pack": times.pack_busy_s, "send": times.send_busy_s, "verify": times.verify_busy_s}
    return Run(
        kv_cache_dtype=name,
        tokens=answer.tokens,
        text=decode_text(answer.tokens),
        ttft_s=answer.ttft_s,
        phases_s=answer.phases_s(),
        busy_s=busy,
        tpot_s=answer.tpot_s,
        num_prompt_tokens=num_prompt_tokens,
        raw_kv_bytes=done.raw_bytes,
        wire_bytes=done.wire_bytes,
        kv_bytes=answer.kv_bytes,
        bits_per_element=16 * done.wire_bytes / done.raw_bytes,
    )
