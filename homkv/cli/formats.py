"""``homkv formats``: what every stored form costs, everything counted."""

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from homkv.errors import ShapeError, UnsupportedError
from homkv.spec import ALL_PRESETS, DEFAULT_FORMAT

if TYPE_CHECKING:
    from homkv.formats import PageCodec


@dataclass(frozen=True)
class FormatCost:
    """One row of the table."""

    name: str
    layout: str  # names the bytes
    bits_per_element: float  # held by decode: pages, sinks and window
    sent_bits_per_element: float  # on the wire; with an entropy coder, an upper bound
    is_packed: bool  # by an entropy coder: what is sent depends on the data
    page_tokens: int
    page_bytes: int  # one page: one kv head of one layer
    bytes_per_token: float  # of one kv head, K and V, at this context
    ratio_to_fp16: float


def cost(codec: "PageCodec", name: str, context: int) -> FormatCost:
    """Count a format's bytes for one sequence of ``context`` tokens."""
    stored = codec.kv_bytes(context)
    return FormatCost(
        name=name,
        layout=ALL_PRESETS.get(name, codec.layout_id),
        bits_per_element=codec.bits_per_element(context),
        sent_bits_per_element=4 * codec.wire_bytes(context) / (codec.head_dim * context),
        is_packed=codec.coder is not None,
        page_tokens=codec.page_tokens,
        page_bytes=codec.page_bytes,
        bytes_per_token=stored / context,
        ratio_to_fp16=stored / (4 * codec.head_dim * context),
    )


def formats(
    head_dim: Annotated[int, typer.Option(help="Channels of one head.")] = 128,
    context: Annotated[int, typer.Option(help="Tokens of the sequence; sinks and window weigh less in a long one.")] = (
        32_768
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of the table.")] = False,
) -> None:
    """List every format of --kv-cache-dtype with its true size."""
    if context < 1:
        raise ShapeError(f"expected --context of at least 1 token, found {context}; a typical one is 32768")
    if head_dim < 1:
        raise ShapeError(f"expected --head-dim of at least 1 channel, found {head_dim}; models have 64 to 256")
    costs, unsupported = measure(head_dim, context)
    if as_json:
        report = {"head_dim": head_dim, "context": context, "formats": [asdict(c) for c in costs]}
        print(json.dumps(report | {"unsupported": unsupported}, indent=1))
        return
    Console().print(render(costs, head_dim, context))
    if unsupported:
        Console().print(f"Not for head_dim {head_dim}: {', '.join(unsupported)}", highlight=False)


def measure(head_dim: int, context: int) -> tuple[list[FormatCost], dict[str, str]]:
    """Costs of the formats that cover this head_dim; for the others the reason why not."""
    from homkv.formats import format_names, make_codec  # torch: seconds

    costs, unsupported = [], {}
    for name in format_names():
        try:
            costs.append(cost(make_codec(name, head_dim), name, context))
        except UnsupportedError as error:
            unsupported[name] = str(error)
    return costs, unsupported


def render(costs: list[FormatCost], head_dim: int, context: int) -> Table:
    """Draw the table."""
    table = Table(
        box=box.SIMPLE_HEAD,
        title=f"--kv-cache-dtype at head_dim {head_dim} and {context:,} tokens",
        caption="bits per element held, bits sent (<: an entropy coder packs it further), bytes per token of one kv "
        "head: pages, sinks and window, scales and padding. "
        f"Default: {DEFAULT_FORMAT}. Any kABCDvEFGH[wN] works too: bits (0, 2, 4, 8) of K's quarters from the slowest "
        "to the fastest RoPE frequency, then of V's; N: exact tokens at least, 64 to 256. Options as in kivi:bits=4 "
        "are in docs/hack.md and docs/rivals.md.",
        title_justify="left",
        caption_justify="left",
        pad_edge=False,
    )
    table.add_column("format", style="bold", no_wrap=True)
    table.add_column("layout", style="dim", overflow="fold")  # it names the bytes: cut off, it names others
    for heading in ("bits", "sent", "bytes/page", "bytes/token"):
        table.add_column(heading, justify="right", no_wrap=True)
    for c in costs:
        table.add_row(
            c.name,
            c.layout.removesuffix(f" D={head_dim}"),
            f"{c.bits_per_element:.2f}",
            f"{'<' * c.is_packed}{c.sent_bits_per_element:.2f}",
            f"{c.page_bytes:,}",
            f"{c.bytes_per_token:.1f}",
            style="green" if c.name == DEFAULT_FORMAT else "",
        )
    return table
