"""Appending to the window and sealing in Triton: the same bytes as homkv.seal with the reference encoder."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from homkv.attention.triton import window
from homkv.attention.view import LayerView
from homkv.errors import DTypeError, ShapeError
from homkv.formats.rows import RowsCodec
from homkv.seal import advance, append_one
from homkv.spec import RowsSpec
from homkv.testing.inputs import make_tokens, make_view


def make_codec(name: str, head_dim: int) -> RowsCodec:
    generator = torch.Generator().manual_seed(0)
    return RowsCodec(head_dim, RowsSpec.parse(name), torch.randperm(head_dim, generator=generator).tolist())


def to_device(view: LayerView, device: torch.device) -> LayerView:
    return LayerView(**{name: x.to(device, copy=True) for name, x in vars(view).items()})


def make_full(codec: RowsCodec, heads: int, dtype: torch.dtype = torch.float16, full: int = 2) -> LayerView:
    """Three sequences, the first ``full`` of them with a full window, and room for one more page each."""
    most = codec.num_sinks + codec.max_window
    view = make_view(codec, [most + 63, 150, 3], heads, exact_dtype=dtype)
    blocks = torch.arange(view.pool.shape[0] + 3)
    free = blocks[~torch.isin(blocks, view.page_table[view.page_table >= 0])].flip(0)[:3].to(torch.int32)
    table = torch.cat((view.page_table, torch.full((3, 1), -1, dtype=torch.int32)), 1)
    table[torch.arange(3), view.num_pages.long()] = free
    pool = torch.cat((view.pool, torch.full((3, heads, codec.page_bytes), 0xFF, dtype=torch.uint8)))
    lengths = view.exact_len.clone()
    for b in range(full):
        shape = (heads, most, codec.head_dim)
        view.exact_k[view.slots[b]] = make_tokens("outliers", *shape, seed=10 + b).to(dtype)
        view.exact_v[view.slots[b]] = make_tokens("normal", *shape, seed=20 + b).to(dtype)
        lengths[b] = most
    return replace(view, page_table=table, pool=pool, exact_len=lengths)


def new_tokens(batch: int, heads: int, dim: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Keys and values, each a part of a larger projection."""
    both = make_tokens("normal", batch, heads, 2, dim, seed=30 + seed)
    return both[:, :, 0], both[:, :, 1]


def status_on(device: torch.device) -> Tensor:
    return torch.zeros(1, dtype=torch.int32, device=device)


def assert_same(found: LayerView, expected: LayerView) -> None:
    for name, x in vars(expected).items():
        assert torch.equal(torch.nan_to_num(getattr(found, name).cpu()), torch.nan_to_num(x)), name


@pytest.mark.parametrize(
    ("name", "head_dim", "heads", "dtype", "full"),
    [
        ("small", 64, 5, torch.float16, 1),
        ("k8024v4028", 64, 1, torch.bfloat16, 1),
        ("balanced", 128, 2, torch.float32, 1),
        ("k4200v0080", 80, 3, torch.float16, 2),
        ("k2000v2000w128", 64, 1, torch.float16, 1),
        ("k2000v2000w256", 64, 1, torch.float16, 2),
    ],
)
def test_append_seals_what_is_due(
    name: str, head_dim: int, heads: int, dtype: torch.dtype, full: int, device: torch.device
) -> None:
    """Two steps: pages of the first sequences are due in the first, none in the second."""
    codec = make_codec(name, head_dim)
    expected = make_full(codec, heads, dtype, full)
    view = to_device(expected, device)
    status = status_on(device)
    for step in range(2):
        k, v = new_tokens(3, heads, head_dim, step)
        if dtype == torch.bfloat16:  # the interpreter does not round to it as a GPU does
            k, v = k.to(dtype), v.to(dtype)
        append_one(codec, expected, advance(codec, expected), k, v, impl="reference")
        due = advance(codec, view)
        assert due.tolist() == [step == 0 and b < full for b in range(3)]
        window.append(k.to(device), v.to(device), view, due, codec, status)
        assert_same(view, expected)
    assert int(status) == 0


@pytest.mark.parametrize("name", ["k0002v0000", "k0000v2000"])
def test_layers_are_sealed_at_once(name: str, device: torch.device) -> None:
    codec = make_codec(name, 64)
    first = make_full(codec, 3, full=1)
    shared = {name: getattr(first, name) for name in ("page_table", "num_pages", "exact_len", "slots")}
    second = replace(
        first, pool=first.pool.clone(), exact_k=first.exact_k.flip(1).clone(), exact_v=first.exact_v.flip(1).clone()
    )
    on_device = {name: x.to(device, copy=True) for name, x in shared.items()}
    views = [replace(to_device(view, device), **on_device) for view in (first, second)]
    k, v = new_tokens(3, 3, 64)
    due, status = advance(codec, first), status_on(device)
    for view in (first, second):
        append_one(codec, view, due, k, v, impl="reference")
    due = advance(codec, views[0])
    window.seal_due(views, due, codec, status)
    for view, expected in zip(views, (first, second), strict=True):
        window.append(k.to(device), v.to(device), view, torch.zeros_like(due), codec, status)
        assert_same(view, expected)
    one = to_device(make_full(codec, 3, full=1), device)
    due = advance(codec, one)
    window.seal_due([one], due, codec, status)
    window.append(k.to(device), v.to(device), one, torch.zeros_like(due), codec, status)
    assert_same(one, first)
    assert int(status) == 0


def spoil_window(view: LayerView) -> None:
    view.exact_v[view.slots[0].long(), 1, 30, 5] = torch.inf


def spoil_centre(view: LayerView) -> None:
    view.exact_k[view.slots[0].long(), 1, 4:68, 5] = 7e4


@pytest.mark.parametrize("spoil", [spoil_window, spoil_centre])
def test_status_tells_of_pages_that_cannot_be_stored(spoil: Callable[[LayerView], None], device: torch.device) -> None:
    codec = make_codec("k0000v0008", 64)
    view = to_device(make_full(codec, 2, torch.float32, full=1), device)
    spoil(view)
    k, v = (x.to(device) for x in new_tokens(3, 2, 64))
    status = status_on(device)
    window.append(k, v, view, advance(codec, view), codec, status)
    assert int(status) != 0


@pytest.mark.parametrize("which", [0, 1])
def test_status_tells_of_tokens_that_cannot_be_stored(which: int, device: torch.device) -> None:
    codec = make_codec("small", 64)
    view = to_device(make_full(codec, 2, full=0), device)
    pair = [x.to(device) for x in new_tokens(3, 2, 64)]
    pair[which][2, 1, 63] = 1e6  # too large for the window's float16
    status = status_on(device)
    window.append(*pair, view, advance(codec, view), codec, status)
    assert int(status) != 0


def test_nothing_outside_is_written(device: torch.device) -> None:
    """Indices outside their array are clamped: whatever is written lies in the view."""
    codec = make_codec("k0002v0008", 64)
    view = to_device(make_full(codec, 1, full=1), device)
    wrong = replace(
        view, page_table=view.page_table + 10_000, num_pages=view.num_pages + 50, slots=view.slots - 99,
        exact_len=view.exact_len + 10_000,
    )  # fmt: skip
    k, v = (x.to(device) for x in new_tokens(3, 1, 64))
    due = torch.tensor([True, False, False], device=device)
    before = view.pool.clone()
    window.append(k, v, wrong, due, codec, status_on(device))
    assert bool((view.pool[:-1] == before[:-1]).all())


def test_wrong_input_is_refused(device: torch.device) -> None:
    codec, status = make_codec("small", 64), status_on(device)
    view = to_device(make_full(codec, 2, full=0), device)
    k, v = (x.to(device) for x in new_tokens(3, 2, 64))
    due = torch.zeros(3, dtype=torch.bool, device=device)
    with pytest.raises(ShapeError, match="one token per sequence"):
        window.append(k[:, :1], v, view, due, codec, status)
    with pytest.raises(DTypeError, match="both"):
        window.append(k, v.half(), view, due, codec, status)
    with pytest.raises(ShapeError, match=r"due \[3\]"):
        window.append(k, v, view, due[:2], codec, status)
    with pytest.raises(DTypeError, match="due"):
        window.append(k, v, view, due.float(), codec, status)
    with pytest.raises(ShapeError, match="status"):
        window.append(k, v, view, due, codec, status.repeat(2))
    with pytest.raises(ShapeError, match="pages of"):
        window.append(k, v, view, due, make_codec("balanced", 64), status)
    short = replace(view, exact_k=view.exact_k[:, :, :100].contiguous(), exact_v=view.exact_v[:, :, :100].contiguous())
    with pytest.raises(ShapeError, match="room for 132"):
        window.append(k, v, short, due, codec, status)
    with pytest.raises(ShapeError, match="share"):
        window.seal_due([view, to_device(view, device)], due, codec, status)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_captured_step_seals_when_a_page_is_due(device: torch.device) -> None:
    codec = make_codec("balanced", 128)
    expected = make_full(codec, 8, full=1)
    view, status = to_device(expected, device), status_on(device)
    k, v = (x.to(device) for x in new_tokens(3, 8, 128))
    window.append(k, v, to_device(expected, device), torch.zeros(3, dtype=torch.bool, device=device), codec, status)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        window.append(k, v, view, advance(codec, view), codec, status)
    for step in range(3):
        new = new_tokens(3, 8, 128, step)
        k.copy_(new[0])
        v.copy_(new[1])
        graph.replay()
        append_one(codec, expected, advance(codec, expected), *new, impl="reference")
        assert_same(view, expected)
    assert int(status) == 0
