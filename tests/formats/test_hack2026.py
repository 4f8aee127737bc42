"""The later HACK as a codec: the law, the authors' page sizes, folding, the sums, the name."""

import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from homkv.errors import FormatError, UnsupportedError
from homkv.formats.base import EIGHT_BIT, UNROUNDED
from homkv.formats.hack import HackCodec, HackOptions
from homkv.formats.hack2026 import Hack2026Codec, Hack2026Options, channel_partition

HEAD_DIMS = (16, 64, 80, 96, 128, 256)


@st.composite
def codecs(draw: st.DrawFn) -> Hack2026Codec:
    options = Hack2026Options(
        group_size=draw(st.sampled_from((32, 64, 128))),
        bits=draw(st.sampled_from((2, 4, 8))),
        summation_elimination=draw(st.booleans()),
    )
    return Hack2026Codec(draw(st.sampled_from(HEAD_DIMS)), options)


def tokens(codec: Hack2026Codec, num_pages: int, seed: int, *lead: int) -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(seed)
    shape = (*lead, num_pages * codec.page_tokens, codec.head_dim)
    k, v = (torch.randn(shape, generator=gen) for _ in "kv")
    return k + 3 * torch.randn(codec.head_dim, generator=gen), v


@settings(max_examples=30, deadline=None)
@given(codec=codecs(), num_pages=st.integers(0, 2), rows=st.integers(1, 3), seed=st.integers(0, 2**31))
def test_the_law(codec: Hack2026Codec, num_pages: int, rows: int, seed: int) -> None:
    k, v = tokens(codec, num_pages, seed, 2)
    pages = codec.encode(k, v)
    assert pages.shape == (2, num_pages, codec.page_bytes)
    k_dense, v_dense = codec.dense(pages, torch.float64)
    assert k_dense.shape == v_dense.shape == k.shape
    q = torch.randn(2, rows, codec.head_dim, dtype=torch.float64)
    p = torch.rand(2, rows, k.shape[1], dtype=torch.float64)
    k_transposed = k_dense.transpose(-1, -2)
    scores = codec.scores(q, pages, UNROUNDED, torch.float64)
    out = codec.weigh(p, pages, UNROUNDED, torch.float64)
    # Scale * code and the minimum cancel in an element, so the largest magnitudes are what float64 rounds.
    k_largest, v_largest = (x.abs().max() if num_pages else 0 for x in (k_dense, v_dense))
    assert bool(((scores - q @ k_transposed).abs() <= 1e-12 * q.abs().sum(-1, keepdim=True) * k_largest).all())
    assert bool(((out - p @ v_dense).abs() <= 1e-12 * p.sum(-1, keepdim=True) * v_largest).all())


@settings(max_examples=20, deadline=None)
@given(codec=codecs(), seed=st.integers(0, 2**31))
def test_eight_bit_rounding_stays_within_its_bound(codec: Hack2026Codec, seed: int) -> None:
    """The folded operand is off by at most half a step per element: a score by ``sum_p step_p / 2 * sum(codes)``."""
    pages = codec.encode(*tokens(codec, 2, seed))
    k, v = codec.dense(pages, torch.float64)
    q = torch.randn(4, codec.head_dim, dtype=torch.float64)
    p = torch.rand(4, 2 * codec.page_tokens, dtype=torch.float64) ** 4
    size = codec.partition
    k_code, v_code = (codec.record.read(pages, name).double() for name in ("k_code", "v_code"))  # [2, T, D], [2, D, T]
    k_scale, v_scale = (codec.record.read(pages, name).double() for name in ("k_scale", "v_scale"))
    folded_q = (q.unsqueeze(0) * k_scale.unsqueeze(1)).unflatten(-1, (-1, size))  # [2, R, parts, size]
    q_step = (folded_q.amax(-1) - folded_q.amin(-1)) / 255
    score_bound = (q_step @ k_code.unflatten(-1, (-1, size)).sum(-1).transpose(-1, -2) / 2).transpose(0, 1).flatten(1)
    tiles = p.unflatten(-1, (2, -1)).transpose(0, 1)  # [2, R, T]
    folded_p = tiles.unsqueeze(-1) * v_scale.unsqueeze(1)  # [2, R, T, parts]
    p_step = (folded_p.amax(2) - folded_p.amin(2)) / 255  # [2, R, parts]
    out_bound = (p_step.repeat_interleave(size, -1) / 2 * v_code.sum(-1).unsqueeze(1)).sum(0)
    for dtype, slack in ((torch.float64, 1e-12), (torch.float32, 4e-6)):
        scores, out = codec.scores(q, pages, EIGHT_BIT, dtype), codec.weigh(p, pages, EIGHT_BIT, dtype)
        k_terms, v_terms = (
            3 * (q.abs().sum(-1, keepdim=True) * k.abs().amax()),
            3 * (p.sum(-1, keepdim=True) * v.abs().amax()),
        )
        assert bool(((scores - q @ k.T).abs() <= score_bound + slack * k_terms).all())
        assert bool(((out - p @ v).abs() <= out_bound + slack * v_terms).all())


@pytest.mark.parametrize(("group_size", "block_bytes"), [(32, 26_624), (64, 43_008), (128, 77_824)])
def test_pages_are_as_large_as_the_authors(group_size: int, block_bytes: int) -> None:
    """Qwen3-8B: 8 kv heads of 128 channels; the authors' README, section E2."""
    assert 8 * Hack2026Codec(128, Hack2026Options(group_size=group_size)).page_bytes == block_bytes


def test_a_4096_token_prompt_is_as_large_as_the_authors() -> None:
    """121 / 102 / 101 MiB for 36 layers of 8 heads, 16-bit tail and sinks included; the authors' README, section E2."""
    for group_size, mib in ((32, 120.6), (64, 102.0), (128, 100.8)):
        codec = Hack2026Codec(128, Hack2026Options(group_size=group_size))
        assert 36 * 8 * codec.kv_bytes(4096) / 2**20 == pytest.approx(mib, abs=0.05)


def test_bytes_lie_where_the_documentation_says() -> None:
    codec = Hack2026Codec(128)
    k, v = tokens(codec, 1, 3)
    page = bytes(codec.encode(k, v)[0].tolist())
    k_dense, v_dense = codec.dense(codec.encode(k, v), torch.float64)
    t, c = 13, 100  # the second channel partition
    k_code = page[t * 32 + c // 4] >> 2 * (c % 4) & 3
    v_code = page[2048 + c * 16 + t // 4] >> 2 * (t % 4) & 3
    k_scale, k_minimum = (struct.unpack_from("<e", page, at + 2 * c)[0] for at in (4096, 4352))
    v_scale, v_minimum = (struct.unpack_from("<e", page, at + 2 * (2 * t + 1))[0] for at in (4608, 4864))
    assert k_dense[t, c].item() == k_code * k_scale + k_minimum
    assert v_dense[t, c].item() == v_code * v_scale + v_minimum
    assert page[5120 + 2 * t + 1] == sum(page[t * 32 + i // 4] >> 2 * (i % 4) & 3 for i in range(64, 128))
    assert page[5248 + c] == sum(page[2048 + c * 16 + i // 4] >> 2 * (i % 4) & 3 for i in range(64))


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_summation_elimination_changes_no_score(group_size: int) -> None:
    stored = Hack2026Codec(128, Hack2026Options(group_size=group_size))
    recomputed = Hack2026Codec(128, Hack2026Options(group_size=group_size, summation_elimination=False))
    k, v = tokens(stored, 2, 5)
    q, p = torch.randn(3, 128), torch.rand(3, 2 * group_size)
    pages, bare = stored.encode(k, v), recomputed.encode(k, v)
    assert torch.equal(bare, pages[:, : recomputed.page_bytes])
    assert torch.equal(stored.scores(q, pages), recomputed.scores(q, bare))
    assert torch.equal(stored.weigh(p, pages), recomputed.weigh(p, bare))
    wrong = pages.clone()
    wrong[:, recomputed.page_bytes :] = 0
    assert not torch.equal(stored.weigh(p, wrong), stored.weigh(p, pages))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_elements_err_by_half_a_scale_or_by_what_fp16_takes(bits: int) -> None:
    codec = Hack2026Codec(64, Hack2026Options(bits=bits))
    k, v = tokens(codec, 1, 0)
    pages = codec.encode(k, v)
    levels = (1 << bits) - 1
    for name, x, stored in zip("kv", (k, v), codec.dense(pages, torch.float64), strict=True):
        scale, minimum = (codec.record.read(pages, f"{name}_{part}")[0].double() for part in ("scale", "minimum"))
        moved = torch.maximum(minimum.abs() * 2.0**-11, levels * scale * 2.0**-10)  # proved in test_hack_quantizer.py
        bound = torch.maximum(scale / 2, moved) + scale * levels * 2.0**-20
        assert bool(((stored - x).abs() <= bound).all())


def test_outlier_channels_cost_v1_but_not_this_format() -> None:
    """Why the authors changed axes: four channels with an offset of 8 (head_dim 128, Pi 64, 2 bits)."""
    gen = torch.Generator().manual_seed(0)
    k, q = torch.randn(1024, 128, generator=gen), torch.randn(32, 128, generator=gen)
    k[:, ::32] += 8
    exact = q @ k.T
    v1, later = HackCodec(128, HackOptions(rounding="nearest")), Hack2026Codec(128)
    errors = [((c.scores(q, c.encode(k, k)) - exact).norm() / exact.norm()).item() for c in (v1, later)]
    assert errors[0] > 1.5 * errors[1]


def test_a_sequence_keeps_four_sinks_and_the_open_block() -> None:
    codec = Hack2026Codec(64)
    assert [codec.num_pages(n) for n in (0, 67, 68, 131, 132)] == [0, 0, 1, 1, 2]
    k, v = torch.randn(2, 5, 64), torch.randn(2, 5, 64)
    seen = codec.see_window(k, v, 4)
    assert seen[0] is k
    assert seen[1] is v
    assert codec.requantize_window(v, 4) is v


def test_names() -> None:
    assert Hack2026Codec(64).name == "hack-2026"
    options = Hack2026Options.parse({"pi": "128", "bits": "2", "se": "0"})
    assert options.name == "hack-2026:pi=128,se=0"
    assert Hack2026Codec(64, options).layout_id == "hack-2026/1 pi=128 bits=2 se=0 D=64"
    for wrong in ({"seed": "1"}, {"pi": "16"}, {"bits": "two"}):
        with pytest.raises(FormatError, match=r"expected .*found"):
            Hack2026Options.parse(wrong)


def test_channel_partitions_follow_the_authors_rule() -> None:
    cases = {(64, 64): 64, (128, 64): 64, (80, 64): 16, (96, 64): 48, (96, 32): 32, (256, 128): 128, (80, 128): 80}
    for (head_dim, group_size), size in cases.items():
        assert channel_partition(head_dim, group_size) == size
    with pytest.raises(UnsupportedError):
        channel_partition(72, 64)
