"""Quantized prefill in Triton: `hack` against its readable form, `hack-2026` against one written here."""

from itertools import product

import pytest
import torch
from chosen import cases
from decode_cases import Codec, error
from torch import Tensor

from homkv.attention import api
from homkv.attention.triton.hack2026_prefill import hack2026_prefill
from homkv.attention.triton.hack_prefill import PrefillConfig, hack_prefill
from homkv.errors import DTypeError, ShapeError, UnsupportedError
from homkv.formats.base import EIGHT_BIT, UNROUNDED, Rounding
from homkv.formats.hack import HackCodec, HackOptions
from homkv.formats.hack2026 import Hack2026Codec, Hack2026Options
from homkv.formats.hack_prefill import quantized_prefill
from homkv.testing.inputs import make_tokens

TILES = (PrefillConfig(rows=64, chunk=32, warps=4, stages=2), PrefillConfig(rows=128, chunk=64))


def prompt(head_dim: int, length: int, offset: int = 0, batch: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Three query heads over one kv head."""
    k, v = (make_tokens("normal", batch, 1, length + offset, head_dim, seed=seed) for seed in (2, 3))
    return make_tokens("normal", batch, 3, length, head_dim, seed=1), k, v


def reference_2026(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    codec: Hack2026Codec,
    scale: float,
    offset: int,
    rounding: Rounding,
    dtype: torch.dtype,
) -> Tensor:
    """Causal attention over sinks, pages and an exact rest, the pages' products on codes."""
    batch, heads, length, _ = q.shape
    groups, num_keys, pages = k.shape[1], k.shape[2], codec.num_pages(k.shape[2])
    rows = q.to(dtype).reshape(batch, groups, -1, codec.head_dim)
    start = min(codec.num_sinks, num_keys)
    stop = start + pages * codec.page_tokens
    exact = [*range(start), *range(stop, num_keys)]
    scores = rows @ k[:, :, exact].to(dtype).transpose(-1, -2)
    coded = codec.encode(k[:, :, start:stop], v[:, :, start:stop])
    scores = torch.cat((codec.scores(rows, coded, rounding, dtype), scores), -1) * scale
    position = torch.tensor([*range(start, stop), *exact])
    last_visible = (torch.arange(length) + offset).repeat(heads // groups)
    scores = scores.masked_fill(position > last_visible.unsqueeze(-1), -torch.inf)
    p = torch.exp(scores - scores.amax(-1, keepdim=True))
    o = codec.weigh(p[..., : stop - start], coded, rounding, dtype) + p[..., stop - start :] @ v[:, :, exact].to(dtype)
    return (o / p.sum(-1, keepdim=True)).reshape(q.shape)


def check(
    codec: Codec, length: int, device: torch.device, offset: int = 0, config: PrefillConfig | None = None
) -> None:
    """No worse than twice the float32 form of the same algebra, against its float64 form without rounding."""
    q, k, v = prompt(codec.head_dim, length, offset)
    scale, on_device = codec.head_dim**-0.5, [x.to(device) for x in (q, k, v)]
    if isinstance(codec, HackCodec):
        found = hack_prefill(*on_device, codec, scale, offset, config)
        rounded = quantized_prefill(q, k, v, codec, scale, offset)
        exact = quantized_prefill(q, k, v, codec, scale, offset, rounding=UNROUNDED, dtype=torch.float64)
    else:
        found = hack2026_prefill(*on_device, codec, scale, offset, config)
        rounded = reference_2026(q, k, v, codec, scale, offset, EIGHT_BIT, torch.float32)
        exact = reference_2026(q, k, v, codec, scale, offset, UNROUNDED, torch.float64)
    assert not found.isnan().any()
    assert error(found.cpu(), exact) <= 2 * error(rounded, exact) + 1e-5


@pytest.mark.parametrize(("group_size", "bits"), cases(product((32, 64, 128), (2, 4, 8)), [(32, 2), (64, 8), (128, 4)]))
def test_every_block(group_size: int, bits: int, device: torch.device) -> None:
    stored = bits != 4
    rounding = "nearest" if bits == 8 else "stochastic"
    check(HackCodec(64, HackOptions(group_size, bits, rounding, 7, stored)), group_size + 70, device)
    check(Hack2026Codec(64, Hack2026Options(group_size, bits, stored)), group_size + 74, device)


@pytest.mark.parametrize("length", cases([1, 3, 4, 31, 64, 65, 68, 69, 132], [1, 4, 64, 65, 132]))
def test_every_length(length: int, device: torch.device) -> None:
    check(HackCodec(64), length, device)
    check(Hack2026Codec(64), length, device)


@pytest.mark.parametrize(
    ("head_dim", "group_size"),
    cases([(16, 64), (80, 128), (96, 32), (128, 64), (256, 64)], [(16, 64), (80, 128), (96, 32), (256, 64)]),
)
def test_every_head_dim(head_dim: int, group_size: int, device: torch.device) -> None:
    check(HackCodec(head_dim, HackOptions(group_size)), 140, device)
    check(Hack2026Codec(head_dim, Hack2026Options(group_size)), 140, device)


@pytest.mark.parametrize(
    ("offset", "config"),
    cases(product((0, 1, 63, 200), TILES), [(0, TILES[1]), (1, TILES[0]), (63, TILES[1]), (200, TILES[0])]),
)
def test_a_chunk_continues_a_prompt(offset: int, config: PrefillConfig, device: torch.device) -> None:
    check(HackCodec(64), 90, device, offset, config)
    check(Hack2026Codec(64), 90, device, offset, config)


def test_the_open_block_without_requantization_elimination(device: torch.device) -> None:
    check(HackCodec(64, HackOptions(requantization_elimination=False)), 100, device)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtypes_strides_and_batches(dtype: torch.dtype, device: torch.device) -> None:
    tensors = [x.to(device, dtype) for x in prompt(64, 100, batch=2)]
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
    for prefill, codec in ((hack_prefill, HackCodec(64)), (hack2026_prefill, Hack2026Codec(64))):
        o = prefill(*tensors, codec, 0.125)
        assert o.dtype == dtype
        assert torch.equal(prefill(*strided, codec, 0.125), o)
        alone = prefill(*(x[1:] for x in tensors), codec, 0.125)
        assert torch.equal(alone, o[1:])


def test_the_api_prefills_here_when_asked_to(device: torch.device) -> None:
    q, k, v = prompt(64, 100)
    codec = HackCodec(64, HackOptions(prefill="int8"))
    found = api.prefill(codec, q.to(device), k.to(device), v.to(device), 0.125, impl="triton")
    readable = api.prefill(codec, q, k, v, 0.125, impl="reference")
    assert torch.equal(found.cpu(), hack_prefill(q.to(device), k.to(device), v.to(device), codec, 0.125).cpu())
    assert error(found.cpu(), readable) < 0.05
    exact = api.prefill(HackCodec(64), q, k, v, 0.125)
    assert error(readable, exact) > 0.05  # two bits differ from none


def test_wrong_input_is_refused(device: torch.device) -> None:
    q, k, v = (x.to(device) for x in prompt(64, 10))
    for bad in ((q, k[:, :, :9], v[:, :, :9]), (q[0], k[0], v[0]), (q, k, v[..., :32])):
        with pytest.raises(ShapeError, match="expected q"):
            hack_prefill(*bad, HackCodec(64), 0.125)
    with pytest.raises(DTypeError, match="cast or move"):
        hack2026_prefill(q.double(), k, v, Hack2026Codec(64), 0.125)
    with pytest.raises(ShapeError, match="contiguous last dimension"):
        hack_prefill(q.transpose(2, 3).contiguous().transpose(2, 3), k, v, HackCodec(64), 0.125)
    with pytest.raises(UnsupportedError, match="at most 65535 heads"):
        hack_prefill(*(x[:1].expand(70_000, -1, -1, -1) for x in (q, k, v)), HackCodec(64), 0.125)
    assert hack_prefill(q[:, :, :0], k[:, :, :0], v[:, :, :0], HackCodec(64), 0.125).numel() == 0
