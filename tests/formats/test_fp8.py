"""fp8: codes by hand, the format's own error bound, extremes."""

import pytest
import torch

from homkv.errors import FormatError
from homkv.formats import make_codec
from homkv.testing.inputs import KINDS, make_tokens


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head_dim", [48, 64, 128])
def test_no_element_is_off_by_more_than_a_sixteenth(kind: str, head_dim: int) -> None:
    """3 mantissa bits: half a step is 2^-4 of the value; below 2^-6 scale the step is 2^-9 scale."""
    codec = make_codec("fp8", head_dim)
    k, v = (make_tokens(kind, 2, 128, head_dim, seed=s) for s in (1, 2))
    for x, found in zip((k, v), codec.dense(codec.encode(k, v), torch.float64), strict=True):
        scale = x.unflatten(1, (-1, 64)).abs().amax((-2, -1), keepdim=True).double() / 448
        bound = torch.maximum(x.double().abs() * 2.0**-4, (scale * 2.0**-10).expand(2, 2, 64, head_dim).flatten(1, 2))
        assert bool(((found - x).abs() <= bound * (1 + 1e-6)).all())


def test_a_page_by_hand() -> None:
    codec = make_codec("fp8", 64)
    k = torch.zeros(64, 64)
    k[0, 0], k[0, 1], k[0, 2], k[63, 63] = 896, 3.0, -2.125, -896  # scale 2: e4m3 448, 1.5, -1.0625 (to even: -1), -448
    page = codec.encode(k, torch.full((64, 64), 7.0))[0]
    assert page.shape == (codec.page_bytes,) == (2 * 64 * 64 + 8,)
    assert page[:3].tolist() == [0x7E, 0x3C, 0xB8]
    assert page[64 * 64 - 1].item() == 0xFE
    assert page[-8:].view(torch.float32).tolist() == [2.0, 7 / 448]
    assert codec.dense(page[None])[0][0, 2].item() == -2.0
    assert torch.equal(codec.dense(page[None])[1], torch.full((64, 64), 7.0))


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_what_is_not_finite_is_refused(value: float) -> None:
    bad = torch.zeros(64, 64)
    bad[5, 5] = value
    with pytest.raises(FormatError, match="finite"):
        make_codec("fp8", 64).encode(torch.zeros(64, 64), bad)
