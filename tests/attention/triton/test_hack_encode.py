"""Encoding of HACK pages in Triton, byte for byte against the codecs."""

from itertools import product

import pytest
import torch
import triton
import triton.language as tl
from chosen import cases
from decode_cases import HEADS, Codec
from torch import Tensor

from homkv.attention import api
from homkv.attention.triton.hack_common import noise_key, uniform_noise
from homkv.attention.triton.hack_encode import encode
from homkv.errors import DTypeError, FormatError, ShapeError
from homkv.formats import minmax
from homkv.formats.hack import HackCodec, HackOptions
from homkv.formats.hack2026 import Hack2026Codec, Hack2026Options
from homkv.testing.inputs import KINDS, make_tokens

both = pytest.mark.parametrize("codec", [HackCodec(64), Hack2026Codec(64)], ids=lambda codec: codec.name)


def tokens(codec: Codec, num_pages: int, kind: str = "normal") -> tuple[Tensor, Tensor]:
    shape = (HEADS, num_pages * codec.page_tokens, codec.head_dim)
    return make_tokens(kind, *shape, seed=1), make_tokens(kind, *shape, seed=2)


def assert_same_bytes(codec: Codec, k: Tensor, v: Tensor, device: torch.device, position: int = 0) -> None:
    expected = codec.encode(k, v, position).transpose(0, 1)
    assert torch.equal(encode(k.to(device), v.to(device), codec, position).cpu(), expected)


@pytest.mark.parametrize(("group_size", "bits"), cases(product((32, 64, 128), (2, 4, 8)), [(32, 2), (64, 8), (128, 4)]))
def test_every_page(group_size: int, bits: int, device: torch.device) -> None:
    stored = bits != 4
    rounding = "nearest" if group_size == 64 else "stochastic"
    options = HackOptions(group_size, bits, rounding, summation_elimination=stored)
    for codec in (HackCodec(64, options), Hack2026Codec(64, Hack2026Options(group_size, bits, stored))):
        assert_same_bytes(codec, *tokens(codec, 2), device, position=3 * group_size)


@pytest.mark.parametrize(
    ("head_dim", "group_size"),
    cases([(16, 64), (80, 128), (96, 32), (96, 128), (128, 64), (256, 64)], [(16, 64), (80, 128), (96, 32), (256, 64)]),
)
def test_every_head_dim(head_dim: int, group_size: int, device: torch.device) -> None:
    for codec in (
        HackCodec(head_dim, HackOptions(group_size)),
        Hack2026Codec(head_dim, Hack2026Options(group_size)),
        Hack2026Codec(head_dim, Hack2026Options(64)),
    ):
        assert_same_bytes(codec, *tokens(codec, 1), device)


@both
@pytest.mark.parametrize("kind", KINDS)
def test_extreme_values(kind: str, codec: Codec, device: torch.device) -> None:
    assert_same_bytes(codec, *tokens(codec, 1, kind), device)


@both
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtypes_and_strides(dtype: torch.dtype, codec: Codec, device: torch.device) -> None:
    k, v = (x.to(dtype).transpose(0, 1).contiguous().transpose(0, 1) for x in tokens(codec, 2))
    assert not k.is_contiguous()
    assert_same_bytes(codec, k, v, device)


@pytest.mark.parametrize(("seed", "position"), [(0, 0), (7, 64), (2**32 - 1, 2**31 - 64)])
def test_the_noise_is_the_formats(seed: int, position: int, device: torch.device) -> None:
    assert_same_bytes(HackCodec(64, HackOptions(seed=seed)), *tokens(HackCodec(64), 1), device, position)


@triton.jit
def noise_kernel(Out, key, position, T: tl.constexpr, D: tl.constexpr):
    t = tl.arange(0, T)[:, None]
    c = tl.arange(0, D)[None, :]
    tl.store(Out + t * D + c, uniform_noise(key, position + t, c))


@pytest.mark.parametrize("stream", [0, 1, 5])
def test_uniform_noise(stream: int, device: torch.device) -> None:
    out = torch.empty(32, 64, device=device)
    noise_kernel[(1,)](out, noise_key(123456789, stream), 1000, T=32, D=64)
    assert torch.equal(out.cpu(), minmax.uniform_noise(123456789, stream, 1000, 32, 64))


@both
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -1e30, 3e38])
def test_values_that_a_page_cannot_hold_are_refused(value: float, codec: Codec, device: torch.device) -> None:
    for i in (0, 1):
        pair = [x.to(device) for x in tokens(codec, 1)]
        pair[i][1, 7, 9] = value
        with pytest.raises(FormatError, match="expected finite"):
            encode(*pair, codec)
        status = torch.zeros(1, dtype=torch.int32, device=device)
        encode(*pair, codec, status=status)
        assert int(status) == 1


@both
def test_wrong_input_is_refused(codec: Codec, device: torch.device) -> None:
    k, v = (x.to(device) for x in tokens(codec, 1))
    with pytest.raises(ShapeError, match="whole pages"):
        encode(k[:, 1:], v[:, 1:], codec)
    with pytest.raises(ShapeError, match="contiguous last dimension"):
        encode(k[0], v[0], codec)
    with pytest.raises(DTypeError, match="cast or move"):
        encode(k, v.half(), codec)
    with pytest.raises(DTypeError, match="status of int32"):
        encode(k, v, codec, status=torch.zeros(1, device=device))
    with pytest.raises(ShapeError, match="expected status"):
        encode(k, v, codec, status=torch.zeros(2, dtype=torch.int32, device=device))
    assert encode(k[:, :0], v[:, :0], codec).shape == (0, HEADS, codec.page_bytes)


@both
def test_the_api_encodes_here_when_asked_to(codec: Codec, device: torch.device) -> None:
    k, v = tokens(codec, 2)
    pages = api.encode(codec, k.to(device), v.to(device), 64, impl="triton")
    assert torch.equal(pages.cpu(), api.encode(codec, k, v, 64, impl="reference"))
    v[0, 3, 1] = torch.nan
    status = torch.zeros(1, dtype=torch.int32, device=device)
    api.encode(codec, k.to(device), v.to(device), impl="triton", status=status)
    assert int(status) == 1
