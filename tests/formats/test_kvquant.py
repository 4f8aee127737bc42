"""KVQuant: RoPE undone and redone, levels that no others beat, outliers that stay, every byte counted."""

import cmath
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from homkv.errors import FormatError, UnsupportedError
from homkv.formats import make_codec
from homkv.formats.kvquant import KvquantCodec, KvquantOptions, fit_levels, quantize_vectors
from homkv.formats.rotary import Rotation
from homkv.rope import RopeSpec, default_rope, no_rope
from homkv.testing.inputs import KINDS, make_tokens

ROPE = default_rope(64)


@pytest.mark.parametrize("pairing", ["half", "interleaved"])
def test_rotation_is_the_models_and_its_own_inverse(pairing: str) -> None:
    rope = RopeSpec(6, 4, pairing, (1.0, 0.01))  # type: ignore[arg-type]
    x, position = torch.randn(3, 6, dtype=torch.float64), torch.tensor([0, 1, 100_000])
    turned = Rotation(rope).apply(x, position)
    for t, (p, (a, b)) in itertools.product(range(3), enumerate(rope.pairs())):
        expected = complex(x[t, a], x[t, b]) * cmath.rect(1.0, int(position[t]) * rope.inv_freq[p])
        assert abs(complex(turned[t, a], turned[t, b]) - expected) < 1e-9
    assert torch.equal(turned[:, 4:], x[:, 4:])
    torch.testing.assert_close(Rotation(rope).apply(turned, position, inverse=True), x, atol=1e-12, rtol=0)
    assert Rotation(no_rope(6)).apply(x, position) is x


def test_keys_of_one_content_cost_nothing_before_rope_and_much_after() -> None:
    """The paper's reason: RoPE makes a constant channel vary from token to token."""
    k = Rotation(ROPE).apply(torch.linspace(-2, 3, 64).repeat(128, 1), torch.arange(1, 129))
    v = torch.zeros(128, 64)
    errors = []
    for rope in ("before", "after"):
        codec = KvquantCodec(64, KvquantOptions(rope=rope), ROPE)
        errors.append((codec.dense(codec.encode(k, v, 1))[0] - k).abs().max().item())
    assert errors[0] < 2e-3
    assert errors[1] > 0.1


def test_positions_travel_in_the_page() -> None:
    codec = KvquantCodec(64, None, ROPE)
    k, v = (make_tokens("normal", 2, 256, 64, seed=s) for s in (1, 2))
    at_once = codec.encode(k, v, 1001)
    later = codec.encode(k[:, 128:], v[:, 128:], 1129)
    assert torch.equal(at_once[:, 1:], later)
    assert codec.record.read(at_once, "position").flatten().tolist() == [1001, 1129] * 2
    shuffled = at_once[:, [1, 0]]
    assert torch.equal(codec.dense(shuffled)[0][:, :128], codec.dense(at_once)[0][:, 128:])


def cost(z: list[float], weight: list[float], levels: list[float]) -> float:
    return sum(w * min((x - level) ** 2 for level in levels) for x, w in zip(z, weight, strict=True))


@settings(max_examples=40, deadline=None)
@given(
    values=st.lists(st.tuples(st.floats(-1, 1), st.floats(0, 4)), min_size=1, max_size=40), bits=st.sampled_from((1, 2))
)
def test_levels_are_a_fixed_point_and_never_worse_than_even_ones(values: list[tuple[float, float]], bits: int) -> None:
    z, weight = (list(x) for x in zip(*values, strict=True))
    found = fit_levels(torch.tensor(z).double(), torch.tensor(weight).double(), bits)
    assert found.shape == (2**bits,)
    assert bool((found.diff() >= -1e-15 * found.abs().max()).all())  # equal levels may differ by a rounding
    levels = found.tolist()
    edges = (found[1:] + found[:-1]) / 2
    code = torch.searchsorted(edges, torch.tensor(z).double()).tolist()
    means = []
    for i, level in enumerate(levels):
        mass = sum(w for w, c in zip(weight, code, strict=True) if c == i)
        moment = sum(w * x for x, w, c in zip(z, weight, code, strict=True) if c == i)
        means.append(moment / mass if mass > 1e-12 else level)
    assert cost(z, weight, means) >= cost(z, weight, levels) * (1 - 1e-6) - 1e-9  # another Lloyd step gains nothing


def test_levels_of_a_known_distribution() -> None:
    """Lloyd-Max for a normal variable: +-0.4528 and +-1.510 (Max 1960)."""
    z = torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(100_001).double() + 0.5) / 100_001)
    found = fit_levels(z, torch.ones_like(z), 2)
    torch.testing.assert_close(found, torch.tensor([-1.510, -0.4528, 0.4528, 1.510]).double(), atol=3e-3, rtol=0)


def test_weights_count() -> None:
    z, heavy = torch.tensor([-1.0, -0.9, 0.9, 1.0]), torch.tensor([1.0, 3.0, 3.0, 1.0])
    torch.testing.assert_close(fit_levels(z, heavy, 1), torch.tensor([-0.925, 0.925]).double())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_every_element_is_at_its_nearest_level_and_outliers_are_exact(kind: str, bits: int) -> None:
    x = make_tokens(kind, 2, 16, 128, seed=3)
    vectors = quantize_vectors(x, bits, 2)
    found = vectors.dense(torch.float64)
    offset, radius = (part.double().unsqueeze(-1) for part in (vectors.offset, vectors.radius))
    candidates = offset.unsqueeze(-1) + radius.unsqueeze(-1) * vectors.level.double()[:, None, None]
    nearest = (candidates - x.double().unsqueeze(-1)).abs().amin(-1)
    outlier = torch.zeros_like(x, dtype=torch.bool).scatter(-1, vectors.index.long(), True)
    assert bool((outlier.sum(-1) == 2).all())
    slack = 1e-6 * (x.abs().double() + radius)  # float32's rounding of z
    assert bool(((found - x).abs() <= nearest + slack)[~outlier].all())
    assert torch.equal(found[outlier], x[outlier].half().double())
    far = (x - x.median(-1, keepdim=True).values).abs()
    assert bool((far.masked_fill(outlier, 0).amax(-1) <= far.masked_fill(~outlier, torch.inf).amin(-1)).all())


@pytest.mark.parametrize(("bits", "head_dim", "page"), [(2, 64, 128), (3, 128, 128), (4, 96, 64)])
def test_bytes(bits: int, head_dim: int, page: int) -> None:
    codec = KvquantCodec(head_dim, KvquantOptions(bits=bits, page=page), default_rope(head_dim))
    vectors = head_dim + page  # channels of K and tokens of V, each with offset, radius and one outlier of 3 bytes
    assert codec.page_bytes == 4 + 2 * page * head_dim * bits // 8 + vectors * (4 + 3) + 2 * 2 * 2**bits
    x = torch.zeros(page, head_dim)
    assert codec.encode(x, x).shape == (1, codec.page_bytes)
    bare = KvquantCodec(head_dim, KvquantOptions(bits=bits, page=page, outliers=0))
    assert bare.page_bytes == codec.page_bytes - 3 * vectors


def test_names_ropes_and_refusals() -> None:
    assert make_codec("kvquant:bits=3", 64, ROPE).name == "kvquant:bits=3"
    assert make_codec("kvquant", 64, ROPE).layout_id != make_codec("kvquant", 64, default_rope(64, 1e6)).layout_id
    with pytest.raises(FormatError, match="RopeSpec"):
        make_codec("kvquant", 64, list(range(64)))
    with pytest.raises(UnsupportedError, match="found 260"):
        make_codec("kvquant", 260)
    codec, zero = make_codec("kvquant", 64, ROPE), torch.zeros(128, 64)
    for bad in (float("nan"), 1e6):
        with pytest.raises(FormatError):
            codec.encode(zero, zero + bad)
