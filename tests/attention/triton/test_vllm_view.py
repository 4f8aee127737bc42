"""What vLLM's blocks look like to the GPU's kernels: the same numbers as on the CPU."""

import pytest
import torch

from homkv.attention import api
from homkv.formats.rows import RowsCodec
from homkv.spec import RowsSpec
from homkv.vllm.blocks import BlockPlan
from homkv.vllm.store import LayerStore, page_ids

HEADS, DIM, ROWS = 1, 64, 3
SPEC = RowsSpec.parse("balanced")
PLAN = BlockPlan.of(SPEC, DIM)
SCALE = DIM**-0.5


@pytest.fixture
def store(device: torch.device) -> LayerStore:
    shape = (9, HEADS, PLAN.block_size, PLAN.block_bytes(DIM) // PLAN.block_size)
    memory = torch.zeros(shape, dtype=torch.uint8, device=device)
    return LayerStore(RowsCodec(DIM, SPEC), PLAN, memory, memory, torch.bfloat16)


def test_decode_and_later_chunks_agree_with_the_cpu(store: LayerStore, device: torch.device) -> None:
    torch.manual_seed(0)
    lengths = torch.tensor([40, 270])
    ids = torch.arange(1, 9, dtype=torch.int32, device=device).reshape(2, 4)
    tables, exact = page_ids(ids[:, :1].contiguous(), PLAN.pages_per_block), ids[:, 1:].contiguous()
    for b, length in enumerate(lengths.tolist()):
        k, v = (torch.randn(length, HEADS, DIM, device=device).bfloat16() for _ in "kv")
        store.store_many(tables[b], exact[b], 0, k, v, None)
    view = store.view(tables, exact, store.ring(exact, lengths.to(device)))
    q, k, v = (torch.randn(2, heads, 5, DIM, device=device).bfloat16() for heads in (ROWS, HEADS, HEADS))
    one = api.attend(q[:, :, :1], view, store.codec, SCALE, impl="triton")[0]
    chunk = api.extend(q, k, v, view, store.codec, SCALE, impl="triton")
    there = type(view)(**{name: x.cpu() for name, x in vars(view).items()})
    q, k, v = (x.cpu() for x in (q, k, v))
    expected = api.attend(q[:, :, :1], there, store.codec, SCALE, impl="cpu")[0]
    torch.testing.assert_close(one.cpu(), expected, rtol=0, atol=5e-3)
    expected = api.extend(q, k, v, there, store.codec, SCALE, impl="cpu")
    torch.testing.assert_close(chunk.cpu().float(), expected.float(), rtol=0, atol=1e-2)
