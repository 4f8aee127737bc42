"""Encoding and sealing in Triton: byte for byte what the reference writes."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from homkv.attention.triton import encode as kernels
from homkv.attention.triton import window
from homkv.attention.view import LayerView
from homkv.errors import DTypeError, FormatError, ShapeError
from homkv.formats.rows import RowsCodec
from homkv.spec import RowsSpec
from homkv.testing.inputs import make_tokens, make_view


def make_codec(name: str, head_dim: int) -> RowsCodec:
    generator = torch.Generator().manual_seed(0)
    return RowsCodec(head_dim, RowsSpec.parse(name), torch.randperm(head_dim, generator=generator).tolist())


def tokens(kind: str, head_dim: int, dtype: torch.dtype, pages: int = 1) -> tuple[Tensor, Tensor]:
    shape = (2, 64 * pages, head_dim)
    return make_tokens(kind, *shape, seed=1).to(dtype), make_tokens(kind, *shape, seed=2).to(dtype)


CASES = [
    ("small", 128, "normal", torch.float16),
    ("balanced", 64, "outliers", torch.bfloat16),
    ("quality", 96, "normal", torch.float32),
    ("int8", 80, "tiny", torch.float32),
    ("near-lossless", 64, "normal", torch.bfloat16),
    ("balanced", 256, "normal", torch.float16),
    ("k8024v4028", 64, "constant", torch.float16),
    ("k2480v8042", 64, "outliers", torch.float32),
    ("k0000v0000", 64, "zeros", torch.float16),
]


@pytest.mark.parametrize(("name", "head_dim", "kind", "dtype"), CASES)
def test_bytes_are_the_references(
    name: str, head_dim: int, kind: str, dtype: torch.dtype, device: torch.device
) -> None:
    codec, (k, v) = make_codec(name, head_dim), tokens(kind, head_dim, dtype)
    found = kernels.encode(k.to(device), v.to(device), codec.layout, codec.order)
    assert torch.equal(found.cpu(), codec.encode(k, v).transpose(0, 1))


def test_strides_and_scatter(device: torch.device) -> None:
    codec, (k, v) = make_codec("small", 64), tokens("normal", 64, torch.float16, pages=2)
    strided = [x.to(device).transpose(0, 1).contiguous().transpose(0, 1) for x in (k, v)]
    out = torch.full((5, 2, codec.page_bytes), 7, dtype=torch.uint8, device=device)
    ids = torch.tensor([3, 1], dtype=torch.int32, device=device)
    kernels.encode(*strided, codec.layout, codec.order, out=out, block_ids=ids)
    assert torch.equal(out[[3, 1]].cpu(), codec.encode(k, v).transpose(0, 1))
    assert bool((out[[0, 2, 4]] == 7).all())


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e6])
def test_what_cannot_be_stored(value: float, device: torch.device) -> None:
    codec, (k, v) = make_codec("small", 64), tokens("normal", 64, torch.float32)
    for x in (k, v):
        spoiled = [y.clone().to(device) for y in (k, v)]
        spoiled[0 if x is k else 1][1, 7] = value
        with pytest.raises(FormatError, match="larger ones"):
            kernels.encode(*spoiled, codec.layout, codec.order)
        status = torch.zeros(1, dtype=torch.int32, device=device)
        kernels.encode(*spoiled, codec.layout, codec.order, status=status)
        assert int(status) == 1


def test_wrong_input_is_refused(device: torch.device) -> None:
    codec, (k, v) = make_codec("small", 64), [x.to(device) for x in tokens("normal", 64, torch.float16)]
    with pytest.raises(ShapeError, match="whole pages"):
        kernels.encode(k[:, :63], v[:, :63], codec.layout, codec.order)
    with pytest.raises(DTypeError, match="both"):
        kernels.encode(k, v.float(), codec.layout, codec.order)
    with pytest.raises(ShapeError, match="contiguous last"):
        kernels.encode(k.repeat(1, 1, 2)[..., ::2], v.repeat(1, 1, 2)[..., ::2], codec.layout, codec.order)
    with pytest.raises(ShapeError, match="expected out"):
        kernels.encode(k, v, codec.layout, codec.order, out=torch.zeros(1, 2, 64, dtype=torch.uint8, device=device))


def full_window_view(codec: RowsCodec) -> tuple[LayerView, Tensor, Tensor]:
    """Two sequences, the first with a full window; keys and values as they are stored."""
    view = make_view(codec, [195, 150], 2)
    full = codec.num_sinks + codec.max_window
    k, v = (make_tokens("normal", 2, full, codec.head_dim, seed=s).half() for s in (5, 6))
    view.exact_k[int(view.slots[0])], view.exact_v[int(view.slots[0])] = k, v
    return replace(view, exact_len=torch.tensor([full, int(view.exact_len[1])], dtype=torch.int32)), k, v


@pytest.mark.parametrize("name", ["small", "k8024v4028"])
def test_append_seals_what_is_due(name: str, device: torch.device) -> None:
    codec = make_codec(name, 64)
    host, k, v = full_window_view(codec)
    due = host.exact_len == codec.num_sinks + codec.max_window
    assert due.tolist() == [True, False]
    pages = host.num_pages + due.int()
    table = torch.nn.functional.pad(host.page_table, (0, 2))
    free = next(i for i in range(host.pool.shape[0]) if i not in host.page_table.tolist())
    table[0, int(pages[0]) - 1] = free
    host = replace(host, num_pages=pages.int(), exact_len=host.exact_len + 1 - 64 * due.int(), page_table=table)
    view = LayerView(**{n: x.to(device, copy=True).contiguous() for n, x in vars(host).items()})
    new_k, new_v = (make_tokens("normal", 2, 2, 64, seed=s).half().to(device) for s in (8, 9))
    status = torch.zeros(1, dtype=torch.int32, device=device)
    window.append(new_k, new_v, view, due.to(device), codec, status)
    assert int(status) == 0
    sealed = codec.encode(k[:, 4:68].float(), v[:, 4:68].float())
    assert torch.equal(view.pool[free].cpu(), sealed[:, 0])
    for buffer, before, new in ((view.exact_k, k, new_k), (view.exact_v, v, new_v)):
        after = buffer.cpu()
        assert torch.equal(after[int(host.slots[0]), :, :68], torch.cat((before[:, :4], before[:, 68:132]), 1))
        for b in range(2):
            assert torch.equal(after[int(host.slots[b]), :, int(host.exact_len[b]) - 1], new[b].cpu())
    untouched = [i for i in range(host.pool.shape[0]) if i != free]
    assert torch.equal(view.pool[untouched].cpu(), host.pool[untouched])


def test_append_flags_what_is_not_finite(device: torch.device) -> None:
    codec = make_codec("small", 64)
    view = LayerView(**{n: x.to(device) for n, x in vars(make_view(codec, [150], 2)).items()})
    k = torch.full((1, 2, 64), 1e6, device=device)  # too large for the window's float16
    status, due = torch.zeros(1, dtype=torch.int32, device=device), torch.zeros(1, dtype=torch.bool, device=device)
    window.append(k, k, view, due, codec, status)
    assert int(status) == 1
    with pytest.raises(ShapeError, match="one token per sequence"):
        window.append(k[:, :1], k, view, due, codec, status)
