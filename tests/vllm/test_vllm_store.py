"""A layer's blocks against homkv's own cache: the same pages, the same attention, whatever brought the tokens."""

import pytest
import torch
from torch import Tensor

from homkv.attention import api, reference
from homkv.cache import PagedCache
from homkv.errors import UnsupportedError
from homkv.formats.rows import RowsCodec
from homkv.spec import PAGE_TOKENS, RowsSpec
from homkv.vllm.blocks import BlockPlan
from homkv.vllm.store import MARK, LayerStore, Places, page_ids, place_of

HEADS, DIM, ROWS = 2, 64, 4
PLAN, LONG = (BlockPlan.of(RowsSpec.parse(name), DIM, 4) for name in ("balanced", "balanced-long"))
SPEC = PLAN.spec
both = pytest.mark.parametrize("plan", [PLAN, LONG], ids=lambda plan: plan.spec.name)
LENGTHS = [1, 63, 64, 65, 127, 128, 129, 191, 192, 193, 256, 500]


def fresh(plan: BlockPlan = PLAN) -> LayerStore:
    """Blocks that hold what others left behind, exact blocks and pages in the same memory as in vLLM."""
    torch.manual_seed(3)
    memory = torch.randint(0, 255, (14, HEADS, plan.block_size, plan.block_bytes(DIM) // plan.block_size))
    memory = memory.to(torch.uint8)
    return LayerStore(RowsCodec(DIM, plan.spec), plan, memory, memory, torch.float32)


def tokens(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(count, HEADS, DIM, generator=generator) for _ in "kv")
    return k, v


class OneSequence:
    """A sequence in blocks of its own: pages in block ``first``, exact tokens in those behind it."""

    def __init__(self, store: LayerStore, first: int = 1) -> None:
        self.store, plan = store, store.plan
        self.tables = page_ids(torch.tensor([[first]], dtype=torch.int32), plan.pages_per_block)
        self.exact = first + torch.arange(1, 1 + plan.exact_blocks, dtype=torch.int32).unsqueeze(0)
        self.length = 0

    def add(self, k: Tensor, v: Tensor) -> None:
        before = self.store.ring(self.exact, torch.tensor([self.length])) if self.length else None
        self.store.store_many(self.tables[0], self.exact[0], self.length, k, v, before)
        self.length += len(k)

    def add_one(self, k: Tensor, v: Tensor) -> None:
        self.length += 1
        places = Places.of(torch.tensor([self.length]), self.store.plan.ring_blocks)
        self.store.store_one(self.tables, self.exact, places, k, v)

    def attend(self, q: Tensor, new: int = 0) -> Tensor:
        ring = self.store.ring(self.exact, torch.tensor([self.length]))
        view = self.store.view(self.tables, self.exact, ring, new)
        assert int(view.num_pages) * PAGE_TOKENS + int(view.exact_len) == self.length
        return api.attend(q, view, self.store.codec, DIM**-0.5)[0]

    def page(self, index: int) -> Tensor:
        return self.store.pool[self.tables[0, index]]


def by_the_book(k: Tensor, v: Tensor, q: Tensor, window_start: int) -> Tensor:
    """Attention in float64 over first tokens, pages up to ``window_start``, and exact tokens behind it."""
    codec = RowsCodec(DIM, SPEC)
    k, v = (x.transpose(0, 1) for x in (k, v))
    stop = max(window_start, PAGE_TOKENS)
    if stop > PAGE_TOKENS:
        pages = codec.encode(k[:, PAGE_TOKENS:stop], v[:, PAGE_TOKENS:stop])
        dense = codec.dense(pages, torch.float64)
        k, v = (torch.cat((x[:, :64].double(), d, x[:, stop:].double()), 1) for x, d in zip((k, v), dense, strict=True))
    rows = q.double().reshape(HEADS, ROWS // HEADS, DIM)
    weights = torch.softmax(rows @ k.double().transpose(1, 2) * DIM**-0.5, -1)
    return (weights @ v.double()).reshape(1, ROWS, 1, DIM)


def window_start(length: int, plan: BlockPlan = PLAN) -> int:
    return max(length // PAGE_TOKENS - plan.spec.min_window // PAGE_TOKENS, 1) * PAGE_TOKENS


@both
@pytest.mark.parametrize("length", LENGTHS)
def test_attention_reads_first_tokens_and_window_exactly(length: int, plan: BlockPlan) -> None:
    sequence = OneSequence(fresh(plan))
    k, v = tokens(length)
    sequence.add(k, v)
    q = torch.randn(1, ROWS, 1, DIM)
    expected = by_the_book(k, v, q, window_start(length, plan))
    torch.testing.assert_close(sequence.attend(q).double(), expected, rtol=0, atol=0.02)
    if length < 128 + plan.spec.min_window:  # no pages yet: nothing is rounded
        torch.testing.assert_close(sequence.attend(q).double(), expected, rtol=0, atol=1e-5)


@both
@pytest.mark.parametrize("cuts", [[400], [1] * 400, [64, 64, 272], [63, 1, 2, 334], [130, 1, 1, 268], [300, 28, 72]])
def test_pages_do_not_depend_on_how_tokens_came(cuts: list[int], plan: BlockPlan) -> None:
    whole, pieces = OneSequence(fresh(plan)), OneSequence(fresh(plan))
    k, v = tokens(400)
    whole.add(k, v)
    for part_k, part_v in zip(k.split(cuts), v.split(cuts), strict=True):
        (pieces.add_one if len(part_k) == 1 else pieces.add)(part_k, part_v)
    for index in range(1, 6):
        assert torch.equal(whole.page(index), pieces.page(index))
    q = torch.randn(1, ROWS, 1, DIM)
    assert torch.equal(whole.attend(q), pieces.attend(q))


@both
@pytest.mark.parametrize("length", [65, 128, 129, 192, 200, 320, 330])
def test_storing_the_last_token_again_changes_no_byte(length: int, plan: BlockPlan) -> None:
    """The decode side of a transfer recomputes the last prompt token."""
    sequence = OneSequence(fresh(plan))
    k, v = tokens(length)
    sequence.add(k, v)
    before = sequence.store.pool.clone()
    sequence.length -= 1
    sequence.add_one(k[-1:], v[-1:])
    assert torch.equal(sequence.store.pool, before)


def test_pages_are_those_of_homkv_with_64_sinks() -> None:
    sequence = OneSequence(fresh())
    k, v = tokens(256)
    sequence.add(k, v)
    pages = sequence.store.codec.encode(*(x.transpose(0, 1)[:, 64:] for x in (k, v)))
    for index in (1, 2, 3):
        assert torch.equal(sequence.page(index), pages[:, index - 1])


@both
def test_every_step_reads_what_homkvs_own_cache_reads(plan: BlockPlan) -> None:
    """Token by token across borders of pages: the same tokens as pages, and from the same step on."""
    codec = RowsCodec(DIM, plan.spec)
    codec.num_sinks = PAGE_TOKENS  # as here
    cache = PagedCache(codec, num_layers=1, num_kv_heads=HEADS, num_blocks=8, exact_dtype=torch.float32)
    seq_id, sequence = cache.new_sequence(440), OneSequence(fresh(plan))
    k, v = tokens(440)
    q = torch.randn(440, ROWS, 1, DIM)
    prompt = [x[:190].transpose(0, 1).unsqueeze(0) for x in (k, v)]
    cache.attend(0, [seq_id], torch.zeros(1, ROWS, 190, DIM), *prompt, DIM**-0.5)
    sequence.add(k[:190], v[:190])
    for at in range(190, 440):
        one_k, one_v = (x[at][None, :, None] for x in (k, v))
        expected = cache.attend(0, [seq_id], q[at : at + 1], one_k, one_v, DIM**-0.5)
        sequence.add_one(k[at : at + 1], v[at : at + 1])
        torch.testing.assert_close(sequence.attend(q[at : at + 1], new=1), expected, rtol=0, atol=1e-5)


def behind_a_hit(store: LayerStore, source: OneSequence, exact: list[int]) -> OneSequence:
    """A sequence that shares the source's pages and first tokens, with ring blocks of its own."""
    other = OneSequence(store)
    other.tables, other.exact = source.tables, torch.tensor([exact], dtype=torch.int32)
    other.length = source.length
    return other


def test_a_new_ring_behind_cached_pages_is_not_taken_for_a_window() -> None:
    """Its block may hold anything, also the window of a sequence that ended at the same place."""
    store = fresh()
    source, stranger = OneSequence(store, 1), OneSequence(store, 5)
    k, v = tokens(192)
    source.add(k, v)
    stranger.add(*tokens(192, seed=1))
    hit = behind_a_hit(store, source, [2, 7, 8])  # the stranger's ring
    q = torch.randn(1, ROWS, 1, DIM)
    torch.testing.assert_close(hit.attend(q).double(), by_the_book(k, v, q, 192), rtol=0, atol=0.02)
    wrong = by_the_book(torch.cat((k[:128], tokens(192, seed=1)[0][128:])), v, q, 128)
    assert (hit.attend(q).double() - wrong).abs().max() > 0.05


@both
def test_a_window_grows_again_behind_cached_pages(plan: BlockPlan) -> None:
    store, window = fresh(plan), plan.spec.min_window
    source, stranger = OneSequence(store, 1), OneSequence(store, 7)
    k, v = tokens(300 + window)
    source.add(k[:192], v[:192])
    stranger.add(*tokens(192, seed=1))
    hit = behind_a_hit(store, source, [2, *stranger.exact[0, 1:].tolist()])
    for at in range(192, 192 + window + 44):
        hit.add_one(k[at : at + 1], v[at : at + 1])
        view = store.view(hit.tables, hit.exact, store.ring(hit.exact, torch.tensor([hit.length])))
        assert (int(view.num_pages) + 1) * PAGE_TOKENS == 192  # first without a window, then with a full one
    q, last = torch.randn(1, ROWS, 1, DIM), hit.length
    torch.testing.assert_close(hit.attend(q).double(), by_the_book(k[:last], v[:last], q, 192), rtol=0, atol=0.02)


def test_a_gap_in_the_ring_ends_the_window() -> None:
    """Of three full blocks the middle one is a stranger's: only what is newer counts."""
    store = fresh(LONG)
    source, stranger = OneSequence(store, 1), OneSequence(store, 7)
    k, v = tokens(400)
    source.add(k, v)
    stranger.add(*tokens(400, seed=1))
    q = torch.randn(1, ROWS, 1, DIM)
    torch.testing.assert_close(source.attend(q).double(), by_the_book(k, v, q, 192), rtol=0, atol=0.02)
    source.exact[0, 1 + place_of(4, LONG.ring_blocks)] = stranger.exact[0, 1 + place_of(4, LONG.ring_blocks)]
    torch.testing.assert_close(source.attend(q).double(), by_the_book(k, v, q, 320), rtol=0, atol=0.02)
    view = store.view(source.tables, source.exact, store.ring(source.exact, torch.tensor([400])))
    assert int(view.num_pages) == 4


def test_sequences_of_unequal_length_step_together() -> None:
    store = fresh()
    sequences = [OneSequence(store, 1), OneSequence(store, 5)]
    lengths, histories = (127, 191), [tokens(127), tokens(191, seed=1)]
    for sequence, (k, v) in zip(sequences, histories, strict=True):
        sequence.add(k, v)
    k, v = tokens(2, seed=2)
    tables, exact = (torch.cat([getattr(s, name) for s in sequences]) for name in ("tables", "exact"))
    store.store_one(tables, exact, Places.of(torch.tensor(lengths) + 1, PLAN.ring_blocks), k, v)
    view = store.view(tables, exact, store.ring(exact, torch.tensor(lengths) + 1))
    q = torch.randn(2, ROWS, 1, DIM)
    o, _ = api.attend(q, view, store.codec, DIM**-0.5)
    for i, (old_k, old_v) in enumerate(histories):
        all_k, all_v = torch.cat((old_k, k[i : i + 1])), torch.cat((old_v, v[i : i + 1]))
        expected = by_the_book(all_k, all_v, q[i : i + 1], window_start(lengths[i] + 1))
        torch.testing.assert_close(o[i : i + 1].double(), expected, rtol=0, atol=0.02)
    check, _ = reference.attend(q, view, store.codec, DIM**-0.5)
    torch.testing.assert_close(o, check, rtol=0, atol=2e-3)


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf, 2e5])
@pytest.mark.parametrize("which", [0, 1], ids=["k", "v"])
@pytest.mark.parametrize("parts", [[300], [100, 100, 100], [1] * 300], ids=["whole", "chunks", "tokens"])
def test_a_page_that_cannot_be_stored_taints_whoever_reads_it(parts: list[int], which: int, wrong: float) -> None:
    """Token 100, of page 1, is not what a page can hold; exact tokens may be as large as they like."""
    store = fresh()
    sequence, other = OneSequence(store), OneSequence(store, 5)
    pair = tokens(300)
    pair[which][100, 1, 7] = wrong
    q = torch.randn(1, ROWS, 1, DIM)
    for k, v in zip(pair[0].split(parts), pair[1].split(parts), strict=True):
        (sequence.add_one if len(k) == 1 else sequence.add)(k, v)
        view = store.view(sequence.tables, sequence.exact, store.ring(sequence.exact, torch.tensor([sequence.length])))
        is_read = int(view.num_pages) >= 1
        assert store.taint(view).isnan().tolist() == [is_read]
        if sequence.length > 100 and not is_read:  # NaN and infinities are found as exact tokens
            assert sequence.attend(q).isfinite().all().item() == (wrong == 2e5)
    other.add(*tokens(300))
    assert (store.marks == MARK).nonzero().tolist() == [[int(sequence.tables[0, 1])]]
    assert other.attend(q).isfinite().all()


def test_a_changed_page_has_another_digest() -> None:
    sequence = OneSequence(fresh())
    sequence.add(*tokens(192))
    ids = sequence.tables[:, 1:3]
    before = sequence.store.digest(ids)
    sequence.store.pool[sequence.tables[0, 2], 1, 77] ^= 1
    after = sequence.store.digest(ids)
    assert before[0, 0] == after[0, 0]
    assert before[0, 1] != after[0, 1]


def test_strided_memory_is_refused() -> None:
    memory = torch.zeros(4, HEADS, PLAN.block_size, 2 * PLAN.block_bytes(DIM) // PLAN.block_size, dtype=torch.uint8)
    half = memory[..., : memory.shape[-1] // 2]
    with pytest.raises(UnsupportedError, match="LBHNC"):
        LayerStore(RowsCodec(DIM, SPEC), PLAN, half, half, torch.float32)
