"""Formats of KV as bytes and costs: what crosses the link, what decode holds and reads, what it must do besides.

Names are those of ``--kv-cache-dtype`` where homkv has the format; the others are rivals (see `NAMES`).
"""

import re
from dataclasses import dataclass
from functools import cache
from typing import Literal

from homkv.errors import FormatError
from homkv.spec import MIN_WINDOW, NUM_SINKS, PAGE_TOKENS, PRESETS, RowsSpec

Prefill = Literal["exact", "int8", "faster"]

CORRECTION_SHARE = 250 / 800  # of HACK's instructions per token at Pi 64: corrections and softmax (SASS)
WITHOUT_SUMS = {"hack": 172 / 194.6, "hack-2026": 163 / 218.5}  # of the time: docs/log.md, 2026-11-26, H100
NAMES = (
    "fp16", "fp8", "cachegen", "cachegen-once", "kvquant", "kivi", "kivi-unfused", "hack", "hack-2026",
    *PRESETS,
)  # fmt: skip


@dataclass(frozen=True)
class KvFormat:
    """One format, for one head_dim.

    A sequence of n tokens holds, per kv head and layer, ``exact`` tokens of 4 D bytes and pages of ``page_bytes``:
    ``min_exact`` tokens never enter a page (sinks, window), the rest fills pages of ``page_tokens``.

    ``kernel``: whose measured times decode attention takes (homkv.sim.hardware.kernel), times ``kernel_factor``.
    ``unfused``: every step first restores all KV to 16 bits in memory, then attends to that. ``wire_ratio``: wire bytes
    over stored bytes, for entropy coding.
    ``packs``: prefill quantizes. ``requantizes``: the open block is quantized again at every step.
    ``prefill``: attention of the prompt is exact, or on 8-bit codes where the GPU multiplies them ("int8"), or that
    only where it is the faster of the two ("faster").
    """

    name: str
    head_dim: int
    page_tokens: int
    page_bytes: float
    min_exact: int = 0
    kernel: str = "fp16"
    kernel_factor: float = 1.0
    unfused: bool = False
    wire_ratio: float = 1.0
    packs: bool = True
    requantizes: bool = False
    prefill: Prefill = "exact"

    def stored_bytes(self, tokens: int) -> float:
        """Bytes of one kv head of one layer, everything counted."""
        pages = max(tokens - self.min_exact, 0) // self.page_tokens
        return pages * self.page_bytes + (tokens - pages * self.page_tokens) * 4 * self.head_dim

    def bytes_per_token(self) -> float:
        """Bytes per token and kv head of a long sequence."""
        return self.page_bytes / self.page_tokens


@cache
def make_format(name: str, head_dim: int) -> KvFormat:
    """A format by name. Raises FormatError for an unknown one, UnsupportedError for a head_dim it does not cover."""
    base, _, options = name.partition(":")
    exact = 4 * head_dim  # bytes of one token's K and V in 16 bits
    if name in ("fp16", "bf16"):
        return KvFormat(name, head_dim, 1, exact, packs=False)
    if name == "fp8":
        return KvFormat(name, head_dim, 1, exact / 2, kernel="fp8")
    if name in RIVALS:
        return _rival(name, head_dim)
    if base in ("hack", "hack-2026"):
        return _hack(name, base, options, head_dim)
    rows = base.removeprefix("dequant-")
    if options or (rows not in PRESETS and not re.fullmatch(r"k[0248]{4}v[0248]{4}", rows)):
        raise FormatError(f"expected a format out of {', '.join(NAMES)} or kABCDvEFGH, found {name!r}; see docs/sim.md")
    page_bytes = RowsSpec.parse(rows).layout(head_dim).page_bytes
    measured = "small" if rows in ("small", PRESETS["small"]) else "balanced"
    prefix = "dequant-" if base != rows else ""
    return KvFormat(name, head_dim, PAGE_TOKENS, page_bytes, NUM_SINKS + MIN_WINDOW, kernel=prefix + measured)


# Shares of the 16-bit bytes: measured by the authors of HACK on 4,096 tokens (artifact of 2026). KIVI by arithmetic:
# 2-bit codes, and a 16-bit scale and offset per 32 of them, 128 tokens exact.
RIVALS = ("cachegen", "cachegen-once", "kvquant", "kivi", "kivi-unfused")
CACHEGEN_STORED, CACHEGEN_SENT, KVQUANT_STORED = 0.273, 0.149, 0.146


def _rival(name: str, head_dim: int) -> KvFormat:
    exact = 4 * head_dim
    if name == "kvquant":
        return KvFormat(name, head_dim, 1, KVQUANT_STORED * exact, unfused=True)
    if name == "cachegen":
        ratio = CACHEGEN_SENT / CACHEGEN_STORED
        return KvFormat(name, head_dim, 1, CACHEGEN_STORED * exact, unfused=True, wire_ratio=ratio)
    if name == "cachegen-once":
        return KvFormat(name, head_dim, 1, exact, wire_ratio=CACHEGEN_SENT)
    return KvFormat(name, head_dim, 32, 32 * exact * 3 / 16, 128, kernel="kivi" if name == "kivi" else "fp16",
                    unfused=name == "kivi-unfused")  # fmt: skip


def _hack(name: str, base: str, options: str, head_dim: int) -> KvFormat:
    """Page bytes as docs/hack.md has them: codes, scales and minima, code sums."""
    values = {"pi": 64, "se": 1, "rqe": 1}
    prefill: Prefill = "faster" if base == "hack" else "exact"
    for option in filter(None, options.split(",")):
        key, _, text = option.partition("=")
        if base == "hack" and key == "prefill" and text in ("exact", "int8"):
            prefill = "int8" if text == "int8" else "exact"
            continue
        allowed = {"pi": ("32", "64", "128"), "se": ("0", "1"), "rqe": ("0", "1") if base == "hack" else ("1",)}
        if text not in allowed.get(key, ()):
            raise FormatError(
                f"expected options pi=32|64|128, se=0|1 and, of hack, rqe=0|1 and prefill=exact|int8, found {name!r}"
            )
        values[key] = int(text)
    pi, parts = values["pi"], max(1, head_dim // values["pi"])
    page_bytes = 2 * pi * head_dim // 4 + 4 * pi * parts + 4 * head_dim
    if values["se"]:
        page_bytes += pi * parts * _sum_bytes(head_dim // parts) + head_dim * _sum_bytes(pi)
    factor = 1 + CORRECTION_SHARE * (64 / pi - 1)
    factor *= 1.0 if values["se"] else WITHOUT_SUMS[base]
    factor *= (5376 / 64) / (page_bytes / pi) if head_dim == 128 else 1.0  # times are per token, not per byte
    return KvFormat(
        name,
        head_dim,
        pi,
        page_bytes,
        4 if base == "hack-2026" else 0,
        kernel=base,
        kernel_factor=factor,
        requantizes=not values["rqe"],
        prefill=prefill,
    )


def _sum_bytes(size: int) -> int:
    """A sum of ``size`` 2-bit codes fits a byte, or takes two."""
    return 1 if 3 * size <= 255 else 2
