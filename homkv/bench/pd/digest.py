"""Proof that the bytes that arrived are those that left: XXH3-128 on hosts, a checksum on devices.

Bytes that pass through a host's memory are hashed there, by the threads that send and receive them. Bytes that go from
device to device never reach a host: both devices sum them up, and the sum travels behind them.
"""

import torch
import xxhash
from torch import Tensor

from homkv.digests import checksum, random_weights
from homkv.transport.wire import Buffer

ROW_BYTES = 4096
TRAILER_BYTES = 8  # the sum, int64, behind the payload on direct links
ALIGN = 8  # a payload is padded to it, so that the sum is aligned


def host_digest(data: Buffer) -> bytes:
    """XXH3-128 of a buffer."""
    return xxhash.xxh3_128_digest(data)


def padded(num_bytes: int) -> int:
    """Where a payload's trailer begins."""
    return -(-num_bytes // ALIGN) * ALIGN


class DeviceDigest:
    """Sums of payloads on one device, without waiting for it."""

    def __init__(self, device: torch.device) -> None:
        self._weights = random_weights(ROW_BYTES // 4).to(device)

    def __call__(self, payload: Tensor) -> Tensor:
        """``[1] int64``: :func:`homkv.digests.checksum` of rows of 4096 bytes, then of the rows' sums."""
        cut = payload.numel() // ROW_BYTES * ROW_BYTES
        sums = [checksum(payload[:cut].view(-1, ROW_BYTES), self._weights)] if cut else []
        rest = payload[cut:]
        if len(rest):
            row = torch.zeros(1, ROW_BYTES, dtype=torch.uint8, device=payload.device)
            row[0, : len(rest)] = rest
            sums.append(checksum(row, self._weights))
        rows = torch.cat(sums)
        index = torch.arange(1, 2 * len(rows), 2, device=rows.device)  # odd: a swap of two rows shows
        return (rows * index).sum(0, keepdim=True)

    def seal(self, message: Tensor, num_bytes: int) -> None:
        """Write the trailer of a message ``[padded(num_bytes) + TRAILER_BYTES] uint8``."""
        message[padded(num_bytes) :].view(torch.int64).copy_(self(message[:num_bytes]))

    def is_intact(self, message: Tensor, num_bytes: int) -> Tensor:
        """``[] bool``, on the device."""
        return (message[padded(num_bytes) :].view(torch.int64) == self(message[:num_bytes])).all()
