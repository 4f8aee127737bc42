"""What a rows page is, in numbers: names, channel classes and byte offsets. Standard library only.

A **page** holds 64 tokens of one kv head of one layer. ``docs/format.md`` describes the bytes this
module computes; the CPU kernel, the GPU kernels and the wire all read the same ones.
"""

import re
from dataclasses import dataclass
from functools import cached_property, lru_cache

from homkv.errors import FormatError, UnsupportedError

FORMAT_VERSION = 1  # of the page bytes; any change of layout or meaning raises it
PAGE_TOKENS = 64
NUM_SINKS = 4
MIN_WINDOW = 64
WINDOWS = (64, 128, 192, 256)  # tokens that stay exact at least; a name without wN means MIN_WINDOW
HEAD_DIMS = (64, 80, 96, 128, 256)
DIGITS = (0, 2, 4, 8)
PAGE_ALIGN = 64  # bytes: a page starts on a cache line, so vector loads and DMA never straddle

PRESETS: dict[str, str] = {
    "small": "k4220v2222",
    "balanced": "k4420v2222",
    "quality": "k8420v4222",
    "near-lossless": "k8444v4444",
    "int8": "k8888v8888",
}
# The same pages behind a longer exact window, for contexts of 8k tokens and more (docs/decisions/0017).
LONG_PRESETS: dict[str, str] = {"small-long": "k4220v2222w192", "balanced-long": "k4420v2222w192"}
ALL_PRESETS = PRESETS | LONG_PRESETS
DEFAULT_FORMAT = "balanced"


@dataclass(frozen=True)
class ChannelClass:
    """Adjacent channel slots that share bits, one scale per token and one Hadamard rotation."""

    start: int  # first slot
    width: int  # slots
    bits: int  # 2, 4 or 8
    codes_offset: int  # bytes from the page's start
    scales_offset: int  # bytes from the page's start; 64 scales of one byte

    @property
    def stop(self) -> int:
        """One past the last slot."""
        return self.start + self.width

    @property
    def hadamard_block(self) -> int:
        """Largest power of two that divides the width: the size of one Hadamard block."""
        return self.width & -self.width

    @property
    def planes(self) -> int:
        """Codes per byte; a byte holds one channel of this many tokens."""
        return 8 // self.bits

    @property
    def lanes(self) -> int:
        """Tokens whose codes share a plane: 64 / planes."""
        return 8 * self.bits

    @property
    def code_bytes(self) -> int:
        """Bytes of this class's codes in one page."""
        return PAGE_TOKENS * self.width * self.bits // 8


@dataclass(frozen=True)
class PageLayout:
    """Byte offsets of one page: K codes, K scales, V codes, V scales, centre, padding."""

    head_dim: int
    k_classes: tuple[ChannelClass, ...]
    v_classes: tuple[ChannelClass, ...]
    centre_offset: int  # fp16[head_dim], slot order
    used_bytes: int
    page_bytes: int  # used_bytes rounded up to PAGE_ALIGN


@dataclass(frozen=True)
class RowsSpec:
    """Bits of the four quarters of K (slowest to fastest RoPE frequency) and of V, and the shortest exact window.

    The window decides which tokens become pages, not what a page is.
    """

    k_bits: tuple[int, int, int, int]
    v_bits: tuple[int, int, int, int]
    min_window: int = MIN_WINDOW

    def __post_init__(self) -> None:
        for bits in (self.k_bits, self.v_bits):
            if len(bits) != 4 or any(b not in DIGITS for b in bits):
                raise FormatError(f"expected four digits out of {DIGITS}, found {bits}; for example k4420v2222")
        if self.min_window not in WINDOWS:
            raise FormatError(
                f"expected a window out of {WINDOWS}, found {self.min_window}; for example k4420v2222w128"
            )

    @classmethod
    def parse(cls, name: str) -> "RowsSpec":
        """Read ``kABCDvEFGH``, ``kABCDvEFGHwN`` or a preset's name. Raises FormatError."""
        spelling = ALL_PRESETS.get(name, name)
        match = re.fullmatch(r"k([0248]{4})v([0248]{4})(?:w([1-9][0-9]{0,4}))?", spelling)
        if match is None:
            raise FormatError(
                f"expected a preset ({', '.join(ALL_PRESETS)}) or kABCDvEFGH[wN] with digits 0, 2, 4, 8, found "
                f"{name!r}; `homkv formats` lists all formats"
            )
        k, v = (tuple(int(d) for d in group) for group in match.groups()[:2])
        return cls(k, v, int(match[3] or MIN_WINDOW))  # type: ignore[arg-type]  # the pattern fixes the length

    @cached_property
    def name(self) -> str:
        """``kABCDvEFGH``, with ``wN`` for another window than the usual one."""
        window = "" if self.min_window == MIN_WINDOW else f"w{self.min_window}"
        return "k" + "".join(map(str, self.k_bits)) + "v" + "".join(map(str, self.v_bits)) + window

    def layout(self, head_dim: int) -> PageLayout:
        """Byte offsets for one head_dim. Raises UnsupportedError if the head_dim is not covered."""
        return _layout(self, head_dim)


def class_widths(bits: tuple[int, ...], quarter: int) -> list[tuple[int, int, int]]:
    """Split runs of equal digits into classes: ``(start, width, bits)``, 0-bit quarters left out.

    A run of n quarters becomes powers of two from the largest (3 = 2 + 1), so that one Hadamard
    rotation covers as much as it can.
    """
    out, at = [], 0
    while at < len(bits):
        run = 1
        while at + run < len(bits) and bits[at + run] == bits[at]:
            run += 1
        size = 1 << (run.bit_length() - 1)
        if bits[at]:
            out.append((at * quarter, size * quarter, bits[at]))
        at += size
    return out


@lru_cache(maxsize=4096)
def _layout(spec: RowsSpec, head_dim: int) -> PageLayout:
    if head_dim not in HEAD_DIMS:
        raise UnsupportedError(
            f"expected head_dim in {HEAD_DIMS}, found {head_dim}; use --kv-cache-dtype fp16 for this model"
        )
    offset = 0

    def place(bits: tuple[int, ...]) -> tuple[ChannelClass, ...]:
        nonlocal offset
        widths = class_widths(bits, head_dim // 4)
        scales = offset + sum(PAGE_TOKENS * w * b // 8 for _, w, b in widths)
        classes = []
        for i, (start, width, b) in enumerate(widths):
            classes.append(ChannelClass(start, width, b, offset, scales + i * PAGE_TOKENS))
            offset += classes[-1].code_bytes
        offset = scales + len(widths) * PAGE_TOKENS
        return tuple(classes)

    k_classes, v_classes = place(spec.k_bits), place(spec.v_bits)
    used = offset + 2 * head_dim
    return PageLayout(head_dim, k_classes, v_classes, offset, used, -(-used // PAGE_ALIGN) * PAGE_ALIGN)
