"""What the tests of the decode kernels share; ``run`` and ``Codec`` are of HACK's two."""

from dataclasses import replace

import torch
from torch import Tensor

from homkv.attention import reference
from homkv.attention.triton.hack_decode import HackConfig, attend_hack
from homkv.attention.view import LayerView
from homkv.formats.base import PageCodec
from homkv.formats.hack import HackCodec
from homkv.formats.hack2026 import Hack2026Codec
from homkv.testing.inputs import make_tokens

HEADS = 2
Codec = HackCodec | Hack2026Codec
Results = tuple[Tensor, Tensor]


def to_device(view: LayerView, device: torch.device) -> LayerView:
    return LayerView(**{name: x.to(device) for name, x in vars(view).items()})


def one_page_too_many(view: LayerView, behind: int) -> LayerView:
    """A count beyond the table's columns, and ``behind`` in the memory where that page would be looked up."""
    size = view.page_table.numel()
    memory = torch.full((size + 1,), behind, dtype=torch.int32, device=view.page_table.device)
    table = memory[:size].copy_(view.page_table.flatten()).view_as(view.page_table)
    return replace(view, page_table=table, num_pages=view.num_pages + 1)


def queries(batch: int, group: int, head_dim: int, tokens: int = 1) -> Tensor:
    return make_tokens("normal", batch, HEADS * group, tokens, head_dim, seed=77)


def run(q: Tensor, view: LayerView, codec: Codec, device: torch.device, **options: int | None) -> Results:
    config = HackConfig(**options) if options else None
    o, lse = attend_hack(q.to(device), to_device(view, device), codec, codec.head_dim**-0.5, config)
    assert o.dtype == lse.dtype == torch.float32
    return o.cpu(), lse.cpu()


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm().clamp_min(1e-30))


def assert_accurate(found: Results, q: Tensor, view: LayerView, codec: PageCodec) -> None:
    """Against attention on the dense pages: no worse than twice the reference, which rounds Q and P to 8 bits too."""
    scale = codec.head_dim**-0.5
    rounded, exact = reference.attend(q.float(), view, codec, scale), reference.oracle(q.float(), view, codec, scale)
    assert not found[0].isnan().any()
    assert error(found[0], exact[0]) <= 2 * error(rounded[0], exact[0]) + 1e-5
    finite = torch.isfinite(exact[1])
    assert torch.equal(torch.isinf(found[1]), ~finite)
    assert error(found[1][finite], exact[1][finite]) <= 2 * error(rounded[1][finite], exact[1][finite]) + 1e-6
