"""Native attention against the readable integer path, on every instruction set and in every shape."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native_cases import COMBINATIONS, ISAS, isas, make_codec, needs_kernel
from torch import Tensor

from homkv.attention import cpu, reference
from homkv.attention.view import LayerView
from homkv.formats.rows import RowsCodec
from homkv.spec import DIGITS, HEAD_DIMS, PRESETS
from homkv.testing.cases import CASES, GROUPS, RAGGED, Case
from homkv.testing.compare import assert_as_accurate, max_error
from homkv.testing.inputs import make_tokens, make_view

pytestmark = needs_kernel

Inputs = tuple[Tensor, LayerView, RowsCodec, float]
Results = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]


@cache
def make_inputs(name: str, head_dim: int, lengths: tuple[int, ...], group: int, num_tokens: int = 1) -> Inputs:
    codec = make_codec(name, head_dim)
    view = make_view(codec, list(lengths), 2, exact_dtype=torch.bfloat16)
    return queries(view, 2 * group, num_tokens), view, codec, head_dim**-0.5


@cache
def reference_results(name: str, head_dim: int, lengths: tuple[int, ...], group: int, num_tokens: int = 1) -> Results:
    inputs = make_inputs(name, head_dim, lengths, group, num_tokens)
    return reference.attend(*inputs), reference.attend(*inputs, dtype=torch.float64)


def queries(view: LayerView, num_q_heads: int, num_tokens: int = 1, seed: int = 77) -> Tensor:
    return make_tokens("normal", view.slots.shape[0], num_q_heads, num_tokens, view.exact_k.shape[-1], seed=seed)


def native(q: Tensor, view: LayerView, codec: RowsCodec, scale: float, **options: object) -> tuple[Tensor, Tensor]:
    return cpu.attend(q, view, codec.layout, codec.order, scale, **options)  # type: ignore[arg-type]


def relative_norm(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30))


def assert_close(found: tuple[Tensor, Tensor], wanted: Results) -> None:
    """Queries round to the same int8, so the lse has no excuse. A weight on the edge between two uint8 codes may fall
    either way, in the float32 reference too: a few of those are allowed for.
    """
    (o, lse), ((reference_o, reference_lse), (exact_o, exact_lse)) = found, wanted
    assert o.dtype == lse.dtype == torch.float32
    assert_as_accurate(lse, reference_lse, exact_lse)
    assert relative_norm(o, exact_o) <= 2 * relative_norm(reference_o, exact_o) + 5e-4


def assert_matches(q: Tensor, view: LayerView, codec: RowsCodec, scale: float, isa: str) -> None:
    inputs = (q, view, codec, scale)
    wanted = reference.attend(*inputs), reference.attend(*inputs, dtype=torch.float64)
    assert_close(native(*inputs, isa=isa), wanted)


@isas
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_every_shape(case: Case, isa: str) -> None:
    shape = ("balanced", case.head_dim, (case.length,), case.group)
    assert_close(native(*make_inputs(*shape), isa=isa), reference_results(*shape))


@isas
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("name", [*PRESETS, *COMBINATIONS])
def test_every_format_in_a_ragged_batch(name: str, head_dim: int, isa: str) -> None:
    shape = (name, head_dim, (0, 1, 203, 330), 3)
    assert_close(native(*make_inputs(*shape), isa=isa), reference_results(*shape))


@isas
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("num_tokens", [1, 2, 9])
def test_any_number_of_rows(num_tokens: int, group: int, isa: str) -> None:
    shape = ("k8420v4222", 64, (300, 140), group, num_tokens)
    assert_close(native(*make_inputs(*shape), isa=isa), reference_results(*shape))


@isas
@pytest.mark.parametrize("kind", ["outliers", "constant", "zeros", "tiny"])
@pytest.mark.parametrize("exact_dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_extreme_values(exact_dtype: torch.dtype, kind: str, isa: str) -> None:
    codec = make_codec("balanced", 64)
    view = make_view(codec, [300], kind=kind, exact_dtype=exact_dtype)
    assert_matches(queries(view, 4), view, codec, 0.02, isa=isa)


@isas
def test_close_to_the_oracle(isa: str) -> None:
    """Against attention on what the pages stand for: only the 8-bit rounding of queries and weights is left."""
    codec = make_codec("quality", 128)
    view = make_view(codec, list(RAGGED), 2)
    q = queries(view, 8)
    found, exact = native(q, view, codec, 128**-0.5, isa=isa), reference.oracle(q, view, codec, 128**-0.5)
    assert relative_norm(found[0], exact[0]) <= 0.01
    assert max_error(found[1], exact[1]) <= 0.01


@isas
def test_a_query_of_zeros_averages_the_values(isa: str) -> None:
    codec = make_codec("k0000v8888", 64)
    view = make_view(codec, [64 * 3 + 68], 1)
    o, lse = native(torch.zeros(1, 1, 1, 64), view, codec, 1.0, isa=isa)
    exact_o, _ = reference.oracle(torch.zeros(1, 1, 1, 64), view, codec, 1.0)
    assert max_error(lse, torch.full((1, 1, 1), 260.0).log()) <= 1e-5
    assert relative_norm(o, exact_o) <= 0.02


@isas
def test_empty_sequences_give_zero_and_minus_infinity(isa: str) -> None:
    codec = make_codec("balanced", 96)
    view = make_view(codec, [0, 0], 2)
    o, lse = native(queries(view, 4, 3), view, codec, 0.1, isa=isa)
    assert not o.any()
    assert bool((lse == -torch.inf).all())


@isas
def test_one_dominating_token_among_many_pages(isa: str) -> None:
    """Scores hundreds apart: pages before the maximum shrink to nothing, pages after it stay finite."""
    codec = make_codec("int8", 64)
    view = make_view(codec, [64 * 12 + 68], 1)
    q = queries(view, 4) * 60
    assert_matches(q, view, codec, 1.0, isa=isa)
    assert bool(torch.isfinite(native(q, view, codec, 1.0, isa=isa)[0]).all())


@pytest.mark.parametrize("pages_per_split", [1, 2, 5])
def test_splits_change_only_the_rounding(pages_per_split: int, monkeypatch: pytest.MonkeyPatch) -> None:
    codec = make_codec("balanced", 64)
    view = make_view(codec, [1000, 500], 2)
    q = queries(view, 6)
    whole = native(q, view, codec, 0.125)
    monkeypatch.setattr(cpu, "PAGES_PER_SPLIT", pages_per_split)
    split = native(q, view, codec, 0.125)
    assert relative_norm(split[0], whole[0]) <= 5e-4
    assert max_error(split[1], whole[1]) <= 2e-6


@isas
def test_the_result_does_not_depend_on_the_thread_count(isa: str) -> None:
    codec = make_codec("balanced", 64)
    view = make_view(codec, [64 * 131 + 68, 700, 0], 2)
    q = queries(view, 6, 7)
    alone = native(q, view, codec, 0.125, isa=isa, num_threads=1)
    for num_threads in (2, 3, 8):
        together = native(q, view, codec, 0.125, isa=isa, num_threads=num_threads)
        assert torch.equal(alone[0], together[0])
        assert torch.equal(alone[1], together[1])


def test_many_calls_at_once_from_python_threads() -> None:
    codec = make_codec("balanced", 64)
    view = make_view(codec, [1000, 500], 2)
    inputs = [queries(view, 6, seed=seed) for seed in range(4)]
    alone = [native(q, view, codec, 0.125, num_threads=1)[0] for q in inputs]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: native(inputs[i % 4], view, codec, 0.125, num_threads=2)[0], range(200)))
    assert all(torch.equal(o, alone[i % 4]) for i, o in enumerate(found))


FORK = """
import os, sys
import torch
from homkv.attention import cpu
from homkv.formats.rows import RowsCodec
from homkv.spec import RowsSpec
from homkv.testing.inputs import make_view
codec = RowsCodec(64, RowsSpec.parse("balanced"))
view, q = make_view(codec, [1000], 2), torch.ones(1, 4, 1, 64)
attend = lambda: cpu.attend(q, view, codec.layout, codec.order, 0.125, num_threads=3)[0]
before = attend()
child = os.fork()
same = torch.equal(attend(), before)
if child == 0:
    os._exit(0 if same else 1)
sys.exit(0 if same and os.waitpid(child, 0)[1] == 0 else 1)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
def test_a_forked_child_attends() -> None:
    assert subprocess.run([sys.executable, "-c", FORK], check=False, timeout=120).returncode == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_queries_of_any_float_dtype_and_layout(dtype: torch.dtype) -> None:
    codec = make_codec("balanced", 64)
    view = make_view(codec, [300], 2)
    q = queries(view, 6, 3).to(dtype)
    expected = native(q.float(), view, codec, 0.125)
    strided = q.transpose(1, 2).contiguous().transpose(1, 2)
    for found in (native(q, view, codec, 0.125), native(strided, view, codec, 0.125)):
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])


@isas
def test_nan_in_a_query_stays_in_its_row(isa: str) -> None:
    codec = make_codec("balanced", 64)
    view = make_view(codec, [300], 2)
    q = queries(view, 8)
    clean = native(q, view, codec, 0.125, isa=isa)[0]
    q[0, 2, 0, 5] = torch.nan
    o = native(q, view, codec, 0.125, isa=isa)[0]
    assert bool(o[0, 2].isnan().any())
    others = [0, 1, 3, 4, 5, 6, 7]
    assert torch.equal(o[0, others], clean[0, others])


@settings(max_examples=40, deadline=None)
@given(
    digits=st.lists(st.sampled_from(DIGITS), min_size=8, max_size=8),
    head_dim=st.sampled_from(HEAD_DIMS),
    length=st.integers(0, 400),
    group=st.integers(1, 9),
    seed=st.integers(0, 2**31),
    isa=st.sampled_from(ISAS or ("",)),
)
def test_any_digits(digits: list[int], head_dim: int, length: int, group: int, seed: int, isa: str) -> None:
    codec = make_codec("k{}{}{}{}v{}{}{}{}".format(*digits), head_dim, seed)
    view = make_view(codec, [length, 17], 1, seed=seed)
    assert_matches(queries(view, group, seed=seed), view, codec, head_dim**-0.5, isa=isa)
