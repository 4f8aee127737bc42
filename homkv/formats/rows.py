"""Page-centred rows in RoPE order: homkv's own format, ``kABCDvEFGH``. Bytes: docs/format.md."""

import struct
from collections.abc import Sequence

import torch
import xxhash
from torch import Tensor

from homkv.errors import ShapeError
from homkv.formats.base import EIGHT_BIT, PageCodec, Rounding
from homkv.page import read_centre, read_rows, write_page
from homkv.quant import class_slice, decode_scales, hadamard, quantize_keys, quantize_values
from homkv.spec import FORMAT_VERSION, NUM_SINKS, PAGE_TOKENS, ChannelClass, RowsSpec


def integer_matmul(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` of integer operands with an int32 result.

    Computed in float32, which is exact: every partial sum stays below 256 * 127 * 127 < 2^24.
    """
    return (a.to(torch.float32) @ b.to(torch.float32)).to(torch.int32)


class RowsCodec(PageCodec):
    """A rows format bound to a head: ``k[t, order[s]] = centre[s] + H^T (k_scale[t, class] * lane[t, s])``.

    ``order [D]``: slot -> channel, from the slowest to the fastest RoPE pair (RopeSpec.channel_order()).
    """

    page_tokens = PAGE_TOKENS
    num_sinks = NUM_SINKS
    impls = ("cpu", "triton", "reference")

    def __init__(self, head_dim: int, spec: RowsSpec, order: Sequence[int] | None = None) -> None:
        super().__init__(head_dim)
        self.spec = spec
        self.name, self.min_window = spec.name, spec.min_window
        self.layout = spec.layout(head_dim)
        self.page_bytes = self.layout.page_bytes
        order = range(head_dim) if order is None else order
        if sorted(order) != list(range(head_dim)):
            raise ShapeError(f"expected a permutation of {head_dim} channels, found {list(order)}")
        # Codes in another order are other codes: the wire must tell them apart.
        digest = xxhash.xxh32_hexdigest(struct.pack(f"<{len(order)}H", *order))
        self.layout_id = f"rows/{FORMAT_VERSION} {spec.name} D={head_dim} order={digest}"
        # Kernels take its numbers as constants while a CUDA graph is captured, and vLLM's default device is a GPU.
        self.order = torch.tensor(list(order), dtype=torch.int64, device="cpu")

    def encode(self, k: Tensor, v: Tensor, first_position: int = 0) -> Tensor:
        """Quantize and pack whole pages; see PageCodec.encode. Raises FormatError for unstorable values."""
        self.check_tokens(k, v)
        k = torch.unflatten(k, -2, (-1, PAGE_TOKENS))
        v = torch.unflatten(v, -2, (-1, PAGE_TOKENS))
        k_rows, centre = quantize_keys(k, self.order, self.layout)
        return write_page(k_rows, quantize_values(v, self.layout), centre, self.layout)

    def dense(self, pages: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Keys and values that the pages stand for, ``[..., N * 64, D]``."""
        self.check_pages(pages)
        lead = pages.shape[:-1]
        slots = read_centre(pages, self.layout).to(dtype).unsqueeze(-2).repeat(*[1] * len(lead), PAGE_TOKENS, 1)
        for cls in self.layout.k_classes:
            slots[..., cls.start : cls.stop] += self._dense_class(pages, cls, dtype, is_key=True)
        k = torch.empty_like(slots)
        k[..., self.order.to(pages.device)] = slots
        v = torch.zeros_like(slots)
        for cls in self.layout.v_classes:
            v[..., cls.start : cls.stop] = self._dense_class(pages, cls, dtype, is_key=False)
        return k.flatten(-3, -2), v.flatten(-3, -2)

    def _dense_class(self, pages: Tensor, cls: ChannelClass, dtype: torch.dtype, *, is_key: bool) -> Tensor:
        rows = read_rows(pages, cls, is_key=is_key)
        scaled = rows.lanes.to(dtype) * decode_scales(rows.scales, dtype).unsqueeze(-1)
        return hadamard(scaled, cls.hadamard_block)

    def scores(
        self, q: Tensor, pages: Tensor, rounding: Rounding = EIGHT_BIT, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """``sum_class k_scale[t] q_scale (q_int . lane[t]) + q . centre``, ``[..., R, N * 64]``."""
        self.check_pages(pages)
        slots = q.to(dtype)[..., self.order.to(q.device)]
        centre = read_centre(pages, self.layout).to(dtype)
        out = (slots @ centre.transpose(-1, -2)).repeat_interleave(PAGE_TOKENS, dim=-1)
        for cls in self.layout.k_classes:
            rows = read_rows(pages, cls, is_key=True)
            lanes = rows.lanes.flatten(-3, -2).transpose(-1, -2)
            k_scale = decode_scales(rows.scales, dtype).flatten(-2).unsqueeze(-2)
            rotated = class_slice(slots, cls)
            if rounding.q:
                largest = rotated.abs().amax(-1, keepdim=True)
                inverse = torch.where(largest > 0, 127 / largest, 0)
                acc = integer_matmul((rotated * inverse).round(), lanes)
                out = out + acc.to(dtype) * (k_scale * (largest / 127))
            else:
                out = out + (rotated @ lanes.to(dtype)) * k_scale
        return out

    def weigh(
        self, p: Tensor, pages: Tensor, rounding: Rounding = EIGHT_BIT, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """``H^T sum_t (p[t] v_scale[t, class]) lane[t]``; the bracket becomes uint8 per page and class."""
        self.check_pages(pages)
        out = torch.zeros(*p.shape[:-1], self.head_dim, dtype=dtype, device=p.device)
        for cls in self.layout.v_classes:
            rows = read_rows(pages, cls, is_key=False)
            weight = p.to(dtype) * decode_scales(rows.scales, dtype).flatten(-2).unsqueeze(-2)
            if rounding.p:
                tiles = torch.unflatten(weight, -1, (-1, PAGE_TOKENS)).transpose(-2, -3)  # [..., N, R, 64]
                largest = tiles.amax(-1, keepdim=True)
                codes = (tiles * torch.where(largest > 0, 255 / largest, 0)).round()
                rotated = (integer_matmul(codes, rows.lanes).to(dtype) * (largest / 255)).sum(-3)
            else:
                rotated = weight @ rows.lanes.flatten(-3, -2).to(dtype)
            out[..., cls.start : cls.stop] = hadamard(rotated, cls.hadamard_block)
        return out
