"""16-bit KV as pages: the baseline everyone compares with. Nothing is quantized."""

import torch
from torch import Tensor

from homkv.formats.restored import RestoredCodec
from homkv.quant import require_finite
from homkv.spec import PAGE_TOKENS

EXACT_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


class ExactCodec(RestoredCodec):
    """A page is 64 keys then 64 values, ``[2][64][D]`` in fp16 or bf16, little endian."""

    page_tokens = PAGE_TOKENS
    num_sinks = 0
    min_window = 0
    restored_on_arrival = True

    def __init__(self, head_dim: int, name: str) -> None:
        super().__init__(head_dim)
        self.name = name
        self.dtype = EXACT_DTYPES[name]
        self.layout_id = f"exact/1 {name} D={head_dim}"
        self.page_bytes = 2 * PAGE_TOKENS * head_dim * 2

    def encode(self, k: Tensor, v: Tensor, first_position: int = 0) -> Tensor:
        """Cast and lay down whole pages; see PageCodec.encode. Raises FormatError for values beyond the dtype."""
        self.check_tokens(k, v)
        both = torch.stack([torch.unflatten(x, -2, (-1, PAGE_TOKENS)).to(self.dtype) for x in (k, v)], dim=-3)
        require_finite(both, f"keys and values within {self.name}")
        return both.contiguous().view(torch.uint8).flatten(-3)

    def dense(self, pages: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Keys and values, ``[..., N * 64, D]``."""
        self.check_pages(pages)
        halves = pages.contiguous().view(self.dtype)
        both = torch.unflatten(halves, -1, (2, PAGE_TOKENS, self.head_dim)).to(dtype)
        return both[..., 0, :, :].flatten(-3, -2), both[..., 1, :, :].flatten(-3, -2)
