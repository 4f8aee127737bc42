"""Small host arrays to a device in one transfer that nobody waits for."""

import numpy as np
import torch
from torch import Tensor

ALIGN = 4  # int32: kernels are compiled for pointers at multiples of 16 bytes


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """``x`` on the device; from the host without waiting for the copy."""
    if device.type == "cuda" and x.device.type == "cpu":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


class Uploader:
    """Brings the counters of a view to a device in one transfer, or in none if they are those of the last call."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._shapes: list[tuple[int, ...]] = []
        self._packed, self._there = np.zeros(0, np.int32), torch.empty(0, dtype=torch.int32)

    def width(self, num_pages: int) -> int:
        """Columns of a page table that is to hold ``num_pages``: few different ones, or kernels are compiled anew."""
        return num_pages if self.device.type == "cpu" else -(-num_pages // 16) * 16

    def __call__(self, *arrays: np.ndarray) -> list[Tensor]:
        """The arrays as tensors on the device, not to be written to. On the CPU they share the arrays' memory."""
        if self.device.type == "cpu":
            return [torch.from_numpy(x) for x in arrays]
        ends = np.cumsum([-(-x.size // ALIGN) * ALIGN for x in arrays])
        starts, shapes = [0, *ends[:-1].tolist()], [x.shape for x in arrays]
        packed = np.zeros(ends[-1], np.int32)
        for start, x in zip(starts, arrays, strict=True):
            packed[start : start + x.size] = x.ravel()
        if shapes != self._shapes or not np.array_equal(packed, self._packed):
            self._there = to_device(torch.from_numpy(packed), self.device)
            self._shapes, self._packed = shapes, packed
        parts = zip(starts, arrays, strict=True)
        return [self._there[start : start + x.size].view(x.shape) for start, x in parts]
