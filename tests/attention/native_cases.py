"""Instruction sets, formats and codecs that the tests of the native kernel share."""

from functools import cache

import pytest
import torch

from homkv.attention import cpu
from homkv.formats.rows import RowsCodec
from homkv.spec import RowsSpec

needs_kernel = pytest.mark.skipif(not cpu.is_available(), reason="native kernel not built")
ISAS = cpu.available_isas() if cpu.is_available() else ()
COMBINATIONS = ("k0000v0000", "k2222v0000", "k0000v2248", "k8024v4028", "k4442v2444", "k2480v8042", "k2228v8884")
isas = pytest.mark.parametrize("isa", ISAS)


@cache
def make_codec(name: str, head_dim: int, seed: int = 0) -> RowsCodec:
    generator = torch.Generator().manual_seed(seed)
    return RowsCodec(head_dim, RowsSpec.parse(name), torch.randperm(head_dim, generator=generator).tolist())
