"""KIVI as the paper has it: the quantizer by hand, the residual step by step, the bytes one by one."""

import struct

import pytest
import torch
from torch import Tensor

from homkv.cache import PagedCache
from homkv.errors import FormatError, UnsupportedError
from homkv.formats import make_codec
from homkv.formats.kivi import KiviCodec, KiviOptions
from homkv.testing.compare import assert_relative
from homkv.testing.inputs import KINDS, make_tokens


def minmax(x: Tensor, bits: int) -> Tensor:
    """The paper's quantizer, restored: groups along the last dimension, scale and minimum in fp16."""
    low, high = x.amin(-1, keepdim=True).half().float(), x.amax(-1, keepdim=True)
    scale = ((high - low) / (2**bits - 1)).clamp_min(2.0**-24).half().float()
    return ((x - low) / scale).round().clamp(0, 2**bits - 1) * scale + low


def per_channel(k: Tensor, g: int, bits: int) -> Tensor:
    """Keys ``[T, D]`` in groups of g tokens of a channel."""
    return minmax(k.T.unflatten(-1, (-1, g)), bits).flatten(-2).T


def per_token(v: Tensor, g: int, bits: int) -> Tensor:
    """Values ``[T, D]`` in groups of g channels of a token."""
    return minmax(v.unflatten(-1, (-1, g)), bits).flatten(-2)


class PaperCache:
    """Algorithm 1 of the paper for one head: quantized and full-precision parts of K and of V."""

    def __init__(self, k: Tensor, v: Tensor, options: KiviOptions) -> None:
        self.g, self.bits, self.residual = options.group_size, options.bits, options.residual
        cut = len(k) - len(k) % self.residual
        self.k_old, self.k_new = per_channel(k[:cut], self.g, self.bits), k[cut:]
        cut = max(len(v) - self.residual, 0)
        self.v_old, self.v_new = per_token(v[:cut], self.g, self.bits), v[cut:]

    def decode(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        self.k_new, self.v_new = torch.cat((self.k_new, k)), torch.cat((self.v_new, v))
        p = torch.softmax(q @ torch.cat((self.k_old, self.k_new)).T * scale, -1)
        out = p @ torch.cat((self.v_old, self.v_new))
        if len(self.k_new) == self.residual:
            self.k_old = torch.cat((self.k_old, per_channel(self.k_new, self.g, self.bits)))
            self.k_new = self.k_new[:0]
        if len(self.v_new) > self.residual:
            self.v_old = torch.cat((self.v_old, per_token(self.v_new[:1], self.g, self.bits)))
            self.v_new = self.v_new[1:]
        return out


@pytest.mark.parametrize(
    ("options", "num_prompt"),
    [(KiviOptions(2, 32, 64), 3), (KiviOptions(2, 32, 64), 120), (KiviOptions(4, 64, 64), 64), (KiviOptions(), 200)],
)
def test_every_step_attends_to_what_the_paper_keeps(options: KiviOptions, num_prompt: int) -> None:
    steps = 70
    k = make_tokens("outliers", num_prompt + steps, 64, seed=1)
    v = make_tokens("normal", num_prompt + steps, 64, seed=2)
    codec = KiviCodec(64, options)
    cache = PagedCache(codec, num_layers=1, num_kv_heads=1, num_blocks=16, exact_dtype=torch.float32)
    seq = cache.new_sequence()
    cache.append(0, seq, k[None, :num_prompt], v[None, :num_prompt])
    paper = PaperCache(k[:num_prompt], v[:num_prompt], options)
    for t in range(num_prompt, num_prompt + steps):
        q = torch.randn(1, 64, generator=torch.Generator().manual_seed(t))
        found = cache.attend(0, [seq], q[None, None], k[None, None, t : t + 1], v[None, None, t : t + 1], 1 / 80)
        assert_relative(found[0, 0], paper.decode(q, k[t : t + 1], v[t : t + 1], 1 / 80), 1e-5)


def test_a_page_by_hand() -> None:
    codec = KiviCodec(64)
    token = torch.arange(32.0).unsqueeze(-1)
    channel = torch.arange(64.0)
    k = token * 3 + channel  # channel c runs from c to c + 93: scale 31, codes of t: round(3 t / 31)
    v = (channel % 32) * 3 - token  # group runs from -t to 93 - t
    page = bytes(codec.encode(k, v)[0].tolist())
    t, c = 13, 42
    assert page[c * 8 + t // 4] >> 2 * (t % 4) & 3 == round(3 * t / 31)
    assert page[512 + t * 16 + c // 4] >> 2 * (c % 4) & 3 == round((c % 32) * 3 / 31)
    k_scale, k_minimum = (struct.unpack_from("<e", page, at + 2 * c)[0] for at in (1024, 1152))
    v_scale, v_minimum = (struct.unpack_from("<e", page, at + 4 * t + 2 * (c // 32))[0] for at in (1280, 1408))
    assert (k_scale, k_minimum) == (31, c)
    assert (v_scale, v_minimum) == (31, -t)
    assert len(page) == codec.page_bytes == 1536


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [2, 4])
def test_no_element_is_off_by_more_than_half_a_step(kind: str, bits: int) -> None:
    """Half a step, where the step and the minimum are fp16: what rounding these took comes on top."""
    codec = KiviCodec(64, KiviOptions(bits=bits))
    k, v = (make_tokens(kind, 2, 96, 64, seed=s) for s in (1, 2))
    found_k, found_v = codec.dense(codec.encode(k, v), torch.float64)
    sides = (
        (k.transpose(-1, -2).unflatten(-1, (-1, 32)), found_k.transpose(-1, -2).unflatten(-1, (-1, 32))),
        (v.unflatten(-1, (-1, 32)), found_v.unflatten(-1, (-1, 32))),
    )
    for x, found in sides:
        low, high = x.amin(-1, keepdim=True).double(), x.amax(-1, keepdim=True).double()
        step = (high - low) / (2**bits - 1)
        fp16 = 2.0**-11 * (low.abs() + (high - low)) * 2 + 2.0**-24 * 2**bits
        assert bool(((found - x).abs() <= step / 2 * 1.001 + fp16).all())


@pytest.mark.parametrize(("bits", "head_dim", "group"), [(2, 64, 32), (2, 128, 32), (4, 128, 64), (4, 96, 32)])
def test_bytes_are_codes_and_two_fp16_numbers_per_group(bits: int, head_dim: int, group: int) -> None:
    codec = KiviCodec(head_dim, KiviOptions(bits=bits, group_size=group))
    assert codec.page_bytes == 2 * group * head_dim * bits // 8 + 2 * 4 * group * head_dim // group
    k = torch.zeros(group, head_dim)
    assert codec.encode(k, k).shape == (1, codec.page_bytes)
    per_element = bits + 32 / group
    exact = codec.num_exact(32768)
    assert 128 <= exact < 128 + group
    assert codec.bits_per_element(32768) == pytest.approx((per_element * (32768 - exact) + 16 * exact) / 32768)


def test_names_and_bad_options() -> None:
    assert make_codec("kivi:bits=4,g=64", 128).name == "kivi:bits=4,g=64"
    assert make_codec("kivi:bits=2,g=32,r=128", 128).name == "kivi"
    for bad in ("kivi:bits=3", "kivi:g=48", "kivi:r=100", "kivi:g=128,r=64", "kivi:window=3"):
        with pytest.raises(FormatError, match=r"expected .*found"):
            make_codec(bad, 128)
    with pytest.raises(UnsupportedError, match="found 80"):
        make_codec("kivi", 80)
    with pytest.raises(FormatError, match="fp16"):
        make_codec("kivi", 64).encode(torch.full((32, 64), 1e6), torch.zeros(32, 64))
