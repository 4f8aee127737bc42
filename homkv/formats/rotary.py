"""RoPE undone and done again: for formats that store keys as they were before it."""

import math
import struct

import torch
import xxhash
from torch import Tensor

from homkv.rope import RopeSpec


class Rotation:
    """The rotation of a model's keys, ``k[t] = R(t) k_before[t]``; norms that a scaled RoPE changes stay changed."""

    def __init__(self, rope: RopeSpec) -> None:
        turning = rope.pairs() if rope.pairing != "none" else ()
        self._first, self._second = (
            torch.tensor([pair[i] for pair in turning], dtype=torch.int64, device="cpu") for i in (0, 1)
        )
        self._frequency = torch.tensor(rope.inv_freq[: len(turning)], dtype=torch.float64, device="cpu")
        packed = struct.pack(f"<{3 * len(turning)}d", *self._first, *self._second, *self._frequency)
        self.digest = xxhash.xxh32_hexdigest(packed)

    def apply(self, x: Tensor, positions: Tensor, *, inverse: bool = False) -> Tensor:
        """Turn ``x [..., T, D]`` to, or back from, ``positions [..., T] int``, in x's dtype.

        Angles are reduced in float64: at 100,000 tokens float32 would be off by 0.004 radians.
        """
        if not len(self._frequency):
            return x
        first, second = self._first.to(x.device), self._second.to(x.device)
        angle = positions.to(torch.float64).unsqueeze(-1) * self._frequency.to(x.device)
        angle = torch.remainder(angle, 2 * math.pi).to(x.dtype)
        cos, sin = angle.cos(), -angle.sin() if inverse else angle.sin()
        a, b = x[..., first], x[..., second]
        out = x.clone()
        out[..., first], out[..., second] = a * cos - b * sin, b * cos + a * sin
        return out
