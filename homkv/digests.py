"""Digests of sealed pages: a page is written once, so a digest taken then proves later that nobody touched it."""

import torch
import xxhash
from torch import Tensor

PART = 256  # blocks whose words are multiplied at a time: bounds the memory this takes


def random_weights(num_words: int) -> Tensor:
    """Odd pseudo-random numbers ``[num_words] int64``, always the same."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-(1 << 62), 1 << 62, (num_words,), generator=generator) | 1


def checksum(pages: Tensor, weights: Tensor) -> Tensor:
    """``sum_i weight[i] word[i] mod 2^64`` over the 32-bit words of ``pages [N, ...] uint8``: ``[N] int64``.

    There may be more weights than words.

    Plain tensor arithmetic, so a GPU computes it without waiting for the host. The weights are odd: any change of a
    single word changes the sum.
    """
    words = pages.flatten(1).view(torch.int32)
    return (words * weights[: words.shape[1]]).sum(1)


class PageDigests:
    """One digest per layer and block, kept where the pages are: XXH3-64 on the CPU, :func:`checksum` elsewhere.

    They guard against damage, not against forgery.
    """

    def __init__(self, num_layers: int, num_blocks: int, block_bytes: int, device: torch.device) -> None:
        self._known = torch.zeros(num_layers, num_blocks, dtype=torch.int64, device=device)
        self._weights = None if device.type == "cpu" else random_weights(block_bytes // 4).to(device)

    def record(self, layer: int, pool: Tensor, blocks: Tensor) -> None:
        """Take digests of ``pool[blocks]``: ``pool [num_blocks, G, P] uint8``, ``blocks [N] int64``, on the device."""
        self._known[layer, blocks] = self._digest(pool, blocks)

    def changed(self, layer: int, pool: Tensor, blocks: Tensor) -> list[int]:
        """Which of ``blocks`` differ from what was recorded. Reads the answer back from the device."""
        wrong = self._digest(pool, blocks) != self._known[layer, blocks]
        found: list[int] = blocks[wrong].tolist()
        return found

    def _digest(self, pool: Tensor, blocks: Tensor) -> Tensor:
        if self._weights is not None:
            return torch.cat([checksum(pool[part], self._weights) for part in blocks.split(PART)])
        digests = [xxhash.xxh3_64_intdigest(pool[block].numpy().data) for block in blocks.tolist()]
        return torch.tensor([digest - (1 << 63) for digest in digests], dtype=torch.int64)
