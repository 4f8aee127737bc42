"""Prefixes that requests have in common: keys of pages, and who holds them longest unused.

A page depends on nothing but the tokens up to its end, so two prompts that agree so far can share it.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

import numpy as np

from homkv.formats import PageCodec

KEY_BYTES = 16
Held = TypeVar("Held")


def page_keys(root: str, codec: PageCodec, token_ids: Sequence[int]) -> list[bytes]:
    """Keys of all full pages of a prompt: ``key[i] = H(key[i - 1], tokens of page i)``; page 0 includes the sinks.

    ``root`` names everything else that the bytes depend on: model, format, source. Cryptographic, because a client
    that could make two prompts collide would read another client's KV.
    """
    ids = np.asarray(token_ids, dtype="<u4")
    key = hashlib.blake2b(root.encode(), digest_size=KEY_BYTES).digest()
    keys, start = [], 0
    for page in range(codec.num_pages(len(ids))):
        stop = codec.num_sinks + (page + 1) * codec.page_tokens
        key = hashlib.blake2b(key + ids[start:stop].tobytes(), digest_size=KEY_BYTES).digest()
        keys.append(key)
        start = stop
    return keys


class PrefixIndex(Generic[Held]):
    """What is held for each page key, least recently used first. Counts what was asked and what was found, in pages."""

    def __init__(self) -> None:
        self._held: OrderedDict[bytes, Held] = OrderedDict()
        self.num_asked = 0
        self.num_found = 0

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, key: bytes) -> bool:
        return key in self._held

    def match(self, keys: Sequence[bytes]) -> list[Held]:
        """What is held for the longest known prefix of ``keys``; it becomes the most recently used."""
        found = []
        for key in keys:
            if key not in self._held:
                break
            found.append(self._held[key])
        for key in reversed(keys[: len(found)]):  # the tail of a chain is useless without its head: evict it first
            self._held.move_to_end(key)
        return found

    def count(self, num_asked: int, num_found: int) -> None:
        """Account for one request."""
        self.num_asked += num_asked
        self.num_found += num_found

    def add(self, key: bytes, held: Held) -> None:
        """Hold something for a key that is not held."""
        assert key not in self._held
        self._held[key] = held

    def evict(self, may_go: Callable[[Held], bool] = lambda held: True) -> Iterator[Held]:
        """Forget entries, least recently used first, as long as the caller iterates."""
        for key in [key for key, held in self._held.items() if may_go(held)]:
            yield self._held.pop(key)

    def values(self) -> list[Held]:
        """Everything that is held."""
        return list(self._held.values())
