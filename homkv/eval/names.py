"""What people read for a format: plans are spelled out in records, which nobody wants to see in a table."""

from functools import cache

from homkv.eval.sizes import LONG, WIDE
from homkv.formats import make_codec, parse_options
from homkv.plan import BASE as PER_LAYER
from homkv.plan import LayerPlan


@cache
def shown(name: str) -> str:
    """A format as tables name it: a plan by bits at 32k, window and the end of its title."""
    base, options = parse_options(name)
    if base == "basis":
        return base  # its tables are this model's
    if base != PER_LAYER:
        return name
    codec = make_codec(name, WIDE)
    return f"plan {codec.bits_per_element(LONG):.2f} w{codec.min_window} {LayerPlan.from_options(options).title[-6:]}"
