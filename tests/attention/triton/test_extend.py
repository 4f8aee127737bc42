"""Extension in Triton against attention on the dense pages in float64, merged with exact causal attention."""

from functools import cache
from itertools import product

import pytest
import torch
from chosen import cases
from decode_cases import error, one_page_too_many, to_device
from torch import Tensor

from homkv.attention import reference
from homkv.attention.prefill import causal_partial
from homkv.attention.triton.expand import Scratch, rotations, tile_bytes
from homkv.attention.triton.extend import ExtendConfig, Plan, _Call, extend, make_plan
from homkv.attention.view import LayerView
from homkv.errors import CapacityError, DTypeError, ShapeError, UnsupportedError
from homkv.formats.exact import ExactCodec
from homkv.formats.rows import RowsCodec
from homkv.quant import hadamard
from homkv.spec import PRESETS, RowsSpec
from homkv.testing.inputs import make_tokens, make_view

HEADS = 2
FORMATS = (*PRESETS, "k0000v0000", "k2222v0000", "k8024v4022", "k2480v4042", "k4442v2444", "k2248v4422")
Inputs = tuple[Tensor, Tensor, Tensor, LayerView, RowsCodec]


@cache
def make_codec(name: str, head_dim: int) -> RowsCodec:
    generator = torch.Generator().manual_seed(0)
    return RowsCodec(head_dim, RowsSpec.parse(name), torch.randperm(head_dim, generator=generator).tolist())


def make_inputs(
    name: str,
    head_dim: int,
    lengths: list[int],
    tokens: int,
    group: int = 2,
    *,
    dtype: torch.dtype = torch.float32,
    kind: str = "normal",
    loudness: float = 1.0,
) -> Inputs:
    codec, batch = make_codec(name, head_dim), len(lengths)
    exact_dtype = torch.float16 if dtype == torch.float32 else dtype
    view = make_view(codec, lengths, HEADS, kind=kind, exact_dtype=exact_dtype)
    q = make_tokens("normal", batch, HEADS * group, tokens, head_dim, seed=77) * loudness
    k, v = (make_tokens(kind, batch, HEADS, tokens, head_dim, seed=seed) for seed in (78, 79))
    return q.to(dtype), k.to(dtype), v.to(dtype), view, codec


def run(inputs: Inputs, device: torch.device, **options: object) -> Tensor:
    q, k, v, view, codec = inputs
    scale, there = codec.head_dim**-0.5, to_device(view, device)
    o = extend(q.to(device), k.to(device), v.to(device), there, codec, scale, **options)  # type: ignore[arg-type]
    assert o.dtype == q.dtype
    assert o.shape == q.shape
    return o.cpu()


def assert_accurate(found: Tensor, inputs: Inputs, slack: float = 5e-4) -> None:
    """No worse than twice the reference, which rounds Q and P to 8 bits too; exact parts round to q's dtype."""
    q, k, v, view, codec = inputs
    scale = codec.head_dim**-0.5
    new, new_lse = causal_partial(q.float(), k.float(), v.float(), scale)
    old = reference.oracle(q, view, codec, scale)
    wanted = reference.merge_partials(*old, new.double(), new_lse.double())[0]
    rounded = reference.merge_partials(*reference.attend(q, view, codec, scale), new, new_lse)[0]
    step = torch.finfo(q.dtype).eps / 4 if q.dtype != torch.float32 else 0.0  # what rounding costs on average
    assert not found.isnan().any()
    assert error(found, wanted) <= 2 * error(rounded, wanted) + slack + step


@pytest.mark.parametrize("name", cases(FORMATS, ("small", "k0000v0000", "k2222v0000", "k2480v4042", "k2248v4422")))
def test_every_format_in_a_ragged_batch(name: str, device: torch.device) -> None:
    inputs = make_inputs(name, 128, [0, 300], 3)
    assert_accurate(run(inputs, device), inputs)


@pytest.mark.parametrize("name", cases(["k0000v2248", "k4420v8888", "k8888v8888"], ["k0000v2248", "k8888v8888"]))
def test_values_of_eight_bits_are_rounded_once_more(name: str, device: torch.device) -> None:
    """To steps of the one scale that 128 tokens share; these formats may lose another 0.6 % of the output to that."""
    inputs = make_inputs(name, 128, [400], 3)
    assert_accurate(run(inputs, device), inputs, slack=6e-3)


@pytest.mark.parametrize(
    ("name", "head_dim"),
    cases(
        product(("small", "quality"), (64, 80, 96, 256)),
        [("small", 64), ("quality", 80), ("small", 96), ("quality", 256)],
    ),
)
def test_every_head_dim(name: str, head_dim: int, device: torch.device) -> None:
    inputs = make_inputs(name, head_dim, [300], 5, 3)
    assert_accurate(run(inputs, device), inputs)


@pytest.mark.parametrize(
    ("group", "tokens"), cases(product((1, 3), (1, 2, 64, 65, 129)), [(3, 1), (1, 2), (3, 65), (1, 129)])
)
def test_any_number_of_new_tokens(group: int, tokens: int, device: torch.device) -> None:
    inputs = make_inputs("balanced", 64, [203, 140], tokens, group)
    assert_accurate(run(inputs, device), inputs)


@pytest.mark.parametrize("length", cases([0, 3, 4, 67, 68, 131, 132, 195, 196, 260, 500], [0, 4, 131, 132, 196, 260]))
def test_every_stored_length(length: int, device: torch.device) -> None:
    inputs = make_inputs("balanced", 64, [length], 9)
    assert_accurate(run(inputs, device), inputs)


@pytest.mark.parametrize("loudness", cases([0.0, 4.0, 20.0], [0.0, 20.0]))
def test_flat_and_sharp_queries(loudness: float, device: torch.device) -> None:
    inputs = make_inputs("balanced", 128, [600], 20, loudness=loudness)
    assert_accurate(run(inputs, device), inputs)


@pytest.mark.parametrize("kind", ["outliers", "constant", "zeros", "tiny"])
def test_extreme_values(kind: str, device: torch.device) -> None:
    inputs = make_inputs("balanced", 64, [300], 10, kind=kind, loudness=0.1)
    assert_accurate(run(inputs, device), inputs)


def test_enormous_scores_stay_in_range(device: torch.device) -> None:
    """No weight may pass 255 and wrap around: outputs stay inside the range of the values."""
    inputs = make_inputs("near-lossless", 64, [600], 10, kind="outliers", loudness=100.0)
    o = run(inputs, device)
    assert bool(torch.isfinite(o).all())
    assert float(o.abs().max()) <= 1.1 * float(inputs[2].abs().max() + inputs[3].exact_v.nan_to_num().abs().max())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtypes_of_models_and_strides(dtype: torch.dtype, device: torch.device) -> None:
    q, k, v, view, codec = make_inputs("balanced", 64, [300, 500], 70, dtype=dtype)
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    assert not q.is_contiguous()
    assert_accurate(run((q, k, v, view, codec), device), (q, k, v, view, codec))


@pytest.mark.parametrize("programs", cases([0, 1, 50], [0, 50]))
def test_splits_do_not_change_the_result(programs: int, device: torch.device) -> None:
    inputs = make_inputs("balanced", 64, [900, 90], 2)
    assert_accurate(run(inputs, device, config=ExtendConfig(programs=programs)), inputs)


def test_splits_keep_small_values(device: torch.device) -> None:
    inputs = make_inputs("k4420v4444", 64, [600], 2)
    tiny = inputs[3].pool.clone()
    for cls in inputs[4].layout.v_classes:
        tiny[..., cls.scales_offset : cls.scales_offset + 64] -= 80
    assert int(inputs[3].pool.min()) >= 0
    inputs[3].pool.copy_(tiny)
    inputs[3].exact_v.fill_(0)
    inputs[2].fill_(0)
    assert_accurate(run(inputs, device, config=ExtendConfig(programs=50)), inputs)


@pytest.mark.parametrize("tiles", [1, 2])
def test_little_scratch_is_enough(tiles: int, device: torch.device) -> None:
    """Blocks of rows times chunks of pages, chained by their log-sum-exp."""
    inputs = make_inputs("k4444v4444", 64, [600, 203], 90)
    heads, padded = 2 * HEADS, 64
    scratch = 2 * tiles * heads * tile_bytes(padded, 128) + heads * 128 * (5 * padded + 8)
    plan = make_plan(heads, 5, 180, padded, scratch)
    assert plan == Plan(plan.tiles, 128)
    assert plan.tiles < 5
    assert_accurate(run(inputs, device, scratch_bytes=scratch), inputs)


def test_plans_fit() -> None:
    """Whatever the shape: pages and rows that are held need no more than what is given."""
    for heads in (1, 8, 64):
        for tiles in (1, 7, 256):
            for rows in (1, 128, 65_536):
                for padded in (64, 256):
                    for scratch in (1 << 25, 1 << 28):
                        try:
                            plan = make_plan(heads, tiles, rows, padded, scratch)
                        except CapacityError:
                            assert heads * (tile_bytes(padded, 128) + 128 * (5 * padded + 8)) > scratch
                            continue
                        assert 1 <= plan.tiles <= tiles
                        assert plan.rows % 128 == 0
                        held = plan.tiles * tile_bytes(padded, plan.rows) + plan.rows * (5 * padded + 8)
                        assert heads * held <= scratch
    assert make_plan(8, 128, 65_536, 128, 1 << 28) == Plan(128, 16_384)
    assert make_plan(8, 512, 8192, 128, 1 << 28) == Plan(256, 8192)


def test_scratch_is_counted(device: torch.device) -> None:
    scratch = Scratch.empty(2, 3, 256, 128, device)
    size = sum(x.numel() * x.element_size() for x in vars(scratch).values())
    assert size == 2 * (3 * tile_bytes(128, 256) + 256 * (128 + 4))


def test_codes_of_one_class_are_expanded_as_they_are(device: torch.device) -> None:
    """Keys bit for bit; values of 2 bits too, if the scales of 128 tokens lie within a factor of 4."""
    q, k, v, view, codec = make_inputs("k4444v2222", 64, [64 * 3 + 68], 1)
    view = LayerView(**{name: x.to(device) for name, x in vars(view).items()})
    call = _Call(q.to(device), k.to(device), v.to(device), view, codec, 0.1, ExtendConfig(), q.to(device))
    scratch = Scratch.empty(HEADS, 2, 128, 64, device)
    call.expand(scratch, 0)
    dense_k, dense_v = codec.dense(view.pool[view.page_table[0, :3].long()].transpose(0, 1).cpu())
    centre = scratch.centre[:, :3].float().cpu().repeat_interleave(64, 1)
    turns = rotations(codec, torch.device("cpu"))
    into = (turns.into.float() * turns.into_scale)[: codec.head_dim]
    residual = (dense_k - centre) @ into
    found = scratch.k8.float().cpu() * scratch.k_scale.cpu().unsqueeze(-1)
    assert error(found[:, :192], residual.double()) <= 1e-6
    position = torch.arange(128)
    token = position // 16 * 16 + position // 2 % 2 * 8 + position // 4 % 4 * 2 + position % 2
    lanes = torch.empty_like(scratch.vt, device="cpu").reshape(HEADS, 64, 2, 128)
    lanes[..., token] = scratch.vt.cpu().reshape(HEADS, 64, 2, 128)
    values = (lanes.float() * scratch.v_unit.cpu()[:, None, :, None]).flatten(2).transpose(1, 2)
    assert error(values[:, :192], hadamard(dense_v, 64).double()) <= 1e-6
    assert not values[:, 192:].any()
    assert not scratch.k_scale[:, 192:].any()


def test_nothing_outside_is_read(device: torch.device) -> None:
    """Other blocks hold garbage and exact tokens behind the end are NaN (make_view); wrong indices are clamped."""
    q, k, v, view, codec = make_inputs("small", 64, [400], 3)
    wrong = LayerView(**{**vars(view), "page_table": view.page_table + 10_000, "slots": view.slots + 10_000})
    assert run((q, k, v, wrong, codec), device).shape == q.shape
    view = to_device(view, device)
    blocks = view.page_table[0, :2].tolist()
    first, second = (run((q, k, v, one_page_too_many(view, block), codec), device) for block in blocks)
    assert torch.equal(first, second)


def test_a_nan_query_spoils_its_own_row_only(device: torch.device) -> None:
    inputs = make_inputs("small", 64, [300], 5)
    inputs[0][0, 1, 2, 7] = torch.nan
    o = run(inputs, device)
    assert bool(o[0, 1, 2].isnan().all())
    assert int(o.isnan().any(-1).sum()) == 1


def test_nothing_to_do(device: torch.device) -> None:
    assert run(make_inputs("small", 64, [300], 0), device).numel() == 0


def test_wrong_input_is_refused(device: torch.device) -> None:
    q, k, v, view, codec = make_inputs("small", 64, [300], 5)
    q, k, v = q.to(device), k.to(device), v.to(device)
    view = LayerView(**{name: x.to(device) for name, x in vars(view).items()})
    with pytest.raises(ShapeError, match="pages of"):
        extend(q, k, v, view, make_codec("balanced", 64), 0.1)
    with pytest.raises(ShapeError, match="expected q"):
        extend(q[..., :32], k, v, view, codec, 0.1)
    with pytest.raises(ShapeError, match="H a multiple of G"):
        extend(q, k[:, :, :3], v[:, :, :3], view, codec, 0.1)
    with pytest.raises(ShapeError, match="2 kv heads"):
        extend(q, k[:, :1], v[:, :1], view, codec, 0.1)
    with pytest.raises(DTypeError, match="one dtype"):
        extend(q, k.half(), v, view, codec, 0.1)
    with pytest.raises(ShapeError, match="softmax_scale"):
        extend(q, k, v, view, codec, -1.0)
    with pytest.raises(ShapeError, match="contiguous channels"):
        extend(q.repeat(1, 1, 1, 2)[..., ::2], k, v, view, codec, 0.1)
    with pytest.raises(CapacityError, match="scratch"):
        extend(q, k, v, view, codec, 0.1, scratch_bytes=1000)
    with pytest.raises(UnsupportedError, match="rows format"):
        extend(q, k, v, view, ExactCodec(64, "fp16"), 0.1)  # type: ignore[arg-type]
    if device.type == "cpu":
        with pytest.raises(UnsupportedError, match="'flash'"):
            extend(q, k, v, view, codec, 0.1, config=ExtendConfig(causal="flash"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("causal", ["cudnn", "flash"])
def test_new_tokens_through_torch(causal: str, device: torch.device) -> None:
    inputs = make_inputs("balanced", 128, [1000, 300], 130, 4, dtype=torch.bfloat16)
    assert_accurate(run(inputs, device, config=ExtendConfig(causal=causal)), inputs)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_lengths_are_read_at_every_replay(device: torch.device) -> None:
    """A captured call answers for the lengths that the tensors hold when it is replayed."""
    q, k, v, host, codec = make_inputs("balanced", 128, [3000, 700], 40, dtype=torch.bfloat16)
    view = LayerView(**{name: x.to(device) for name, x in vars(host).items()})
    arguments = (q.to(device), k.to(device), v.to(device), view, codec, 128**-0.5)
    extend(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = extend(*arguments)
    shorter = LayerView(**{**vars(host), "num_pages": torch.tensor([7, 2], dtype=torch.int32)})
    for now in (host, shorter):
        view.num_pages.copy_(now.num_pages)
        graph.replay()
        assert_accurate(o.cpu(), (q, k, v, now, codec))
