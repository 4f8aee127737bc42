"""A decode step in vLLM's exact blocks: kernels against torch's functions, byte by byte, at every border of pages."""

import pytest
import torch
from torch import Tensor

from homkv.formats.rows import RowsCodec
from homkv.spec import RowsSpec
from homkv.vllm.blocks import BlockPlan
from homkv.vllm.store import LayerStore, Places, page_ids

HEADS, DIM = 2, 64
STORED = [0, 1, 62, 63, 64, 127, 190, 255, 256, 319, 320, 383]  # tokens before the step
STRANGERS = {8: 1, 10: 2}  # sequences, of whose ring one block is somebody else's: that of so many pages before


def filled(plan: BlockPlan, device: torch.device) -> tuple[LayerStore, Tensor, Tensor]:
    """A store that holds what others left behind, and the tables of STORED's sequences."""
    torch.manual_seed(0)
    columns = 1 + plan.exact_blocks
    blocks = torch.arange(1, 1 + len(STORED) * columns, dtype=torch.int32).reshape(-1, columns)
    shape = (1 + blocks.numel(), HEADS, plan.block_size, plan.block_bytes(DIM) // plan.block_size)
    memory = torch.randint(0, 255, shape).to(torch.uint8).to(device)
    store = LayerStore(RowsCodec(DIM, plan.spec), plan, memory, memory, torch.bfloat16)
    tables, exact = page_ids(blocks[:, :1], plan.pages_per_block).to(device), blocks[:, 1:].contiguous().to(device)
    for row, count in enumerate(STORED):
        if count:
            k, v = (torch.randn(count, HEADS, DIM).bfloat16().to(device) for _ in "kv")
            store.store_many(tables[row], exact[row], 0, k, v, None)
    for row, back in STRANGERS.items():
        block = exact[row, 1 + (STORED[row] // 64 - back - 1) % plan.ring_blocks].long()
        store.tags[block, 1] += 1
    return store, tables, exact


@pytest.mark.parametrize("preset", ["balanced", "balanced-long"])
def test_kernels_do_what_torch_does(preset: str, device: torch.device) -> None:
    plan = BlockPlan.of(RowsSpec.parse(preset), DIM)
    (store, tables, exact), (plain, *_) = filled(plan, device), filled(plan, device)
    lengths = torch.tensor([count + 1 for count in STORED], dtype=torch.int32, device=device)
    both = torch.randn(len(STORED), HEADS, 2, DIM).bfloat16().to(device)  # each a part of a larger projection
    k, v = both[:, :, 0], both[:, :, 1]
    plain.store_one(tables, exact, Places.of(lengths, plan.ring_blocks), k, v)
    expected = plain.view(tables, exact, plain.ring(exact, lengths), new=1)
    wide = torch.cat((exact, exact), 1)[:, : plan.exact_blocks]  # vLLM's table has columns to spare
    found, taint = store.step(tables[:, 1:].contiguous(), wide, lengths, k, v)
    assert torch.equal(taint, torch.zeros_like(taint))
    first = plan.pages_per_block  # of block 1: block 0 is nobody's
    assert torch.equal(store.pool[first:], plain.pool[first:])
    for name in ("num_pages", "exact_len", "page_table"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    for row, count in enumerate(found.exact_len.tolist()):
        assert torch.equal(found.exact_k[row, :, :count], expected.exact_k[row, :, :count])
        assert torch.equal(found.exact_v[row, :, :count], expected.exact_v[row, :, :count])
    rings = [(n - 1) // 64 + 1 - held for n, held in zip(lengths.tolist(), found.num_pages.tolist(), strict=True)]
    assert max(rings) > min(rings[row] for row in STRANGERS)  # a stranger's block was not taken
