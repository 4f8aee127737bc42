"""Who holds which blocks and how long every sequence is, layer by layer: the cache's books, kept on the host."""

from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence as Many
from dataclasses import dataclass, field

import numpy as np

from homkv.blocks import BlockPool
from homkv.errors import CapacityError, FormatError, HomkvError
from homkv.formats.base import PageCodec


@dataclass
class Sequence:
    """A row of the exact buffers and the blocks of one sequence."""

    slot: int
    blocks: list[int] = field(default_factory=list)  # at least as many as the longest layer has pages


class SequenceTable:
    """Sequences, their blocks and lengths. The base of PagedCache, which adds the tensors."""

    def __init__(self, codec: PageCodec, num_layers: int, num_blocks: int, max_sequences: int) -> None:
        self.codec, self.num_layers, self.max_sequences = codec, num_layers, max_sequences
        # Counters in numpy: reading and writing single numbers of a tensor costs more than a small attention.
        self._page_table = np.zeros((max_sequences, max(num_blocks, 1)), np.int32)
        self._num_pages = np.zeros((num_layers, max_sequences), np.int32)
        self._exact_len = np.zeros((num_layers, max_sequences), np.int32)
        self._blocks = BlockPool(num_blocks)
        self._sequences: dict[int, Sequence] = {}
        self._kept: Counter[int] = Counter()  # references to blocks besides those of sequences
        self._broken: set[int] = set()  # ids: values that cannot be stored were noticed too late to leave them out
        self._free_slots = list(range(max_sequences - 1, -1, -1))
        self._next_id = 0

    def new_sequence(self, num_tokens: int = 0, shared: Many[int] = ()) -> int:
        """Open an empty sequence with room reserved for ``num_tokens``; returns its id, which is never reused.

        ``shared``: sealed blocks that become its first pages; a layer has them when ``load_layer`` is told so.
        Raises CapacityError if no slot or not enough blocks are free; nothing changes then.
        """
        if not self._free_slots:
            raise CapacityError(
                f"expected a free sequence slot, found all {self.max_sequences} taken; free a sequence first"
            )
        blocks = self._blocks.allocate(max(self.codec.num_pages(num_tokens) - len(shared), 0))
        self._blocks.share(shared)
        sequence = Sequence(self._free_slots.pop())
        self._hold(sequence, [*shared, *blocks])
        self._num_pages[:, sequence.slot] = 0
        self._exact_len[:, sequence.slot] = 0
        self._next_id += 1
        self._sequences[self._next_id] = sequence
        return self._next_id

    def fork(self, seq_id: int) -> int:
        """Open a copy that shares all pages with ``seq_id`` and continues on its own.

        Raises CapacityError if no slot is free, HomkvError in the middle of a forward pass (unequal layers).
        """
        source = self._sequence(seq_id)
        pages = self._num_pages[:, source.slot]
        if len(set(pages.tolist())) > 1 or len(set(self._exact_len[:, source.slot].tolist())) > 1:
            raise HomkvError("expected all layers at the same length, found a forward pass in progress; fork after it")
        new_id = self.new_sequence()
        copy = self._sequence(new_id)
        shared = source.blocks[: int(pages[0]) if self.num_layers else 0]
        self._blocks.share(shared)
        self._hold(copy, shared)
        self._num_pages[:, copy.slot] = pages
        self._exact_len[:, copy.slot] = self._exact_len[:, source.slot]
        return new_id

    def free(self, seq_id: int) -> None:
        """Give back the sequence's slot and its references to pages. Raises HomkvError if it was freed before."""
        sequence = self._sequence(seq_id)
        del self._sequences[seq_id]
        self._broken.discard(seq_id)
        self._blocks.release(sequence.blocks)
        self._free_slots.append(sequence.slot)

    def num_tokens(self, seq_id: int, layer: int = 0) -> int:
        """Tokens stored in one layer of a sequence."""
        slot = self._sequence(seq_id).slot
        return int(self._num_pages[layer, slot]) * self.codec.page_tokens + int(self._exact_len[layer, slot])

    def blocks(self, seq_id: int) -> list[int]:
        """The blocks of a sequence, in the order of its pages."""
        return list(self._sequence(seq_id).blocks)

    def keep(self, blocks: Iterable[int]) -> None:
        """Hold blocks beyond the life of their sequences."""
        blocks = list(blocks)
        self._blocks.share(blocks)
        self._kept.update(blocks)

    def drop(self, blocks: Iterable[int]) -> None:
        """Give up what :meth:`keep` held. Raises HomkvError for a block that was not kept."""
        for block in blocks:
            if not self._kept[block]:
                raise HomkvError(f"expected block {block} to be kept, found it not; it was dropped twice")
            self._kept[block] -= 1
            self._blocks.release([block])

    def is_only_kept(self, block: int) -> bool:
        """Whether a kept block would be free if it were dropped once."""
        return self._blocks.num_references(block) == 1

    @property
    def num_free_blocks(self) -> int:
        """Blocks that no sequence holds or has reserved."""
        return self._blocks.num_free

    def _sequence(self, seq_id: int) -> Sequence:
        if seq_id not in self._sequences:
            raise HomkvError(f"expected a live sequence id, found {seq_id}; it was freed or never opened")
        return self._sequences[seq_id]

    def _slots(self, seq_ids: list[int]) -> np.ndarray:
        return np.array([self._sequence(s).slot for s in seq_ids], np.int32)

    def _refuse_broken(self, seq_ids: list[int]) -> None:
        if not self._broken.isdisjoint(seq_ids):
            broken = sorted(self._broken.intersection(seq_ids))
            raise FormatError(f"expected finite values in sequences {broken}, found others earlier; free these")

    def _hold(self, sequence: Sequence, blocks: list[int]) -> None:
        at = len(sequence.blocks)
        self._page_table[sequence.slot, at : at + len(blocks)] = blocks
        sequence.blocks = sequence.blocks + blocks

    def _reserve(self, growth: list[tuple[Sequence, int]]) -> None:
        """Give each sequence as many blocks as stated, or raise CapacityError before any changes."""
        missing = [(s, pages - len(s.blocks)) for s, pages in growth if pages > len(s.blocks)]
        self._blocks.require(sum(count for _, count in missing))
        for sequence, count in missing:
            self._hold(sequence, self._blocks.allocate(count))

    def _counts(self, layer: int, sequence: Sequence) -> tuple[int, int]:
        """Pages and exact tokens of one layer."""
        return int(self._num_pages[layer, sequence.slot]), int(self._exact_len[layer, sequence.slot])

    def _pages_after(self, layer: int, seq_id: int, new_tokens: int) -> int:
        return self.codec.num_pages(self.num_tokens(seq_id, layer) + new_tokens)

    def _check_books(self) -> None:
        """Raise HomkvError unless reference counts, slots and lengths are what they must be."""
        self._blocks.check([*(s.blocks for s in self._sequences.values()), list(self._kept.elements())])
        used = [s.slot for s in self._sequences.values()]
        if sorted(used + self._free_slots) != list(range(self.max_sequences)):
            raise HomkvError(f"expected every slot used once or free once, found used {used}, free {self._free_slots}")
        for seq_id, sequence in self._sequences.items():
            for layer in range(self.num_layers):
                pages, held = self._counts(layer, sequence)
                if held != self.codec.num_exact(pages * self.codec.page_tokens + held):
                    raise HomkvError(f"layer {layer} of sequence {seq_id}: {held} exact tokens beside {pages} pages")
