"""Every peer computes attention on what it stores: compared with float64 on the same numbers."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from homkv.bench.peers import fp8, fp16, kivi, kivi_codes, sdpa, split
from homkv.bench.peers.split import SplitConfig, choose_splits
from homkv.errors import DTypeError, HomkvError, ShapeError, UnsupportedError

LENGTHS = (200, 1, 0, 131)
ROOM = 224  # tokens for which there is room; a multiple of every group


def oracle(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float) -> Tensor:
    """Attention in float64, one sequence at a time; zeros where nothing is stored."""
    out = torch.zeros(q.shape, dtype=torch.float64)
    group = q.shape[1] // k.shape[1]
    for b, n in enumerate(lengths.tolist()):
        rows = q[b].double().cpu().unflatten(0, (-1, group)).squeeze(2)
        keys, values = k[b, :, :n].double().cpu(), v[b, :, :n].double().cpu()
        weights = torch.softmax(scale * rows @ keys.transpose(1, 2), -1)
        out[b] = (weights @ values).flatten(0, 1)[:, None] if n else 0
    return out


def error(o: Tensor, expected: Tensor) -> float:
    return float((o.double().cpu() - expected).norm() / expected.norm())


class Inputs:
    """Queries, keys and values of sequences of unequal length; behind their end the cache is poisoned."""

    def __init__(self, device: torch.device, dim: int = 128, group: int = 4, dtype: torch.dtype = torch.float16):
        batch, heads = len(LENGTHS), 2
        self.q = torch.randn(batch, heads * group, 1, dim).to(dtype).to(device)
        self.k, self.v = ((torch.randn(batch, heads, ROOM, dim) * 2).to(dtype).to(device) for _ in "kv")
        self.lengths = torch.tensor(LENGTHS, dtype=torch.int32, device=device)
        self.scale = dim**-0.5

    def poison(self) -> None:
        for b, n in enumerate(LENGTHS):
            self.k[b, :, n:] = self.v[b, :, n:] = torch.nan


SHAPES = pytest.mark.parametrize(("dim", "group"), [(128, 4), (64, 3), (96, 1), (256, 7), (128, 16)])
CONFIGS = pytest.mark.parametrize("config", [SplitConfig(32, 1, 3, 6), SplitConfig(64, 4, 2, 2)], ids=str)


@SHAPES
def test_fp16_is_attention(device: torch.device, dim: int, group: int) -> None:
    x = Inputs(device, dim, group)
    x.poison()
    o = fp16.attend(x.q, x.k, x.v, x.lengths, x.scale)
    assert o.dtype == x.q.dtype
    assert error(o, oracle(x.q, x.k, x.v, x.lengths, x.scale)) < 1e-3
    assert not o[2].any()


@CONFIGS
def test_fp16_in_bfloat16_and_other_splits(device: torch.device, config: SplitConfig) -> None:
    x = Inputs(device, dtype=torch.bfloat16)
    o = fp16.attend(x.q, x.k, x.v, x.lengths, x.scale, config)
    assert error(o, oracle(x.q, x.k, x.v, x.lengths, x.scale)) < 5e-3


@SHAPES
def test_fp8_is_attention_on_what_it_stores(device: torch.device, dim: int, group: int) -> None:
    x = Inputs(device, dim, group, torch.bfloat16)
    k, v, k_scale, v_scale = fp8.quantize(x.k, x.v)
    dense = (k.double() * k_scale[:, None, None], v.double() * v_scale[:, None, None])
    for b, n in enumerate(LENGTHS):
        k.view(torch.uint8)[b, :, n:] = v.view(torch.uint8)[b, :, n:] = 0x7F  # NaN
    o = fp8.attend(x.q, k, v, x.lengths, x.scale, k_scale, v_scale)
    assert error(o, oracle(x.q, *dense, x.lengths, x.scale)) < 4e-3  # the output is rounded to bfloat16


@CONFIGS
def test_fp8_with_other_splits(device: torch.device, config: SplitConfig) -> None:
    x = Inputs(device)
    k, v, k_scale, v_scale = fp8.quantize(x.k, x.v)
    dense = (k.double() * k_scale[:, None, None], v.double() * v_scale[:, None, None])
    o = fp8.attend(x.q, k, v, x.lengths, x.scale, k_scale, v_scale, config)
    assert error(o, oracle(x.q, *dense, x.lengths, x.scale)) < 1e-3


def test_every_e4m3_is_restored_exactly(device: torch.device) -> None:
    """One token: the output is its value, whatever the weights."""
    codes = torch.arange(256, dtype=torch.uint8)
    codes = torch.where((codes & 0x7F) == 0x7F, 0, codes).to(device).view(2, 1, 1, 128).view(torch.float8_e4m3fn)
    one = torch.ones(1, device=device)
    q = torch.zeros(2, 1, 1, 128, dtype=torch.float16, device=device)
    o = fp8.attend(q, codes, codes, torch.ones(2, dtype=torch.int32, device=device), 1.0, one, one)
    assert torch.equal(o.float().cpu().flatten(), codes.float().cpu().flatten())


def test_fp8_quantization_uses_the_whole_range() -> None:
    k, v = torch.randn(2, 1, 2, 16, 64)
    k8, v8, k_scale, v_scale = fp8.quantize(k, v)
    for x, x8, scale in ((k, k8, k_scale), (v, v8, v_scale)):
        assert x8.float().abs().amax((0, 2, 3)).tolist() == [448.0, 448.0]
        assert error(x8.float() * scale[:, None, None], x.double()) < 0.04


@SHAPES
@pytest.mark.parametrize("tokens", [32, 64])
def test_kivi_is_attention_on_what_it_stores(device: torch.device, dim: int, group: int, tokens: int) -> None:
    x = Inputs(device, dim, group)
    k, v = (torch.nn.functional.pad(t, (0, 0, 0, 256 - ROOM)) for t in (x.k, x.v))
    cache = kivi_codes.quantize(k, v, tokens)
    dense = kivi_codes.dequantize(cache)
    o = kivi.attend(x.q, cache, x.lengths, x.scale)
    assert error(o, oracle(x.q, *dense, x.lengths, x.scale)) < 2e-3
    assert error(dense[0][:, :, :ROOM], x.k.double().cpu()) < 0.5


def test_sdpa_names_its_backend_or_says_why_not() -> None:
    q, k, v = torch.randn(1, 4, 1, 64), torch.randn(1, 2, 9, 64), torch.randn(1, 2, 9, 64)
    o = sdpa.attend(q, k, v, 0.125, "flash")
    assert error(o, oracle(q, k, v, torch.tensor([9]), 0.125)) < 1e-5
    with pytest.raises(UnsupportedError, match="cudnn"):
        sdpa.attend(q, k, v, 0.125, "cudnn")
    with pytest.raises(UnsupportedError, match="flash"):
        sdpa.attend(q, k, v, 0.125, "efficient")


def test_the_number_of_splits_fills_whole_waves() -> None:
    assert choose_splits(64, 1024, 528) == 8  # one wave of 512 programs
    assert choose_splits(256, 1024, 528) == 2
    assert choose_splits(8, 3, 528) == 3  # never more splits than tiles
    assert choose_splits(1024, 1024, 528) == 1
    assert choose_splits(1, 100000, 10000) == split.MAX_SPLITS


def test_the_merge_weighs_splits_by_their_maxima(device: torch.device) -> None:
    part = split.Partials(
        torch.randn(3, 5, 96, device=device), torch.randn(3, 5, device=device) * 9, torch.rand(3, 5, device=device)
    )
    weight = torch.exp2(part.m.double())
    expected = (part.o.double() * weight[..., None]).sum(1) / (part.total.double() * weight).sum(1, keepdim=True)
    o = part.merge(torch.empty(3, 1, 1, 96, device=device))
    assert error(o, expected.cpu()[:, None, None]) < 1e-6


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"q": lambda x: x.q.float()}, DTypeError),
        ({"q": lambda x: x.q[:, :1]}, ShapeError),
        ({"q": lambda x: x.q.repeat(1, 17, 1, 1)}, ShapeError),
        ({"q": lambda x: x.q.repeat(1, 1, 2, 1)}, ShapeError),
        ({"k": lambda x: x.k.bfloat16()}, DTypeError),
        ({"k": lambda x: x.k.transpose(2, 3).contiguous().transpose(2, 3)}, ShapeError),
        ({"v": lambda x: x.v[:, :, :100].contiguous()}, ShapeError),
        ({"lengths": lambda x: x.lengths.long()}, ShapeError),
        ({"lengths": lambda x: x.lengths[:2]}, ShapeError),
    ],
)
def test_wrong_input_is_refused_before_a_launch(device: torch.device, change: dict, kind: type[HomkvError]) -> None:
    x = Inputs(device, group=1)
    arguments = {"q": x.q, "k": x.k, "v": x.v, "lengths": x.lengths}
    arguments |= {name: make(x) for name, make in change.items()}
    with pytest.raises(kind, match="expected"):
        fp16.attend(**arguments, softmax_scale=1.0)
