"""Formats that are restored before attention: nothing is computed on their codes.

Every step pays for dequantizing the whole context, as in the systems that these formats come from.
"""

import torch
from torch import Tensor

from homkv.formats.base import EIGHT_BIT, PageCodec, Rounding


class RestoredCodec(PageCodec):
    """Attention on ``dense`` keys and values, in the caller's dtype; a subclass says what the bytes are."""

    def scores(
        self, q: Tensor, pages: Tensor, rounding: Rounding = EIGHT_BIT, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """``q . k``; there is nothing to round."""
        return q.to(dtype) @ self.dense(pages, dtype)[0].transpose(-1, -2)

    def weigh(
        self, p: Tensor, pages: Tensor, rounding: Rounding = EIGHT_BIT, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """``sum_t p[t] v[t]``; there is nothing to round."""
        return p.to(dtype) @ self.dense(pages, dtype)[1]
