"""Stored forms by name: the one place that turns ``--kv-cache-dtype`` into a codec."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from homkv.errors import FormatError
from homkv.formats.base import EIGHT_BIT, UNROUNDED, PageCodec, Rounding
from homkv.formats.basis import BasisCodec, BasisTables
from homkv.formats.cachegen import CachegenCodec, CachegenOptions
from homkv.formats.decoquant import DecoquantCodec, DecoquantOptions
from homkv.formats.exact import EXACT_DTYPES, ExactCodec
from homkv.formats.fp8 import Fp8Codec
from homkv.formats.hack import HackCodec, HackOptions
from homkv.formats.hack2026 import Hack2026Codec, Hack2026Options
from homkv.formats.kivi import KiviCodec, KiviOptions
from homkv.formats.kvquant import KvquantCodec, KvquantOptions
from homkv.formats.per_layer import PerLayerCodec
from homkv.formats.rows import RowsCodec
from homkv.formats.turbo import TurboCodec, TurboOptions
from homkv.plan import BASE as PER_LAYER
from homkv.plan import LayerPlan
from homkv.rope import RopeSpec
from homkv.spec import ALL_PRESETS, RowsSpec

__all__ = ["EIGHT_BIT", "UNROUNDED", "PageCodec", "Rounding", "format_names", "make_codec"]

Switches = Mapping[str, str]
Channels = RopeSpec | Sequence[int] | None

WITH_OPTIONS: dict[str, Callable[[int, Switches, Channels], PageCodec]] = {
    "hack": lambda head_dim, options, _: HackCodec(head_dim, HackOptions.parse(options)),
    "hack-2026": lambda head_dim, options, _: Hack2026Codec(head_dim, Hack2026Options.parse(options)),
    "kivi": lambda head_dim, options, _: KiviCodec(head_dim, KiviOptions.parse(options)),
    "kvquant": lambda head_dim, options, rope: KvquantCodec(head_dim, KvquantOptions.parse(options), rotation(rope)),
    PER_LAYER: lambda head_dim, options, rope: PerLayerCodec(head_dim, LayerPlan.from_options(options), order_of(rope)),
    "cachegen": lambda head_dim, options, _: CachegenCodec(head_dim, CachegenOptions.parse(options)),
    "turbo": lambda head_dim, options, _: TurboCodec(head_dim, TurboOptions.parse(options)),
    "decoquant": lambda head_dim, options, _: DecoquantCodec(head_dim, DecoquantOptions.parse(options)),
    "basis": lambda head_dim, options, _: BasisCodec(head_dim, BasisTables.load(basis_path(options))),
}
LISTED = (
    "hack",
    "hack-2026",
    "kivi",
    "kivi:bits=4",
    "kvquant",
    "kvquant:bits=3",
    "cachegen",
    "cachegen:as=published",
    "turbo",
    "turbo:bits=3",
    "decoquant",
)


def basis_path(options: Switches) -> Path:
    """Where the tables of ``basis`` are. Raises FormatError."""
    if set(options) != {"file"}:
        raise FormatError(f"expected basis:file=PATH, found options {dict(options)}; `homkv basis` makes the file")
    return Path(options["file"])


def rotation(rope: Channels) -> RopeSpec | None:
    """The RopeSpec, for a format that undoes the rotation. Raises FormatError for a mere order of channels."""
    if rope is None or isinstance(rope, RopeSpec):
        return rope
    raise FormatError("expected a RopeSpec for a format that stores keys before RoPE, found an order of channels")


def order_of(rope: Channels) -> Sequence[int] | None:
    """Slot -> channel, from the slowest to the fastest RoPE pair; None: the natural order."""
    return rope.channel_order() if isinstance(rope, RopeSpec) else rope


def format_names() -> tuple[str, ...]:
    """Names that `homkv formats` lists; any ``kABCDvEFGH`` and any ``name:key=value,...`` works as well."""
    return (*ALL_PRESETS, *LISTED, "fp8", *EXACT_DTYPES)


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


def make_codec(name: str, head_dim: int, rope: Channels = None) -> PageCodec:
    """Bind a format to a head.

    ``name``: a preset (``balanced``), ``kABCDvEFGH``, a name of `homkv formats`, with ``:options`` where it has some,
    or a plan's spelling (homkv.plan), which is for one model (see require_model).
    ``rope``: how the model rotates its keys, or only the order of channels (slot -> channel) that follows from it;
    None: not at all. Raises FormatError for an unknown name, or for a format that undoes the rotation and is given an
    order; UnsupportedError for a head_dim the format does not cover.
    """
    base, options = parse_options(name)
    if base in WITH_OPTIONS:
        return WITH_OPTIONS[base](head_dim, options, rope)
    if options:
        raise FormatError(f"expected no options for {base!r}, found {options}; {', '.join(WITH_OPTIONS)} have some")
    if base in EXACT_DTYPES:
        return ExactCodec(head_dim, base)
    if base == "fp8":
        return Fp8Codec(head_dim)
    if base not in ALL_PRESETS and not base.startswith("k"):
        known = ", ".join(format_names())
        raise FormatError(f"expected one of {known} or kABCDvEFGH, found {name!r}; see `homkv formats`")
    return RowsCodec(head_dim, RowsSpec.parse(base), order_of(rope))
