"""16-bit pages: what goes in comes out."""

import pytest
import torch

from homkv.errors import FormatError, ShapeError
from homkv.formats import make_codec
from homkv.formats.exact import EXACT_DTYPES
from homkv.testing.inputs import make_tokens


@pytest.mark.parametrize("name", EXACT_DTYPES)
@pytest.mark.parametrize("head_dim", [48, 64, 128])
def test_values_of_the_same_dtype_survive(name: str, head_dim: int) -> None:
    codec = make_codec(name, head_dim)
    k, v = (make_tokens("outliers", 2, 128, head_dim, seed=s).to(EXACT_DTYPES[name]) for s in (1, 2))
    pages = codec.encode(k, v)
    assert pages.shape == (2, 2, 64 * head_dim * 2 * 2)
    found_k, found_v = codec.dense(pages)
    assert torch.equal(found_k, k.float())
    assert torch.equal(found_v, v.float())


def test_keys_lie_before_values_little_endian() -> None:
    codec = make_codec("fp16", 64)
    k = torch.arange(64 * 64).reshape(64, 64) / 2
    page = codec.encode(k, -k)[0]
    assert torch.equal(page[: 2 * 64 * 64].view(torch.float16).float(), k.to(torch.float16).flatten().float())
    assert page[2:4].tolist() == [0x00, 0x38]  # 0.5


@pytest.mark.parametrize(("value", "name"), [(float("nan"), "bf16"), (float("inf"), "fp16"), (1e5, "fp16")])
def test_values_that_do_not_fit_are_refused(value: float, name: str) -> None:
    codec = make_codec(name, 64)
    x = torch.zeros(64, 64)
    bad = x.clone()
    bad[3, 3] = value
    for pair in ((bad, x), (x, bad)):
        with pytest.raises(FormatError, match="finite"):
            codec.encode(*pair)


def test_wrong_pages_are_refused() -> None:
    with pytest.raises(ShapeError, match="another format"):
        make_codec("fp16", 64).dense(torch.zeros(1, 64, dtype=torch.uint8))
