"""Decode steps inside vLLM as a CUDA graph holds them: fixed shapes, lasting addresses, nothing read back.

On a GPU the steps are captured and replayed; elsewhere a few of them run as they are, in Triton's interpreter.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from homkv.attention import api
from homkv.formats.rows import RowsCodec
from homkv.spec import RowsSpec
from homkv.vllm.blocks import BlockPlan
from homkv.vllm.lasting import Kept, Lasting
from homkv.vllm.store import MARK, LayerStore, Places, page_ids

HEADS, DIM, ROWS, MAX_ROWS = 2, 64, 4, 5
PLAN, LONG = (BlockPlan.of(RowsSpec.parse(name), DIM) for name in ("balanced", "balanced-long"))
TOLERANCE = {"cpu": 2e-5, "cuda": 5e-3}  # a GPU cuts four rows into other splits than three
STARTS = [126, 318, 63]  # tokens before the first step
STEPS = {"cpu": 2, "cuda": 70}  # in 70 every sequence fills a page, at different steps


def blocks_of(plan: BlockPlan) -> Tensor:
    """Three sequences' blocks, one of pages each and the exact ones."""
    columns = 1 + plan.exact_blocks
    return torch.arange(1, 1 + 3 * columns, dtype=torch.int32).reshape(3, columns)


def filled(device: torch.device, plan: BlockPlan = PLAN) -> LayerStore:
    """Three sequences in blocks of their own."""
    blocks = blocks_of(plan).to(device)
    shape = (1 + blocks.numel(), HEADS, plan.block_size, plan.block_bytes(DIM) // plan.block_size)
    memory = torch.zeros(shape, dtype=torch.uint8, device=device)
    store = LayerStore(RowsCodec(DIM, plan.spec), plan, memory, memory, torch.bfloat16)
    torch.manual_seed(1)
    for row, count in enumerate(STARTS):
        k, v = (torch.randn(count, HEADS, DIM).bfloat16().to(device) for _ in "kv")
        store.store_many(page_ids(blocks[row, :1], plan.pages_per_block), blocks[row, 1:], 0, k, v, None)
    return store


class Decode:
    """The layer's part of a decode step of four rows, the last of which is padding, on lasting metadata."""

    def __init__(self, store: LayerStore, device: torch.device) -> None:
        self.store, self.device, plan = store, device, store.plan
        self.lasting = Lasting(MAX_ROWS, device)
        self.blocks = torch.zeros(4, 1, dtype=torch.int32, device=device)  # as vLLM's tables are while it captures
        self.exact = torch.zeros(4, plan.exact_blocks, dtype=torch.int32, device=device)
        self.q = torch.zeros(4, ROWS, 1, DIM, dtype=torch.bfloat16, device=device)
        self.k, self.v = (torch.zeros(4, HEADS, DIM, dtype=torch.bfloat16, device=device) for _ in "kv")
        self.o = torch.zeros(4, ROWS, 1, DIM, device=device)
        self.kept = self.metadata([0, 0, 0])
        self.replay = self.captured()
        blocks = blocks_of(plan).to(device)
        self.blocks[:3], self.exact[:3] = blocks[:, :1], blocks[:, 1:]

    def metadata(self, lengths: list[int]) -> Kept:
        there = torch.tensor([*lengths, 0], dtype=torch.int32, device=self.device)
        return self.lasting.keep(4, there, page_ids(self.blocks, self.store.plan.pages_per_block))

    def run(self) -> None:
        kept = self.kept
        view, taint = self.store.step(kept.pages, self.exact, kept.lengths, self.k, self.v)
        o, _ = api.attend(self.q, view, self.store.codec, DIM**-0.5)
        torch.add(o, taint[:, None, None, None], out=self.o)

    def captured(self) -> Callable[[], None]:
        """:meth:`run`, from a graph where there are graphs."""
        if self.device.type != "cuda":
            return self.run
        self.run()  # compiles; nothing but the null block changes
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.run()
        return graph.replay


def compare(decode: Decode, plain: LayerStore) -> None:
    """Steps through a graph against steps that plan on the host."""
    device, plan = decode.device, plain.plan
    blocks = blocks_of(plan).to(device)
    tables, exact = page_ids(blocks[:, :1], plan.pages_per_block), blocks[:, 1:].contiguous()
    for step in range(1, STEPS[device.type] + 1):
        lengths = [start + step for start in STARTS]
        new = [torch.randn(3, n, DIM).bfloat16().to(device) for n in (ROWS, HEADS, HEADS)]
        decode.q[:3], decode.k[:3], decode.v[:3] = new[0].unsqueeze(2), new[1], new[2]
        decode.metadata(lengths)
        decode.replay()
        host = Places.of(torch.tensor(lengths), plan.ring_blocks)
        plain.store_one(tables, exact, Places(*(x.to(device) for x in vars(host).values())), new[1], new[2])
        view = plain.view(tables, exact, plain.ring(exact, torch.tensor(lengths, device=device)), new=1)
        expected = api.attend(new[0].unsqueeze(2), view, plain.codec, DIM**-0.5)[0]
        torch.testing.assert_close(decode.o[:3], expected, rtol=0, atol=TOLERANCE[device.type])
    first = plan.pages_per_block  # of block 1: block 0 is nobody's
    assert torch.equal(decode.store.pool[first:], plain.pool[first:])
    assert torch.equal(decode.store.tags[1:], plain.tags[1:])


@pytest.mark.parametrize("plan", [PLAN, LONG], ids=lambda plan: plan.spec.name)
def test_steps_of_a_graph_are_steps_planned_on_the_host(device: torch.device, plan: BlockPlan) -> None:
    compare(Decode(filled(device, plan), device), filled(device, plan))


def test_metadata_stays_where_it_was(device: torch.device) -> None:
    decode = Decode(filled(device), device)
    kept = decode.kept

    def addresses(found: Kept) -> list[int]:
        return [x.data_ptr() for x in vars(found).values()]

    assert addresses(decode.metadata([128, 251, 64])) == addresses(kept)
    assert kept.lengths.tolist() == [128, 251, 64, 0]


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf, 2e5])
@pytest.mark.parametrize("which", ["k", "v"])
def test_a_page_that_cannot_be_stored_taints_whoever_reads_it_and_nobody_else(
    device: torch.device, which: str, wrong: float
) -> None:
    """Two sequences fill a page in one step, one of them with a number that no page holds: 2e5 only exact tokens do."""
    decode = Decode(filled(device), device)
    tables = page_ids(blocks_of(PLAN)[:, :1], PLAN.pages_per_block).long().to(device)

    def finite(lengths: list[int]) -> list[bool]:
        for x in (decode.q, decode.k, decode.v):
            x.normal_()
        if lengths[1] == 384:
            getattr(decode, which)[1, 0, 5] = wrong
        decode.metadata(lengths)
        decode.replay()
        return [bool(decode.o[row].isfinite().all()) for row in range(3)]

    assert finite([127, 383, 62]) == [True, True, True]
    assert finite([128, 384, 63])[::2] == [True, True]
    assert (decode.store.marks[tables] == MARK).nonzero().tolist() == [[1, 5]]
    assert finite([129, 385, 64]) == [True, wrong == 2e5, True]  # page 5 is the window: read exactly
    assert finite([193, 449, 65]) == [True, False, True]  # its tokens have left the window
