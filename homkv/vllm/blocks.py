"""How pages fill vLLM's blocks: sizes, names and arithmetic. Standard library only.

vLLM's allocator knows one block size in bytes. Per layer and kv head, one of its blocks holds either

* ``pages_per_block`` pages of 64 tokens, which tokens ``[block_size * i, block_size * (i + 1))`` became, or
* 64 exact tokens, keys then values, and a tag: an *exact block*. A sequence has up to three of them: its first 64
  tokens (its sinks), and a ring of 128 tokens in two blocks that the window moves through. A longer window takes a
  longer ring: always 64 tokens more than the window has at least.

``pages_per_block`` is the smallest number of pages that such an exact block fits into, so both kinds are equally large.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from homkv.errors import FormatError, UnsupportedError
from homkv.spec import ALL_PRESETS, FORMAT_VERSION, HEAD_DIMS, PAGE_TOKENS, RowsSpec

BLOCK_VERSION = 1  # of the layout of a block around its pages; part of the backend's name
TAG_BYTES = 16  # which page's tokens a block of the ring holds, and that page's digest: two int64
RAW_BYTES = (2, 4)  # of one exact number: float16 and bfloat16, float32


def ceil_div(a: int, b: int) -> int:
    """``ceil(a / b)``."""
    return -(-a // b)


@dataclass(frozen=True)
class BlockPlan:
    """A rows format in blocks of ``block_size`` tokens."""

    spec: RowsSpec
    block_size: int

    @classmethod
    def of(cls, spec: RowsSpec, head_dim: int, raw_bytes: int = 2) -> "BlockPlan":
        """The plan for a model. Raises UnsupportedError for a head_dim that pages do not cover."""
        page_bytes = spec.layout(head_dim).page_bytes
        exact = PAGE_TOKENS * 2 * head_dim * raw_bytes + TAG_BYTES
        return cls(spec, ceil_div(exact, page_bytes) * PAGE_TOKENS)

    @cached_property
    def name(self) -> str:
        """Backend name: format, page version, block version, block size. vLLM's NIXL compares it in its handshake."""
        return f"HOMKV_{self.spec.name.upper()}_P{FORMAT_VERSION}_L{BLOCK_VERSION}_B{self.block_size}"

    @classmethod
    def parse(cls, name: str) -> "BlockPlan":
        """Read a backend name. Raises FormatError."""
        match = re.fullmatch(r"HOMKV_(K[0248]{4}V[0248]{4}(?:W(?:64|128|192|256))?)_P\d+_L\d+_B(\d+)", name)
        plan = cls(RowsSpec.parse(match[1].lower()), int(match[2])) if match else None
        if plan is None or plan.name != name or plan.block_size % PAGE_TOKENS or plan.block_size == 0:
            raise FormatError(
                f"expected a backend HOMKV_<format>_P{FORMAT_VERSION}_L{BLOCK_VERSION}_B<multiple of {PAGE_TOKENS}>, "
                f"found {name!r}; `homkv serve --engine vllm --dry-run` prints the one for a model"
            )
        return plan

    @property
    def pages_per_block(self) -> int:
        """Pages of one kv head in a block."""
        return self.block_size // PAGE_TOKENS

    @property
    def ring_blocks(self) -> int:
        """Exact blocks of a ring: the window, and 64 tokens that become a page."""
        return self.spec.min_window // PAGE_TOKENS + 1

    @property
    def exact_blocks(self) -> int:
        """Exact blocks of a long sequence: first tokens and ring."""
        return 1 + self.ring_blocks

    def check(self, head_dim: int, raw_bytes: int, block_size: int) -> None:
        """Raise UnsupportedError unless this plan is the one for the model and vLLM cuts blocks as it says."""
        needed = BlockPlan.of(self.spec, head_dim, raw_bytes)
        if needed != self or block_size != self.block_size:
            raise UnsupportedError(
                f"expected backend {needed.name} with --block-size {needed.block_size} for head_dim {head_dim} and "
                f"{raw_bytes}-byte keys and values, found {self.name} with --block-size {block_size}; use these, or "
                "let `homkv serve --engine vllm` set them"
            )

    def head_dims(self) -> list[int]:
        """Every head_dim whose models this plan is for, with exact numbers of some width."""
        return [dim for dim in HEAD_DIMS if any(BlockPlan.of(self.spec, dim, width) == self for width in RAW_BYTES)]

    def block_bytes(self, head_dim: int) -> int:
        """Bytes of a block per layer and kv head."""
        return self.pages_per_block * self.spec.layout(head_dim).page_bytes

    def num_blocks(self, num_tokens: int) -> int:
        """Blocks that a sequence of ``num_tokens`` tokens occupies, and that NIXL sends for it."""
        return ceil_div(num_tokens, self.block_size) + min(ceil_div(num_tokens, PAGE_TOKENS), self.exact_blocks)

    def kv_bytes(self, num_tokens: int, head_dim: int) -> int:
        """Bytes that a sequence occupies per layer and kv head, everything counted."""
        return self.num_blocks(num_tokens) * self.block_bytes(head_dim)

    def unused_bytes(self, num_tokens: int, head_dim: int, raw_bytes: int = 2) -> int:
        """Part of :meth:`kv_bytes` in which nothing is ever stored at this length.

        The last block's empty pages, the place of page 0 (its tokens are exact), and the slack of the exact blocks.
        """
        page_bytes = self.spec.layout(head_dim).page_bytes
        pages = ceil_div(num_tokens, self.block_size) * self.pages_per_block - ceil_div(num_tokens, PAGE_TOKENS) + 1
        exact = PAGE_TOKENS * 2 * head_dim * raw_bytes + TAG_BYTES
        exact_blocks = min(ceil_div(num_tokens, PAGE_TOKENS), self.exact_blocks)
        return pages * page_bytes + exact_blocks * (self.block_bytes(head_dim) - exact)


def preset_names() -> Iterator[str]:
    """Backend names of all presets, for every head_dim and width of exact numbers."""
    for preset in ALL_PRESETS:
        for head_dim in HEAD_DIMS:
            for raw_bytes in RAW_BYTES:
                yield BlockPlan.of(RowsSpec.parse(preset), head_dim, raw_bytes).name
