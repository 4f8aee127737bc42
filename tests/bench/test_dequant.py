"""The dequantizing kernel computes attention on our pages, in any layout a cache may have."""

import pytest
import torch

pytest.importorskip("triton")

from homkv.attention import reference
from homkv.attention.view import LayerView
from homkv.bench.peers import dequant
from homkv.bench.peers.dequant import DequantConfig
from homkv.errors import DTypeError, ShapeError, UnsupportedError
from homkv.formats.rows import RowsCodec
from homkv.spec import RowsSpec
from homkv.testing.inputs import make_tokens, make_view


def shuffled_codec(name: str, dim: int) -> RowsCodec:
    return RowsCodec(dim, RowsSpec.parse(name), torch.randperm(dim).tolist())


def relative_error(
    codec: RowsCodec,
    lengths: list[int],
    group: int,
    device: torch.device,
    *,
    kind: str = "normal",
    dtype: torch.dtype = torch.float16,
    config: DequantConfig | None = None,
) -> float:
    view = make_view(codec, lengths, kind=kind, exact_dtype=torch.float16)
    q = make_tokens("normal", len(lengths), 2 * group, 1, codec.head_dim, seed=77).to(dtype)
    exact, _ = reference.oracle(q, view, codec, codec.head_dim**-0.5)
    there = LayerView(**{name: tensor.to(device) for name, tensor in vars(view).items()})
    o = dequant.attend(q.to(device), there, codec, codec.head_dim**-0.5, config)
    assert o.shape == q.shape
    assert o.dtype == torch.float32
    return float((o.double().cpu() - exact.nan_to_num()).norm() / exact.nan_to_num().norm())


@pytest.mark.parametrize(
    ("name", "dim", "group"),
    [
        ("small", 128, 4),
        ("balanced", 128, 8),
        ("quality", 128, 3),
        ("int8", 64, 16),
        ("near-lossless", 64, 1),
        ("small", 96, 5),
        ("k0482v2084", 80, 2),
        ("balanced", 256, 4),
    ],
)
def test_it_is_attention_on_the_pages(device: torch.device, name: str, dim: int, group: int) -> None:
    assert relative_error(shuffled_codec(name, dim), [200, 68], group, device) < 1e-3


def test_sequences_may_be_empty_short_or_uneven(device: torch.device) -> None:
    codec = shuffled_codec("small", 64)
    assert relative_error(codec, [0, 1, 67, 132, 330], 3, device, dtype=torch.bfloat16) < 1e-3


# Tiny values are at the end of the format's scales: the page holds +-32 steps, whose mean is a hundred times smaller.
@pytest.mark.parametrize(
    ("kind", "tolerance"), [("outliers", 1e-3), ("constant", 1e-3), ("tiny", 2e-2), ("huge", 3e-3)]
)
def test_extreme_values_keep_their_precision(device: torch.device, kind: str, tolerance: float) -> None:
    assert relative_error(shuffled_codec("balanced", 64), [270], 2, device, kind=kind) < tolerance


@pytest.mark.parametrize("programs", [1, 3])
def test_the_number_of_splits_does_not_matter(device: torch.device, programs: int) -> None:
    codec = shuffled_codec("balanced", 64)
    assert relative_error(codec, [600, 200], 4, device, config=DequantConfig(programs)) < 1e-3


def test_wrong_input_is_refused(device: torch.device) -> None:
    codec = shuffled_codec("small", 64)
    view = LayerView(**{name: x.to(device) for name, x in vars(make_view(codec, [200])).items()})
    q = torch.randn(1, 4, 1, 64, dtype=torch.float16, device=device)
    with pytest.raises(DTypeError, match="16 bits"):
        dequant.attend(q.float(), view, codec, 1.0)
    with pytest.raises(UnsupportedError, match="one token"):
        dequant.attend(q.repeat(1, 1, 2, 1), view, codec, 1.0)
    with pytest.raises(ShapeError):
        dequant.attend(q, view, shuffled_codec("balanced", 64), 1.0)
