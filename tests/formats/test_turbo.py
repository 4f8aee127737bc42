"""TurboQuant-like: levels that are optimal, the paper's distortion, nearest levels, the norm."""

import pytest
import torch

from homkv.errors import FormatError, UnsupportedError
from homkv.formats import make_codec
from homkv.formats.turbo import NORMAL_LEVELS, TurboCodec, TurboOptions
from homkv.quant import hadamard
from homkv.testing.inputs import KINDS, make_tokens


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_levels_are_the_means_of_their_cells(bits: int) -> None:
    """Lloyd's condition for a normal variable, on a fine grid."""
    z = torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(1_000_001).double() + 0.5) / 1_000_001)
    upper = torch.tensor(NORMAL_LEVELS[bits]).double()
    level = torch.cat((-upper.flip(0), upper))
    code = torch.bucketize(z, (level[1:] + level[:-1]) / 2)
    mean = torch.zeros_like(level).index_add(0, code, z) / torch.bincount(code)
    torch.testing.assert_close(mean, level, atol=2e-3, rtol=0)


@pytest.mark.parametrize(("bits", "distortion"), [(2, 0.117), (3, 0.03), (4, 0.009)])
def test_distortion_is_the_papers_for_any_vector(bits: int, distortion: float) -> None:
    """Theorem 1: mean |x - dense|^2 / |x|^2, here also for channels of very different width."""
    codec = TurboCodec(128, TurboOptions(bits=bits))
    for width in (torch.ones(128), torch.randn(128).exp()):
        x = make_tokens("normal", 8, 64, 128, seed=4) * width
        found = codec.dense(codec.encode(x, x))[1]
        error = ((found - x).norm(dim=-1) / x.norm(dim=-1)).square().mean().item()
        assert error == pytest.approx(distortion, rel=0.2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_every_rotated_coordinate_is_at_its_nearest_level(kind: str, head_dim: int) -> None:
    codec = TurboCodec(head_dim, TurboOptions(bits=3, seed=5))
    x = make_tokens(kind, 2, 64, head_dim, seed=1)
    pages = codec.encode(x, x)
    block, sign = head_dim & -head_dim, codec._sign.double()
    norm = (x.norm(dim=-1, keepdim=True) / head_dim**0.5).half().double()
    found, true = (hadamard(part.double() * sign, block) for part in (codec.dense(pages, torch.float64)[0], x))
    candidates = norm.unsqueeze(-1) * codec._level
    nearest = (candidates - true.unsqueeze(-1)).abs().amin(-1)
    assert bool(((found - true).abs() <= nearest + 1e-4 * norm + 2.0**-24).all())


def test_bytes_names_and_refusals() -> None:
    for bits in (2, 3, 4):
        codec = TurboCodec(128, TurboOptions(bits=bits))
        assert codec.page_bytes == 2 * 64 * (128 * bits // 8 + 2)
    assert make_codec("turbo:bits=4,seed=0", 64).name == "turbo"
    assert make_codec("turbo:bits=3", 64).name == "turbo:bits=3"
    x = make_tokens("normal", 64, 64)
    one, two = (make_codec(f"turbo:seed={seed}", 64).encode(x, x) for seed in (1, 2))
    assert not torch.equal(one, two)
    with pytest.raises(FormatError, match="bits=2"):
        make_codec("turbo:bits=5", 64)
    with pytest.raises(UnsupportedError, match="found 72"):
        make_codec("turbo", 72)
    for bad in (float("inf"), 1e6):
        with pytest.raises(FormatError):
            make_codec("turbo", 64).encode(x, x + bad)
