"""DecoQuant: the factors multiply back, outliers move into the small one, bounds, bytes."""

import pytest
import torch

from homkv.errors import FormatError, UnsupportedError
from homkv.formats import make_codec
from homkv.formats.decoquant import CORE, DecoquantCodec, DecoquantOptions, split
from homkv.testing.inputs import KINDS, make_tokens


@pytest.mark.parametrize("kind", KINDS)
def test_factors_multiply_back_and_share_the_singular_values(kind: str) -> None:
    x = make_tokens(kind, 3, 64, 96, seed=2)
    large, small = split(x)
    rows = large.double().unflatten(-1, (-1, CORE))
    back = (rows @ small.double().unsqueeze(-3)).flatten(-2)
    assert (back - x).abs().max() <= 3e-6 * x.abs().max() * CORE
    energy = rows.flatten(1, 2).square().mean(1)  # of the large factor's columns
    other = small.double().square().sum(-1)
    significant = other > 1e-4 * other.amax(-1, keepdim=True)
    assert bool(((energy / other.clamp_min(1e-30) - 1).abs() < 1e-2)[significant].all() or kind == "zeros")


def test_a_wide_channel_ends_up_in_the_small_factor() -> None:
    """The paper's reason: the large factor has fewer outliers, so it can be quantized."""
    x = make_tokens("normal", 256, 64)
    x[:, 5::16] *= 40
    large, _ = split(x)
    peak = [(part.abs().amax(-1) / part.norm(dim=-1)).mean().item() for part in (x, large)]
    assert peak[1] < peak[0]
    codec = DecoquantCodec(64)
    error = (codec.dense(codec.encode(x, x))[0] - x).norm()
    scale = x.abs().amax(-1, keepdim=True) / 7
    plain = ((x / scale).round() * scale - x).norm()
    assert error < 0.8 * plain


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_no_element_is_off_by_more_than_its_row_allows(kind: str, bits: int) -> None:
    """Half a step of the large factor times the column sums of the small one, plus what fp16 took."""
    codec = DecoquantCodec(64, DecoquantOptions(bits=bits, page=64))
    x = make_tokens(kind, 2, 64, 64, seed=1)
    pages = codec.encode(x, x)
    found = codec.dense(pages, torch.float64)[1]
    scale = codec.record.read(pages, "v_scale").double()[:, 0, :, None, None]
    small = codec.record.read(pages, "v_small").double()[:, 0, None, None]
    large = split(x)[0].double().unflatten(-1, (-1, CORE))
    half = scale / 2 + 2.0**-11 * large.abs() + 2.0**-24  # a step rounded down cuts the largest code
    bound = (
        half @ small.abs() + 2.0**-11 * (large.abs() @ small.abs()) + 2.0**-24 * large.abs().sum(-1, keepdim=True)
    ).flatten(-2)
    assert bool(((found - x).abs() <= bound + 1e-5 * x.abs().max()).all())


def test_bytes_names_and_refusals() -> None:
    codec = DecoquantCodec(128)
    assert codec.page_bytes == 2 * (256 * 128 // 2 + 256 * 2 + CORE * CORE * 2)
    assert codec.bits_per_element(1 << 20) == pytest.approx(4 + 16 / 128 + 16 * 256 / (256 * 128), abs=0.01)
    assert make_codec("decoquant:bits=3,page=128", 64).name == "decoquant:bits=3,page=128"
    with pytest.raises(FormatError, match="bits=2"):
        make_codec("decoquant:bits=5", 64)
    with pytest.raises(UnsupportedError, match="found 72"):
        make_codec("decoquant", 72)
    with pytest.raises(FormatError, match="finite"):
        codec.encode(torch.zeros(256, 128), torch.full((256, 128), float("nan")))
