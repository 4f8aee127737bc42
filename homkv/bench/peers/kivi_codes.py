"""KIVI's 2-bit form in torch: keys per channel over groups of tokens, values per token over quarters of a head."""

from dataclasses import dataclass

import torch
from torch import Tensor

from homkv.errors import ShapeError

LARGEST = 65504.0  # a value whose float16 offset and step are finite


@dataclass(frozen=True)
class KiviCache:
    """2-bit keys and values of B sequences with room for S tokens, S a multiple of the group.

    ``k_codes v_codes [B, G, S, D / 4] uint8``: byte c of a row holds channels c, c + D/4, c + D/2, c + 3D/4 from the
    low bits up; ``k_scale k_offset [B, G, S / group, D]``; ``v_scale v_offset [B, G, S, 4]``, one per quarter; float16.
    """

    k_codes: Tensor
    k_scale: Tensor
    k_offset: Tensor
    v_codes: Tensor
    v_scale: Tensor
    v_offset: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors, in the order of the kernel's arguments."""
        return self.k_codes, self.k_scale, self.k_offset, self.v_codes, self.v_scale, self.v_offset

    @property
    def group(self) -> int:
        """Tokens that share a channel's scale."""
        return self.k_codes.shape[2] // self.k_scale.shape[2]


@dataclass(frozen=True)
class KiviWindow:
    """The newest tokens of B sequences in 16 bits, in a ring: token t is row ``t % W``.

    ``k v [B, G, W, D]``, W a multiple of the group; ``lengths [B] int32``: all tokens, those with codes included.
    """

    k: Tensor
    v: Tensor
    lengths: Tensor

    def holds(self, num_coded: Tensor) -> Tensor:
        """Which rows are tokens behind the first ``num_coded [B]``: ``[B, W] bool``."""
        size = self.k.shape[2]
        age = (torch.arange(size, device=self.k.device) - num_coded[:, None]) % size
        return age < (self.lengths - num_coded)[:, None]


def fit(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """2-bit codes of ``x [..., n]`` between the row's minimum and maximum; float16 scale and offset ``[..., 1]``."""
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    scale = ((high - low) / 3).clamp_min(1e-6).half()
    codes = ((x - low) / scale.float()).round().clamp(0, 3).to(torch.uint8)
    return codes, scale, low.half()


def pack(codes: Tensor) -> Tensor:
    """Codes ``[..., D]`` of 2 bits to bytes ``[..., D / 4]``, quarter i in bits 2i and 2i + 1."""
    quarters = codes.unflatten(-1, (4, -1))
    shift = torch.tensor([1, 4, 16, 64], dtype=torch.uint8, device=codes.device)
    return (quarters * shift[:, None]).sum(-2, dtype=torch.uint8)


def quantize(k: Tensor, v: Tensor, group: int = 32) -> KiviCache:
    """Quantize ``k v [B, G, S, D]``, S a multiple of ``group`` (32 or 64). Raises ShapeError."""
    if k.shape != v.shape or k.shape[2] % group or k.shape[3] % 4 or group not in (32, 64):
        raise ShapeError(
            f"expected k and v [B, G, multiple of {group}, D] and groups of 32 or 64 tokens, found {tuple(k.shape)} "
            f"and {tuple(v.shape)}; pad the tokens"
        )
    k_codes, k_scale, k_offset = fit(k.float().unflatten(2, (-1, group)).transpose(-1, -2))
    v_codes, v_scale, v_offset = fit(v.float().unflatten(3, (4, -1)))
    return KiviCache(
        pack(k_codes.transpose(-1, -2).flatten(2, 3)),
        k_scale.squeeze(-1).contiguous(),
        k_offset.squeeze(-1).contiguous(),
        pack(v_codes.flatten(3)),
        v_scale.squeeze(-1).contiguous(),
        v_offset.squeeze(-1).contiguous(),
    )


def dequantize(cache: KiviCache) -> tuple[Tensor, Tensor]:
    """What the cache stands for: ``k v [B, G, S, D] float64``."""
    shift = torch.arange(0, 8, 2, device=cache.k_codes.device)[:, None]
    k, v = ((codes.unsqueeze(-2) >> shift & 3).double() for codes in (cache.k_codes, cache.v_codes))
    k = k.flatten(3) * cache.k_scale.double().repeat_interleave(cache.group, 2)
    v = v * cache.v_scale.double().unsqueeze(-1) + cache.v_offset.double().unsqueeze(-1)
    return k + cache.k_offset.double().repeat_interleave(cache.group, 2), v.flatten(3)
