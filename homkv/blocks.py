"""A pool of numbered blocks with reference counts. A block is one page of every layer and kv head."""

from collections import Counter
from collections.abc import Iterable, Sequence

from homkv.errors import CapacityError, HomkvError


class BlockPool:
    """Hands out block ids 0 … num_blocks - 1; a block returns to the pool when its last reference goes."""

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 0:
            raise CapacityError(f"expected num_blocks >= 0, found {num_blocks}")
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._references = [0] * num_blocks

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    def num_references(self, block: int) -> int:
        """How many hold a block."""
        return self._references[block]

    def require(self, count: int) -> None:
        """Raise CapacityError unless ``count`` blocks are free. Changes nothing."""
        if count > len(self._free):
            raise CapacityError(
                f"expected {count} free page blocks, found {len(self._free)} of {self.num_blocks}; nothing was "
                "written: free a sequence, shorten the request or build the cache with more blocks"
            )

    def allocate(self, count: int) -> list[int]:
        """Take ``count`` blocks with one reference each. Raises CapacityError, then nothing was taken."""
        self.require(count)
        taken = [self._free.pop() for _ in range(count)]
        for block in taken:
            self._references[block] = 1
        return taken

    def share(self, blocks: Iterable[int]) -> None:
        """Add one reference to each block."""
        for block in blocks:
            if self._references[block] == 0:
                raise HomkvError(f"expected block {block} to be in use, found it free; share only live sequences")
            self._references[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """Drop one reference of each block."""
        for block in blocks:
            if self._references[block] == 0:
                raise HomkvError(f"expected block {block} to be in use, found it free; it was released twice")
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free.append(block)

    def check(self, holders: Iterable[Sequence[int]]) -> None:
        """Raise HomkvError unless the reference counts are exactly those of ``holders`` and the rest is free."""
        counts = Counter(block for blocks in holders for block in blocks)
        wrong = [b for b in range(self.num_blocks) if self._references[b] != counts[b]]
        free = set(self._free)
        if wrong or len(free) != len(self._free) or any(counts[b] for b in free):
            raise HomkvError(
                f"expected every block's references to match its holders, found blocks {wrong[:8]} that do not "
                f"and {len(self._free)} free entries for {len(free)} free blocks; this is a bug in the cache"
            )
        if len(free) + len(counts) != self.num_blocks:
            raise HomkvError(f"expected {self.num_blocks} blocks, found {len(free)} free and {len(counts)} held")
