"""docs/rivals.md says what the codecs say."""

import re
from pathlib import Path

import torch

from homkv.formats import PageCodec, format_names, make_codec
from homkv.formats.basis import BasisCodec, BasisTables
from homkv.formats.exact import EXACT_DTYPES
from homkv.rope import default_rope
from homkv.spec import ALL_PRESETS

DOCUMENT = Path(__file__).parents[2] / "docs" / "rivals.md"


def codec_of(name: str, head_dim: int) -> PageCodec:
    if name.startswith("basis"):
        shapes = ((head_dim,), (head_dim, head_dim), (head_dim, head_dim), (head_dim,))
        return BasisCodec(head_dim, BasisTables(*(torch.zeros(1, 1, *shape) for shape in shapes)))
    return make_codec(name, head_dim, default_rope(head_dim))


def test_the_table_has_the_bits_of_the_code() -> None:
    rows = re.findall(
        r"^\| `([^`]+)` \|.*?\| ([\d.]+) / ([\d.]+) \| ([\d.]+) / ([\d.]+) \|", DOCUMENT.read_text(), re.M
    )
    rivals = {name for name in format_names() if name not in {*ALL_PRESETS, *EXACT_DTYPES, "hack", "hack-2026"}}
    assert {name for name, *_ in rows} - {"basis:file=PATH"} == rivals
    for name, *numbers in rows:
        found = [codec_of(name, d).bits_per_element(t) for d in (64, 128) for t in (2048, 32768)]
        assert [f"{x:.2f}" for x in found] == [f"{float(x):.2f}" for x in numbers], name
