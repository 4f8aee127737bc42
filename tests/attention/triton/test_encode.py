"""Encoding in Triton: byte for byte what the reference writes, in every format, shape and spread over threads."""

import pytest
import torch
from torch import Tensor

from homkv.attention.triton.encode import EncodeConfig, encode
from homkv.errors import DTypeError, FormatError, ShapeError, UnsupportedError
from homkv.formats.rows import RowsCodec
from homkv.spec import RowsSpec
from homkv.testing.inputs import make_tokens

KINDS = ("normal", "outliers", "constant", "zeros", "tiny")  # one per head: a launch is slow to interpret


def make_codec(name: str, head_dim: int) -> RowsCodec:
    generator = torch.Generator().manual_seed(0)
    return RowsCodec(head_dim, RowsSpec.parse(name), torch.randperm(head_dim, generator=generator).tolist())


def tokens(head_dim: int, dtype: torch.dtype, pages: int = 1, kinds: tuple[str, ...] = KINDS) -> tuple[Tensor, Tensor]:
    k, v = (
        torch.stack([make_tokens(kind, 64 * pages, head_dim, seed=seed) for kind in kinds]).to(dtype) for seed in (1, 2)
    )
    return k, v


def expected(codec: RowsCodec, k: Tensor, v: Tensor) -> Tensor:
    return codec.encode(k, v).transpose(0, 1)


@pytest.mark.parametrize(
    ("name", "head_dim", "dtype"),
    [
        ("small", 128, torch.float16),
        ("balanced", 128, torch.bfloat16),
        ("k8442v4220", 96, torch.float32),
        ("int8", 64, torch.float16),
        ("near-lossless", 64, torch.bfloat16),
        ("small", 256, torch.float16),
        ("k8024v4028", 64, torch.float32),
        ("k4420v8000", 80, torch.float16),
        ("k0000v0000", 64, torch.float32),
    ],
)
def test_same_bytes_for_every_format_and_head_dim(
    name: str, head_dim: int, dtype: torch.dtype, device: torch.device
) -> None:
    codec, (k, v) = make_codec(name, head_dim), tokens(head_dim, dtype)
    found = encode(k.to(device), v.to(device), codec.layout, codec.order)
    assert torch.equal(found.cpu(), expected(codec, k, v))


@pytest.mark.parametrize(
    "config",
    [
        EncodeConfig(key_lanes=1, value_lanes=1, overlap=False),
        EncodeConfig(key_lanes=2, value_lanes=2, overlap=False),
        EncodeConfig(key_lanes=4, value_lanes=4, overlap=True),
        EncodeConfig(key_lanes=1, value_lanes=8, overlap=True),
    ],
)
def test_threads_do_not_change_bytes(config: EncodeConfig, device: torch.device) -> None:
    codec, (k, v) = make_codec("k0084v0220", 64), tokens(64, torch.float16)
    found = encode(k.to(device), v.to(device), codec.layout, codec.order, config=config)
    assert torch.equal(found.cpu(), expected(codec, k, v))


def test_pages_of_any_stride_go_to_their_blocks_and_nowhere_else(device: torch.device) -> None:
    codec, (k, v) = make_codec("balanced", 64), tokens(64, torch.float16, pages=2, kinds=("normal", "outliers", "tiny"))
    token_first = k.to(device).transpose(0, 1).contiguous().transpose(0, 1)  # as a projection leaves them
    unaligned = torch.nn.functional.pad(v.to(device), (1, 2))[..., 1:-2]
    assert not token_first.is_contiguous()
    assert not unaligned.is_contiguous()
    out = torch.full((5, 3, codec.page_bytes), 0xA5, dtype=torch.uint8, device=device)
    ids = torch.tensor([3, 1], dtype=torch.int32, device=device)
    assert encode(token_first, unaligned, codec.layout, codec.order, out=out, block_ids=ids) is out
    assert torch.equal(out[[3, 1]].cpu(), expected(codec, k, v))
    assert bool((out[[0, 2, 4]] == 0xA5).all())


def test_wrong_block_ids_are_refused_or_stay_inside(device: torch.device) -> None:
    codec, (k, v) = make_codec("k2000v0002", 64), tokens(64, torch.float16, pages=2, kinds=("normal",))
    k, v = k.to(device), v.to(device)
    out = torch.zeros(3, 1, codec.page_bytes, dtype=torch.uint8, device=device)
    for wrong in ([0, 3], [-1, 0], [1, 1]):
        ids = torch.tensor(wrong, dtype=torch.int32, device=device)
        with pytest.raises(ShapeError, match="different block_ids"):
            encode(k, v, codec.layout, codec.order, out=out, block_ids=ids)
    ids, status = (torch.tensor(x, dtype=torch.int32, device=device) for x in ([-7, 99], [0]))
    encode(k, v, codec.layout, codec.order, out=out, block_ids=ids, status=status)
    assert torch.equal(out[[0, 2]].cpu(), expected(codec, k.cpu(), v.cpu()))
    assert not out[1].any()


def test_no_pages_are_no_bytes(device: torch.device) -> None:
    codec, none = make_codec("balanced", 64), torch.empty(2, 0, 64, device=device)
    assert encode(none, none, codec.layout, codec.order).shape == (0, 2, codec.page_bytes)


# -- what cannot be stored -------------------------------------------------------------------------------------------


def refused(name: str, k: Tensor, v: Tensor, device: torch.device, match: str) -> None:
    """The same error as the reference's, or a status."""
    codec = make_codec(name, 64)
    k, v = k.to(device), v.to(device)
    with pytest.raises(FormatError, match=match) as wanted:
        codec.encode(k, v)
    with pytest.raises(FormatError) as found:
        encode(k, v, codec.layout, codec.order)
    assert str(found.value) == str(wanted.value)
    status = torch.zeros(1, dtype=torch.int32, device=device)
    encode(k, v, codec.layout, codec.order, status=status)
    assert int(status) != 0


@pytest.mark.parametrize(("which", "bad"), [("keys", torch.nan), ("values", torch.nan), ("values", -torch.inf)])
def test_what_is_not_finite_is_refused(which: str, bad: float, device: torch.device) -> None:
    k, v = tokens(64, torch.float32, kinds=("normal",))
    (k if which == "keys" else v)[0, 50, 63] = bad  # of values, a channel that is not stored
    refused("k0000v8000", k, v, device, f"finite {which}.*wider dtype")


def test_a_mean_beyond_fp16_is_refused(device: torch.device) -> None:
    k, v = tokens(64, torch.float32, kinds=("normal",))
    k[0, :, 5] = 65520.0  # the first mean that fp16 rounds to infinity
    refused("k0002v0000", k, v, device, r"means.*65504.*fp16")
    k[0, :, 5] = 65519.0
    codec = make_codec("k0002v0000", 64)
    assert torch.equal(encode(k.to(device), v.to(device), codec.layout, codec.order).cpu(), expected(codec, k, v))


@pytest.mark.parametrize(
    ("name", "size"),
    [("k4280v0000", 1e6), ("k0002v0000", 3e38), ("k0000v0002", 1e6), ("k0000v0400", 3e38), ("k0000v8000", 1e6)],
)
def test_a_scale_beyond_the_format_is_refused(name: str, size: float, device: torch.device) -> None:
    k, v = tokens(64, torch.float32, kinds=("normal",))
    (k if "v0000" in name else v)[0, 10:12] = torch.tensor([size, -size])[:, None].expand(2, 64)  # mean stays small
    refused(name, k, v, device, r"scales up to 240.*fp16")


def test_the_largest_scale_is_stored(device: torch.device) -> None:
    """8 bits round up: 240 * 127 is the largest magnitude that byte 255 covers."""
    codec = make_codec("k0000v8000", 64)
    k, v = torch.zeros(2, 1, 64, 64).unbind()
    v[0, 0, 0] = 240 * 127 * 4.0  # alone in its token: the rotation spreads it over 16 slots
    found = encode(k.to(device), v.to(device), codec.layout, codec.order).cpu()
    assert torch.equal(found, expected(codec, k, v))
    assert int(found[0, 0, codec.layout.v_classes[0].scales_offset]) == 255


# -- arguments -------------------------------------------------------------------------------------------------------


def test_wrong_input_is_refused(device: torch.device) -> None:
    codec, (k, v) = make_codec("small", 64), [x.to(device) for x in tokens(64, torch.float16)]
    layout, order = codec.layout, codec.order
    with pytest.raises(ShapeError, match="whole pages"):
        encode(k[:, :63], v[:, :63], layout, order)
    with pytest.raises(DTypeError, match="both"):
        encode(k, v.float(), layout, order)
    with pytest.raises(DTypeError, match="both"):
        encode(k.int(), v.int(), layout, order)
    with pytest.raises(UnsupportedError, match="tensors on"):
        encode(k.to("meta"), v.to("meta"), layout, order)
    with pytest.raises(ShapeError, match="contiguous last"):
        encode(k.repeat(1, 1, 2)[..., ::2], v.repeat(1, 1, 2)[..., ::2], layout, order)
    out = torch.zeros(1, len(k), codec.page_bytes, dtype=torch.uint8, device=device)
    with pytest.raises(ShapeError, match="expected out"):
        encode(k, v, layout, order, out=out[..., :64].contiguous())
    shifted = torch.zeros(out.numel() + 8, dtype=torch.uint8, device=device)[8:].view_as(out)
    with pytest.raises(ShapeError, match="multiple of 16 bytes"):
        encode(k, v, layout, order, out=shifted)
    with pytest.raises(ShapeError, match="1 block_ids"):
        encode(k, v, layout, order, out=out, block_ids=torch.zeros(2, dtype=torch.int32, device=device))
    with pytest.raises(DTypeError, match="block_ids"):
        encode(k, v, layout, order, out=out, block_ids=torch.zeros(1, dtype=torch.int64, device=device))
    with pytest.raises(ShapeError, match="status"):
        encode(k, v, layout, order, status=torch.zeros(2, dtype=torch.int32, device=device))
