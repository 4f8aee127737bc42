"""CacheGen: levels by layer, the quantizer's bound, anchors, what is held and what is sent."""

import pytest
import torch
from torch import Tensor

from homkv.cache import PagedCache
from homkv.errors import FormatError, UnsupportedError
from homkv.formats import make_codec
from homkv.formats.cachegen import CachegenCodec, CachegenOptions, published_levels, shipped_levels
from homkv.formats.entropy import ChannelCoder
from homkv.seal import pack_layer
from homkv.testing.inputs import KINDS, make_tokens

VARIANTS = ("shipped", "published")


def codec_of(variant: str, head_dim: int = 64) -> CachegenCodec:
    return CachegenCodec(head_dim, CachegenOptions(variant))


def slowly_changing(num_tokens: int, seed: int = 0) -> Tensor:
    """Keys ``[2, T, 64]`` that a neighbour predicts well, as the paper finds them."""
    gen = torch.Generator().manual_seed(seed)
    return 5 * torch.randn(2, 1, 64, generator=gen) + torch.randn(2, num_tokens, 64, generator=gen).cumsum(1) * 0.05


def test_levels_by_layer() -> None:
    assert [shipped_levels(i, 30) for i in (0, 1, 2, 9, 10, 29)] == [(15, 15)] * 2 + [(15, 7)] * 2 + [(7, 7)] * 2
    found = [published_levels(i, 30) for i in (0, 1, 9, 10, 19, 20, 29)]
    assert found == [(127, 7), (7, 2), (7, 2), (7, 2), (7, 2), (3, 2), (3, 2)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layer", [0, 5, 29])
def test_no_element_is_off_by_more_than_half_a_step(kind: str, variant: str, layer: int) -> None:
    codec = codec_of(variant).at_layer(layer, 30)
    k, v = (make_tokens(kind, 2, codec.page_tokens, 64, seed=s) for s in (1, 2))
    pages = codec.encode(k, v)
    found_k, found_v = codec.dense(pages, torch.float64)
    for name, x, found, level in (("k", k, found_k, codec.levels[0]), ("v", v, found_v, codec.levels[1])):
        step = codec.record.read(pages, f"{name}_step").flatten(1).double().unsqueeze(-1)
        fp16 = 2.0**-11 * step * 127 + 2.0**-24 * max(level, 127)  # rounding the step, times the largest code
        slack = 1e-6 * x.abs().double()  # of float32 differences to an anchor
        assert bool(((found - x).abs() <= step / 2 + fp16 + slack).all())


def error(codec: CachegenCodec, k: Tensor) -> float:
    """Largest error of the keys of one page."""
    k = k[..., : codec.page_tokens, :]
    return (codec.dense(codec.encode(k, k))[0] - k).abs().max().item()


@pytest.mark.parametrize("variant", VARIANTS)
def test_shallow_layers_are_finer(variant: str) -> None:
    errors = [error(codec_of(variant).at_layer(i, 30), make_tokens("normal", 256, 64)) for i in (0, 5, 29)]
    assert errors[0] <= errors[1] < errors[2]


def test_a_cache_and_the_wire_encode_every_layer_in_its_own_way() -> None:
    codec, x = make_codec("cachegen", 64), make_tokens("normal", 1, 300, 64)
    cache = PagedCache(codec, num_layers=12, num_kv_heads=1, num_blocks=2)
    seq = cache.new_sequence()
    for layer in range(12):
        cache.append(layer, seq, x, x)
        pages = pack_layer(codec.at_layer(layer, 12), x, x).pages
        assert torch.equal(cache.export_layer(layer, seq).pages, pages)
        largest = [pages[..., at : at + 256 * 64].view(torch.int8).max().item() for at in (0, 256 * 64)]
        assert largest == list(shipped_levels(layer, 12))


def test_a_token_by_hand() -> None:
    codec = codec_of("shipped").at_layer(2, 30)
    k, v = torch.zeros(256, 64), torch.zeros(256, 64)
    k[3, :4] = torch.tensor([-30.0, 2.0, 2.9, 3.1])  # step 2: codes -15, 1, 1, 2
    v[5, :3] = torch.tensor([7.0, -0.6, 0.4])  # 16 bins: step 1
    page = codec.encode(k, v)[0]
    assert page[3 * 64 : 3 * 64 + 4].view(torch.int8).tolist() == [-15, 1, 1, 2]
    assert page[(256 + 5) * 64 : (256 + 5) * 64 + 3].view(torch.int8).tolist() == [7, -1, 0]
    assert page.numel() == codec.page_bytes == 256 * (64 + 64 + 2 + 2)
    assert codec.dense(page[None])[0][3, :4].tolist() == [-30, 2, 2, 4]


def test_keys_near_their_anchor_cost_little_error() -> None:
    published, shipped = (error(codec_of(x).at_layer(5, 30), slowly_changing(256)) for x in ("published", "shipped"))
    assert published < shipped / 3


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_sent_is_smaller_than_the_codes_and_comes_back(variant: str) -> None:
    codec = codec_of(variant).at_layer(5, 30)
    num_pages = 4
    tokens = num_pages * codec.page_tokens
    k, v = slowly_changing(tokens), make_tokens("normal", 2, tokens, 64, seed=2)
    pages = codec.encode(k, v).transpose(0, 1).contiguous()
    packed = codec.coder.encode(pages.numpy().data, num_pages)
    assert codec.sent_bytes(pages) == len(packed) < 0.8 * pages.numel()
    assert codec.coder.decode(memoryview(packed), num_pages, 2) == pages.numpy().tobytes()
    assert codec.kv_bytes(1000) == 1000 * 64 * 2 * 2  # decode holds 16 bits
    assert make_codec("kivi", 64).sent_bytes(pages) == pages.numel()


def test_names_and_refusals() -> None:
    assert make_codec("cachegen:as=published", 64).name == "cachegen:as=published"
    assert make_codec("cachegen:as=shipped", 64).name == "cachegen"
    assert isinstance(make_codec("cachegen", 64).coder, ChannelCoder)
    with pytest.raises(FormatError, match="shipped"):
        make_codec("cachegen:as=printed", 64)
    with pytest.raises(UnsupportedError, match="found 66"):
        make_codec("cachegen", 66)
    codec, zero = codec_of("shipped"), torch.zeros(256, 64)
    for bad in (float("nan"), 1e9):
        with pytest.raises(FormatError):
            codec.encode(zero, zero + bad)
