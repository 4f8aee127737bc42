"""Proof that the bytes that arrived are those that left: XXH3-128 on hosts, a checksum on devices.

Bytes that pass through a host's memory are hashed there, by the threads that send and receive them. Bytes that go from
device to device never reach a host: both devices sum them up, and the sum travels behind them.
"""

import torch
import xxhash
from torch import Tensor

from homkv.digests import random_weights
from homkv.transport.wire import Buffer

ROW_WORDS = 512
ROW_BYTES = 8 * ROW_WORDS
TRAILER_BYTES = 8  # the sum, int64, behind the payload on direct links
ALIGN = 8  # a payload is padded to it, so that the sum is aligned


def host_digest(data: Buffer) -> bytes:
    """XXH3-128 of a buffer."""
    return xxhash.xxh3_128_digest(data)


def padded(num_bytes: int) -> int:
    """Where a payload's trailer begins."""
    return -(-num_bytes // ALIGN) * ALIGN


class DeviceDigest:
    """Sums of payloads on one device, in one pass, without waiting for it.

    ``sum_r (2 r + 1) sum_i w[i] x[r, i] mod 2^64`` over rows of 512 words of 64 bits, the last one filled with zeros.
    All factors are odd: any change of one word changes the sum. It guards against damage, not against forgery.
    """

    def __init__(self, device: torch.device) -> None:
        self._weights = random_weights(ROW_WORDS).to(device)

    def __call__(self, payload: Tensor) -> Tensor:
        """``[1] int64`` of ``payload [bytes] uint8``, whose memory is aligned to 8 bytes."""
        cut = payload.numel() // ROW_BYTES * ROW_BYTES
        rest = payload[cut:]
        tail = torch.zeros(ROW_BYTES, dtype=torch.uint8, device=payload.device)
        tail[: len(rest)] = rest
        words = payload[:cut].view(torch.int64).view(-1, ROW_WORDS)
        sums = torch.cat(
            ((words * self._weights).sum(1), (tail.view(torch.int64) * self._weights).sum(0, keepdim=True))
        )
        odd = torch.arange(1, 2 * len(sums), 2, device=sums.device)
        return (sums * odd).sum(0, keepdim=True)

    def seal(self, message: Tensor, num_bytes: int) -> None:
        """Write the trailer of a message ``[padded(num_bytes) + TRAILER_BYTES] uint8``."""
        message[padded(num_bytes) :].view(torch.int64).copy_(self(message[:num_bytes]))

    def is_intact(self, message: Tensor, num_bytes: int) -> Tensor:
        """``[] bool``, on the device."""
        return (message[padded(num_bytes) :].view(torch.int64) == self(message[:num_bytes])).all()
