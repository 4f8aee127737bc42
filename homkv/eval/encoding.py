"""Rows pages encoded on the host for a reference path on a GPU.

The error diffusion along a page's tokens is a chain: in torch on a GPU it would be thousands of launches per page. The
CPU's kernel writes the same bytes in a fraction of a millisecond.
"""

import torch
from torch import Tensor

from homkv.attention import cpu
from homkv.formats import PageCodec
from homkv.formats.per_layer import PerLayerCodec
from homkv.formats.rows import RowsCodec


class HostEncodedRows(RowsCodec):
    """A rows format whose ``encode`` runs on the CPU, wherever its tokens lie."""

    def encode(self, k: Tensor, v: Tensor, first_position: int = 0) -> Tensor:
        """See PageCodec.encode; ``k v [G, N * 64, D]``. Raises FormatError for unstorable values."""
        self.check_tokens(k, v)
        pages = cpu.encode(k.cpu(), v.cpu(), self.layout, self.order)
        return pages.transpose(0, 1).to(k.device)


def encoded_on_host(codec: PageCodec, impl: str | None, device: torch.device) -> PageCodec:
    """The codec, or for the reference path of a rows format on a GPU the same one that encodes on the host."""
    if device.type == "cpu" or impl != "reference":
        return codec
    if isinstance(codec, PerLayerCodec):
        return PerLayerCodec(codec.head_dim, codec.plan, codec.order, HostEncodedRows)
    if isinstance(codec, RowsCodec):
        return HostEncodedRows(codec.head_dim, codec.spec, codec.order.tolist())
    return codec
