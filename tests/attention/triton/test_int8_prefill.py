"""Int8 prefill against exact causal attention in float64, and the choice of the exact backend."""

from itertools import product

import pytest
import torch
from chosen import cases
from torch import Tensor

from homkv.attention.triton import prefill, tiles
from homkv.attention.triton.prefill import CausalConfig, causal_int8, exact
from homkv.errors import DTypeError, ShapeError, UnsupportedError
from homkv.testing.inputs import make_tokens

HEADS = 2
SHARP = 4.0  # queries this much longer put the weight on a few keys


def oracle(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    group, length = q.shape[1] // k.shape[1], q.shape[2]
    q, k, v = q.double(), k.double().repeat_interleave(group, 1), v.double().repeat_interleave(group, 1)
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    return torch.softmax((q @ k.transpose(-1, -2) * scale).masked_fill(future, -torch.inf), -1) @ v


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.cpu().double() - wanted).norm() / wanted.norm().clamp_min(1e-30))


def prompt(
    length: int, dim: int, group: int = 2, batch: int = 1, kind: str = "normal"
) -> tuple[Tensor, Tensor, Tensor]:
    q = make_tokens("normal", batch, HEADS * group, length, dim, seed=1)
    k, v = (make_tokens(kind, batch, HEADS, length, dim, seed=seed) for seed in (2, 3))
    return q.half(), k.half(), v.half()


def run(tokens: tuple[Tensor, Tensor, Tensor], device: torch.device, **options: int | bool) -> Tensor:
    q, k, v = (x.to(device) for x in tokens)
    config = CausalConfig(**options) if options else None
    o = causal_int8(q, k, v, q.shape[-1] ** -0.5, config)
    assert o.dtype == q.dtype
    assert o.shape == q.shape
    return o.cpu()


def assert_accurate(tokens: tuple[Tensor, Tensor, Tensor], found: Tensor, bound: float = 0.02) -> None:
    assert error(found, oracle(*tokens, tokens[0].shape[-1] ** -0.5)) <= bound


@pytest.mark.parametrize("length", cases([1, 2, 63, 64, 65, 128, 129, 300], [1, 64, 65, 129, 300]))
def test_every_length(length: int, device: torch.device) -> None:
    tokens = prompt(length, 64)
    assert_accurate(tokens, run(tokens, device))


@pytest.mark.parametrize("dim", cases([64, 80, 96, 128, 256], [80, 128, 256]))
def test_every_head_dim(dim: int, device: torch.device) -> None:
    tokens = prompt(140, dim)
    assert_accurate(tokens, run(tokens, device))


@pytest.mark.parametrize("group", cases([1, 3, 4, 7], [1, 7]))
def test_every_group_in_a_batch(group: int, device: torch.device) -> None:
    tokens = prompt(100, 64, group, batch=3)
    assert_accurate(tokens, run(tokens, device))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes_and_strides(dtype: torch.dtype, device: torch.device) -> None:
    q, k, v = (x.to(dtype).transpose(1, 2).contiguous().transpose(1, 2) for x in prompt(130, 64, batch=2))
    assert not q.is_contiguous()
    assert_accurate((q, k, v), run((q, k, v), device))


@pytest.mark.parametrize(
    ("rows", "keys", "exact_sum"),
    cases(product((64, 128), (64, 128), (True, False)), [(64, 64, True), (64, 128, False), (128, 128, True)]),
)
def test_tiles_change_the_rounding_only(rows: int, keys: int, exact_sum: bool, device: torch.device) -> None:
    tokens = prompt(300, 64)
    assert_accurate(tokens, run(tokens, device, rows=rows, keys=keys, exact_sum=exact_sum))


def test_error_next_to_float16s(device: torch.device) -> None:
    """Rounding to 8 bits costs about 1.5 % of the output on normal keys, 60 times what float16 costs."""
    q, k, v = prompt(400, 128, kind="normal")
    wanted = oracle(q, k, v, 128**-0.5)
    half = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert error(half, wanted) <= 5e-4
    assert error(run((q, k, v), device), wanted) <= 0.017
    q = (q * SHARP).half()
    assert error(run((q, k, v), device), oracle(q, k, v, 128**-0.5)) <= 0.03


def test_offsets_of_channels_do_no_harm(device: torch.device) -> None:
    """A few channels at 150, as a bias makes them: without their mean, keys and values are as easy as normal ones.

    Rounded as they are, in steps of 150 / 127, such keys lose what tells them apart.
    """
    q, k, v = prompt(300, 128)
    offset = torch.where(torch.arange(128) % 16 == 3, 150.0, 0.0)
    far_k, far_v = (k + offset).half(), (v + offset).half()
    wanted = oracle(q, far_k, far_v, 128**-0.5)
    # What the offset adds to every output hides errors: they are measured against the part that differs by token.
    deviation = error(run((q, far_k, far_v), device), wanted) * float(wanted.norm() / (wanted - offset).norm())
    assert deviation <= 0.05
    coarse = far_k.float().abs().amax((-1, -2), keepdim=True) / 127
    without = oracle(q, (far_k / coarse).round() * coarse, far_v, 128**-0.5)
    assert error(without, wanted) * float(wanted.norm() / (wanted - offset).norm()) >= 0.2


def test_a_wide_channel_and_a_loud_token(device: torch.device) -> None:
    """Scales per channel keep small channels of V; scales per 128 tokens keep quiet tokens."""
    q, k, v = prompt(400, 64)
    v = (v * torch.where(torch.arange(64) == 5, 100.0, 1.0)).half()
    v[:, :, 3] *= 50
    o, wanted = run((q, k, v), device), oracle(q, k, v, 0.125)
    quiet = torch.arange(64) != 5
    assert error(o[:, :, 256:, quiet], wanted[:, :, 256:, quiet]) <= 0.05


@pytest.mark.parametrize("kind", ["constant", "zeros", "outliers"])
def test_extreme_values(kind: str, device: torch.device) -> None:
    tokens = prompt(200, 64, kind=kind)
    assert_accurate(tokens, run(tokens, device))


def test_enormous_scores_stay_in_range(device: torch.device) -> None:
    """No weight may pass 127 and wrap around: outputs stay inside the range of the values."""
    q, k, v = prompt(300, 64, kind="huge")
    o = run((q, k, v.clamp(-1, 1)), device)
    assert bool(torch.isfinite(o).all())
    assert float(o.abs().max()) <= 1.02


def test_zero_queries_average_the_values(device: torch.device) -> None:
    _, k, v = prompt(200, 64)
    found = run((torch.zeros(1, HEADS, 200, 64).half(), k, v), device)
    wanted = v.double().cumsum(2) / torch.arange(1, 201).unsqueeze(-1)
    assert error(found, wanted) <= 0.02


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_number_is_not_hidden(bad: float, device: torch.device) -> None:
    q, k, v = prompt(300, 64)
    q[0, 0, 7, 3] = bad
    o = run((q, k, v), device)
    assert bool(o[0, 0, 7].isnan().all())
    assert not bool(o[0, 1:].isnan().any())
    k[0, 0, 140, 3] = bad
    o = run((q, k, v), device)
    assert bool(o[0, :2, 140:].isnan().all())
    assert not bool(o[0, 2:].isnan().any())


def test_stored_order_is_a_permutation() -> None:
    position = torch.arange(128)
    token = position // 16 * 16 + position // 2 % 2 * 8 + position // 4 % 4 * 2 + position % 2
    assert sorted(token.tolist()) == list(range(128))
    regrouped = torch.arange(128).reshape(8, 2, 4, 2).permute(0, 2, 1, 3).flatten()
    assert torch.equal(regrouped, token)
    assert tiles.TILE == 128


@pytest.mark.parametrize("group", [1, 4])
def test_exact_is_exact(group: int, device: torch.device) -> None:
    q, k, v = prompt(150, 64, group, batch=2)
    assert error(exact(*(x.to(device) for x in (q, k, v)), 0.125), oracle(q, k, v, 0.125)) <= 5e-4


def test_the_exact_backend_is_left_to_torch_where_there_is_no_choice() -> None:
    assert prefill.exact_backend(*prompt(8, 64)) is None


def test_nothing_to_do(device: torch.device) -> None:
    q, k, v = prompt(0, 64)
    assert run((q, k, v), device).shape == (1, 4, 0, 64)


def test_wrong_input_is_refused(device: torch.device) -> None:
    q, k, v = (x.to(device) for x in prompt(20, 64))
    for compute in (causal_int8, exact):
        with pytest.raises(ShapeError, match="H a multiple of G"):
            compute(q[:, :3], k, v, 0.1)
        with pytest.raises(ShapeError, match="H a multiple of G"):
            compute(q, k[:, :, :10], v[:, :, :10], 0.1)
        with pytest.raises(ShapeError, match="H a multiple of G"):
            compute(q, k, v[..., :32], 0.1)
        with pytest.raises(DTypeError, match="one dtype"):
            compute(q, k.float(), v, 0.1)
        with pytest.raises(DTypeError, match="one dtype"):
            compute(q.double(), k.double(), v.double(), 0.1)
        with pytest.raises(ShapeError, match="softmax_scale"):
            compute(q, k, v, float("nan"))
    with pytest.raises(UnsupportedError, match="head_dim"):
        causal_int8(q[..., :48], k[..., :48], v[..., :48], 0.1)
    with pytest.raises(ShapeError, match="contiguous channels"):
        causal_int8(*(x.repeat(1, 1, 1, 2)[..., ::2] for x in (q, k, v)), 0.1)
    with pytest.raises(UnsupportedError, match="expected tensors on"):
        causal_int8(q.to("meta"), k.to("meta"), v.to("meta"), 0.1)


def test_too_many_rows_are_refused(device: torch.device) -> None:
    """Shapes alone decide: nothing of this size is allocated."""
    q, k = (torch.empty(64, device=device).half().expand(70_000, heads, 1, 64) for heads in (2, 1))
    with pytest.raises(UnsupportedError, match="split the batch"):
        prefill.check_prefill(q, k, k, 0.1)
