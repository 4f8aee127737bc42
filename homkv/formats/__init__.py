"""Stored forms by name: the one place that turns ``--kv-cache-dtype`` into a codec."""

from collections.abc import Sequence

from homkv.errors import FormatError
from homkv.formats.base import EIGHT_BIT, UNROUNDED, PageCodec, Rounding
from homkv.formats.exact import EXACT_DTYPES, ExactCodec
from homkv.formats.hack import HackCodec, HackOptions
from homkv.formats.hack2026 import Hack2026Codec, Hack2026Options
from homkv.formats.rows import RowsCodec
from homkv.spec import PRESETS, RowsSpec

__all__ = ["EIGHT_BIT", "UNROUNDED", "PageCodec", "Rounding", "format_names", "make_codec"]


def format_names() -> tuple[str, ...]:
    """Names that `homkv formats` lists; any ``kABCDvEFGH`` and any ``hack:key=value,...`` works as well."""
    return (*PRESETS, "hack", "hack-2026", *EXACT_DTYPES)


def parse_options(name: str) -> tuple[str, dict[str, str]]:
    """Split ``base:key=value,key=value``. Raises FormatError."""
    base, _, tail = name.partition(":")
    options: dict[str, str] = {}
    for item in filter(None, tail.split(",")):
        key, equals, value = item.partition("=")
        if not equals:
            raise FormatError(f"expected options as {base}:key=value,key=value, found {item!r} in {name!r}")
        options[key.strip()] = value.strip()
    return base, options


def make_codec(name: str, head_dim: int, channel_order: Sequence[int] | None = None) -> PageCodec:
    """Bind a format to a head.

    ``name``: a preset (``balanced``), ``kABCDvEFGH``, ``hack[:options]``, ``hack-2026[:options]``, ``fp16``, ``bf16``.
    ``channel_order``: slot -> channel from RopeSpec.channel_order(); None keeps the natural order.
    Raises FormatError for an unknown name, UnsupportedError for a head_dim the format does not cover.
    """
    base, options = parse_options(name)
    if base == "hack":
        return HackCodec(head_dim, HackOptions.parse(options))
    if base == "hack-2026":
        return Hack2026Codec(head_dim, Hack2026Options.parse(options))
    if options:
        raise FormatError(f"expected no options for {base!r}, found {options}; only hack and hack-2026 have switches")
    if base in EXACT_DTYPES:
        return ExactCodec(head_dim, base)
    if base not in PRESETS and not base.startswith("k"):
        known = ", ".join(format_names())
        raise FormatError(f"expected one of {known} or kABCDvEFGH, found {name!r}; see `homkv formats`")
    return RowsCodec(head_dim, RowsSpec.parse(base), channel_order)
