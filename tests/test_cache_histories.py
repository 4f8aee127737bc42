"""Any history of new, append, attend, fork and free leaves what a simple model says."""

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, precondition, rule
from torch import Tensor

from homkv.cache import PagedCache
from homkv.formats import make_codec
from homkv.testing.inputs import make_tokens

D, G, NUM_BLOCKS, MAX_SEQUENCES = 64, 1, 24, 4


class CacheHistory(RuleBasedStateMachine):
    """The model: every token of every live sequence, and which pages are whose."""

    sequences = Bundle("sequences")
    format_name = "k0020v2000"

    def __init__(self) -> None:
        super().__init__()
        self.codec = make_codec(self.format_name, D)
        self.cache = PagedCache(
            self.codec,
            num_layers=1,
            num_kv_heads=G,
            num_blocks=NUM_BLOCKS,
            max_sequences=MAX_SEQUENCES,
            impl="reference",
        )
        self.history: dict[int, list[Tensor]] = {}
        self.pages: dict[int, list[int]] = {}
        self.num_sealed = 0

    def remember(self, seq_id: int, kv: Tensor) -> None:
        self.history[seq_id] = [*self.history[seq_id], kv]
        self.grow(seq_id, self.length(seq_id))

    def grow(self, seq_id: int, length: int) -> None:
        while len(self.pages[seq_id]) < self.codec.num_pages(length):
            self.num_sealed += 1
            self.pages[seq_id] = [*self.pages[seq_id], self.num_sealed]

    def length(self, seq_id: int) -> int:
        return sum(kv.shape[2] for kv in self.history[seq_id])

    def room(self) -> int:
        return NUM_BLOCKS - len({page for pages in self.pages.values() for page in pages})

    def fits(self, count: int) -> bool:
        needed = (self.codec.num_pages(self.length(s) + count) - len(self.pages[s]) for s in self.history)
        return sum(needed) <= self.room()

    @precondition(lambda self: len(self.history) < MAX_SEQUENCES)
    @rule(target=sequences)
    def new(self) -> int:
        seq_id = self.cache.new_sequence()
        self.history[seq_id], self.pages[seq_id] = [], []
        return seq_id

    @rule(seq_id=sequences, count=st.sampled_from([1, 63, 64, 65, 200]), seed=st.integers(0, 99))
    def append(self, seq_id: int, count: int, seed: int) -> None:
        if self.fits(count):
            kv = make_tokens("normal", 2, G, count, D, seed=seed).half()
            self.cache.append(0, seq_id, kv[0], kv[1])
            self.remember(seq_id, kv)

    @precondition(lambda self: self.history)
    @rule(count=st.sampled_from([1, 1, 2, 70]), seed=st.integers(0, 99))
    def attend(self, count: int, seed: int) -> None:
        if not self.fits(count):
            return
        seq_ids = list(self.history)
        kv = make_tokens("normal", 2, len(seq_ids), G, count, D, seed=seed).half()
        o = self.cache.attend(0, seq_ids, torch.ones(len(seq_ids), 2, count, D).half(), kv[0], kv[1], 0.1)
        assert torch.isfinite(o).all()
        for i, seq_id in enumerate(seq_ids):
            self.remember(seq_id, kv[:, i])

    @rule(target=sequences, seq_id=sequences)
    def fork(self, seq_id: int) -> object:
        if len(self.history) == MAX_SEQUENCES:
            return multiple()
        copy = self.cache.fork(seq_id)
        self.history[copy], self.pages[copy] = self.history[seq_id], self.pages[seq_id]
        return copy

    @rule(seq_id=consumes(sequences))
    def free(self, seq_id: int) -> None:
        self.compare(seq_id)
        self.cache.free(seq_id)
        del self.history[seq_id], self.pages[seq_id]

    @invariant()
    def books_are_right(self) -> None:
        self.cache.check()
        assert self.cache.num_free_blocks == self.room()
        assert {s: self.cache.num_tokens(s) for s in self.history} == {s: self.length(s) for s in self.history}

    def compare(self, seq_id: int) -> None:
        """What is stored are the tokens of this history, encoded in one go."""
        found = self.cache.export_layer(0, seq_id)
        empty = torch.empty(2, G, 0, D, dtype=torch.float16)
        k, v = torch.cat([empty, *self.history[seq_id]], 2)
        sinks = min(self.codec.num_sinks, k.shape[1])
        body = slice(sinks, sinks + len(self.pages[seq_id]) * self.codec.page_tokens)
        for exact, x in ((found.exact_k, k), (found.exact_v, v)):
            assert torch.equal(exact, torch.cat((x[:, :sinks], x[:, body.stop :]), 1))
        if self.pages[seq_id]:
            assert torch.equal(found.pages.transpose(0, 1), self.codec.encode(k[:, body], v[:, body], sinks))

    def teardown(self) -> None:
        for seq_id in list(self.history):
            self.compare(seq_id)
            self.cache.free(seq_id)
        self.cache.check()
        assert self.cache.num_free_blocks == NUM_BLOCKS


class ExactHistory(CacheHistory):
    format_name = "fp16"


class HackHistory(CacheHistory):
    format_name = "hack"


TestRows, TestExact, TestHack = CacheHistory.TestCase, ExactHistory.TestCase, HackHistory.TestCase
TestRows.settings = TestExact.settings = TestHack.settings = settings(
    deadline=None, max_examples=8, stateful_step_count=12
)
