"""Quantized prefill against the naive computation on what the codes stand for."""

import pytest
import torch
from torch import Tensor

from homkv.errors import ShapeError
from homkv.formats.base import UNROUNDED
from homkv.formats.hack import HackCodec, HackOptions
from homkv.formats.hack_prefill import quantized_prefill

SCALE = 64**-0.5


def prompt(num_tokens: int, heads: int = 6, groups: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(1, heads, num_tokens, 64), *(torch.randn(1, groups, num_tokens, 64) for _ in "kv")


def naive(q: Tensor, k: Tensor, v: Tensor, causal_offset: int = 0) -> Tensor:
    """Causal attention in float64."""
    k, v = (x.double().repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q.double() @ k.transpose(-1, -2) * SCALE
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1 + causal_offset)
    return torch.softmax(scores.masked_fill(hidden, -torch.inf), -1) @ v


def stored(codec: HackCodec, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values as pages and window show them."""
    whole = k.shape[2] // codec.page_tokens * codec.page_tokens
    k_pages, v_pages = codec.dense(codec.encode(k[:, :, :whole], v[:, :, :whole]), torch.float64)
    v_window = codec.requantize_window(v[:, :, whole:], whole)
    k_window, v_window = codec.see_window(k[:, :, whole:], v_window, whole)
    return torch.cat((k_pages, k_window.double()), 2), torch.cat((v_pages, v_window.double()), 2)


@pytest.mark.parametrize("num_tokens", [1, 31, 32, 33, 100])
@pytest.mark.parametrize("eliminate", [True, False])
def test_unrounded_it_is_attention_on_the_dense_values(num_tokens: int, eliminate: bool) -> None:
    codec = HackCodec(64, HackOptions(group_size=32, requantization_elimination=eliminate, prefill="int8"))
    q, k, v = prompt(num_tokens)
    got = quantized_prefill(q, k, v, codec, SCALE, rounding=UNROUNDED, dtype=torch.float64)
    want = naive(q, *stored(codec, k, v))
    # The window's dense keys are float32 by contract; everything else is float64.
    assert (got - want).abs().max() <= (1e-12 if num_tokens % 32 == 0 else 1e-6)


def test_at_eight_bits_it_is_close_to_exact_attention() -> None:
    q, k, v = prompt(200)
    got = quantized_prefill(q, k, v, HackCodec(64, HackOptions(bits=8, prefill="int8")), SCALE)
    want = naive(q, k, v)
    assert ((got - want).norm() / want.norm()).item() < 0.02


def test_eight_bit_queries_and_weights_add_little_at_two_bits() -> None:
    codec = HackCodec(64, HackOptions(prefill="int8"))
    q, k, v = prompt(150)
    got = quantized_prefill(q, k, v, codec, SCALE)
    want = naive(q, *stored(codec, k, v))
    assert 0 < ((got - want).norm() / want.norm()).item() < 0.01


def test_an_offset_continues_a_prompt() -> None:
    codec = HackCodec(64, HackOptions(group_size=32, prefill="int8"))
    q, k, v = prompt(70)
    whole = quantized_prefill(q, k, v, codec, SCALE)
    rest = quantized_prefill(q[:, :, 50:], k, v, codec, SCALE, causal_offset=50)
    torch.testing.assert_close(rest, whole[:, :, 50:], rtol=0, atol=1e-5)


def test_later_blocks_do_not_reach_back() -> None:
    codec = HackCodec(64, HackOptions(group_size=32, prefill="int8"))
    q, k, v = prompt(96)
    before = quantized_prefill(q, k, v, codec, SCALE)
    k[:, :, 64:] += 5
    v[:, :, 64:] -= 5
    after = quantized_prefill(q, k, v, codec, SCALE)
    assert torch.equal(after[:, :, :64], before[:, :, :64])
    assert not torch.equal(after[:, :, 64:], before[:, :, 64:])


def test_shapes_are_checked() -> None:
    q, k, v = prompt(10)
    codec = HackCodec(64)
    for bad in ((q, k[:, :, :9], v[:, :, :9]), (q[:, :5], k, v), (q[0], k[0], v[0]), (q, k, v[..., :32])):
        with pytest.raises(ShapeError, match="expected q"):
            quantized_prefill(*bad, codec, SCALE)
