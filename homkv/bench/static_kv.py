"""What people use today, for the same decode loop: keys and values side by side, in 16 bits or fp8 (e4m3)."""

from collections.abc import Callable

import torch
from torch import Tensor

from homkv.attention.prefill import causal
from homkv.errors import CapacityError
from homkv.generate import StepKV

FP8_MAX = 448.0  # largest e4m3
# attend(q [B, H, 1, D], k v [B, G, S, D], lengths [B] int32, softmax_scale, k_scale v_scale [G] float32): [B, H, 1, D]
Attend = Callable[[Tensor, Tensor, Tensor, Tensor, float, Tensor, Tensor], Tensor]
Store = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], None]


class StaticKV(StepKV):
    """Buffers ``[B, G, S, D]`` per layer, S tokens of room. fp8 has one scale per kv head, ``x ~ scale code``.

    Raises CapacityError if the device has too little memory.
    """

    def __init__(
        self,
        num_sequences: int,
        capacity: int,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
        attend: Attend,
        store: Store,
    ) -> None:
        self.num_sequences, self.device = num_sequences, torch.empty(0, device=device).device
        self.is_capturable = self.device.type == "cuda"
        self._attend, self._store, self._capacity = attend, store, capacity
        shape = (num_sequences, num_kv_heads, capacity, head_dim)
        try:
            self._k, self._v = (
                [torch.empty(shape, dtype=dtype, device=device) for _ in range(num_layers)] for _ in "kv"
            )
        except torch.OutOfMemoryError as error:
            raise CapacityError(
                f"expected memory for {num_layers} x {list(shape)} {dtype}, found too little"
            ) from error
        self._lengths = torch.zeros(num_sequences, dtype=torch.int32, device=device)
        scale = torch.ones(num_kv_heads, device=device)
        self._scales = [(scale.clone(), scale.clone()) for _ in range(num_layers)]

    def fill(self, num_tokens: int) -> None:
        """Let every sequence hold ``num_tokens`` standard normal keys and values: what a prefill would leave."""
        for buffer in (*self._k, *self._v):
            some = torch.randn(*buffer.shape[1:2], min(num_tokens, 1024), buffer.shape[3], device=self.device)
            for start in range(0, num_tokens, some.shape[1]):
                part = some[:, : num_tokens - start]
                buffer[:, :, start : start + part.shape[1]] = part.to(buffer.dtype)
        self._lengths.fill_(num_tokens)

    def prefill(self, layer: int, row: int, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> Tensor:
        """See StepKV.prefill. The first prompt's largest values set the scales of fp8."""
        num_tokens = k.shape[2]
        for new, buffer, scale in ((k, self._k, self._scales[layer][0]), (v, self._v, self._scales[layer][1])):
            new = new[0].float()
            if buffer[layer].dtype == torch.float8_e4m3fn:
                if row == 0:
                    scale.copy_(new.abs().amax((1, 2)).clamp_min(1e-6) / FP8_MAX)
                new = (new / scale[:, None, None]).clamp(-FP8_MAX, FP8_MAX)
            buffer[layer][row, :, :num_tokens] = new.to(buffer[layer].dtype)
        self._lengths[row] = num_tokens
        return causal(q, k, v, softmax_scale)

    def start(self) -> None:
        """See StepKV.start."""

    def advance(self) -> None:
        """See StepKV.advance."""
        self._lengths += 1

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> Tensor:
        """See StepKV.attend."""
        k_all, v_all, scales = self._k[layer], self._v[layer], self._scales[layer]
        self._store(k[:, :, 0], v[:, :, 0], k_all, v_all, self._lengths, *scales)
        return self._attend(q, k_all, v_all, self._lengths, softmax_scale, *scales).to(q.dtype)

    def check(self) -> None:
        """See StepKV.check. What overflows shows in the logits."""

    def finish(self) -> None:
        """See StepKV.finish."""

    def num_bytes(self) -> int:
        """See StepKV.num_bytes."""
        return sum(x.nbytes for x in (*self._k, *self._v))
