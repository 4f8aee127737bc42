"""A prefix cache: leading blocks of prompts whose KV is kept, least recently used out first."""

from collections import OrderedDict
from collections.abc import Sequence

from homkv.sim.trace import PREFIX_BLOCK_TOKENS


class PrefixCache:
    """Shared by all prefill instances. Holds ``capacity_bytes`` of KV in the run's format: small forms hold more."""

    def __init__(self, capacity_bytes: float, block_bytes: float) -> None:
        self.max_blocks = int(capacity_bytes // block_bytes) if block_bytes else 0
        self.hit_tokens = 0
        self._blocks: OrderedDict[int, None] = OrderedDict()

    def lookup(self, blocks: Sequence[int], prompt_tokens: int) -> int:
        """Tokens of the prompt's leading blocks that are here, at most all but one; enters the whole prompt."""
        hits = 0
        for block in blocks:
            if block not in self._blocks:
                break
            hits += 1
        for block in reversed(blocks):  # the first block ends as the most recent: nothing is used without its prefix
            self._blocks[block] = None
            self._blocks.move_to_end(block)
        while len(self._blocks) > self.max_blocks:
            self._blocks.popitem(last=False)
        tokens = min(hits * PREFIX_BLOCK_TOKENS, prompt_tokens - 1)
        self.hit_tokens += tokens
        return tokens
