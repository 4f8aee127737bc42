"""What one layer of a cache looks like to attention: pages by reference, sinks and window as they are."""

from dataclasses import dataclass

import torch
from torch import Tensor

from homkv.errors import DTypeError, ShapeError

CPU = torch.device("cpu")


@dataclass(frozen=True)
class LayerView:
    """One layer's KV of B sequences.

    ``pool [num_blocks, G, P] uint8``; ``page_table [B, max_pages] int32`` block ids, entries past ``num_pages`` are
    ignored; ``num_pages [B] int32``; ``exact_k exact_v [slots, G, num_sinks + max_window, D]`` float16, bfloat16 or
    float32: sinks, then window, contiguous; ``exact_len [B] int32`` tokens stored there; ``slots [B] int32`` row of
    ``exact_k`` that belongs to each sequence. All on one device and contiguous.
    """

    pool: Tensor
    page_table: Tensor
    num_pages: Tensor
    exact_k: Tensor
    exact_v: Tensor
    exact_len: Tensor
    slots: Tensor


def check_query(q: Tensor, batch: int, heads: int, head_dim: int, device: torch.device = CPU) -> None:
    """Raise ShapeError or DTypeError unless q is ``[batch, multiple of heads, T, head_dim]`` on ``device``."""
    shape = q.shape
    if q.ndim != 4 or shape[0] != batch or shape[3] != head_dim or heads == 0 or shape[1] % heads:
        raise ShapeError(
            f"expected q [B={batch}, H multiple of {heads}, T, D={head_dim}], found {tuple(shape)}; "
            "transpose it to [B, H, T, D]"
        )
    if not q.is_floating_point() or q.device != device:
        raise DTypeError(f"expected a floating point q on {device}, found {q.dtype} on {q.device}; move or cast it")
