"""What a layer does in a decode step inside vLLM, part by part, in CUDA graphs: storing, laying out, attending.

    python benchmarks/vllm_step.py --kv balanced --batch 18 --tokens 16640

No vLLM needed: the blocks are laid out as vLLM lays them out.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from homkv.attention import api
from homkv.attention.view import LayerView
from homkv.formats.rows import RowsCodec
from homkv.spec import RowsSpec
from homkv.vllm.blocks import BlockPlan, ceil_div
from homkv.vllm.lasting import Lasting
from homkv.vllm.store import LayerStore, page_ids

HEADS, ROWS, DIM = 8, 32, 128  # Llama 3 8B's
REPEATS = 8  # of a part in one graph
GPU = torch.device("cuda")


def filled(plan: BlockPlan, batch: int, tokens: int) -> tuple[LayerStore, torch.Tensor, torch.Tensor]:
    """A layer's cache with ``batch`` sequences of ``tokens`` tokens, their tables of pages and of exact blocks."""
    count = ceil_div(tokens + 1, plan.block_size)
    columns = count + plan.exact_blocks
    blocks = 1 + torch.randperm(batch * columns, device=GPU).int().reshape(batch, columns)
    shape = (1 + batch * columns, HEADS, plan.block_size, plan.block_bytes(DIM) // plan.block_size)
    memory = torch.zeros(shape, dtype=torch.uint8, device=GPU)
    store = LayerStore(RowsCodec(DIM, plan.spec), plan, memory, memory, torch.bfloat16)
    tables, exact = page_ids(blocks[:, :count], plan.pages_per_block), blocks[:, count:].contiguous()
    for b in range(batch):
        k, v = (torch.randn(tokens, HEADS, DIM, dtype=torch.bfloat16, device=GPU) for _ in "kv")
        store.store_many(tables[b], exact[b], 0, k, v, None)
    return store, tables, exact


def microseconds(part: Callable[[], object], turns: int = 20) -> float:
    """Median time of ``part`` in a graph."""
    part()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(REPEATS):
            part()
    times: list[float] = []
    for _ in range(turns):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in "ab")
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(1e3 * start.elapsed_time(stop) / REPEATS)
    return statistics.median(times[2:])


def main() -> None:
    """Print a table, and append a record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kv", default="balanced")
    parser.add_argument("--batch", type=int, default=18)
    parser.add_argument("--tokens", type=int, default=16640)
    parser.add_argument("--out", type=Path, help="JSONL to append to")
    options = parser.parse_args()
    plan, batch = BlockPlan.of(RowsSpec.parse(options.kv), DIM), options.batch
    torch.manual_seed(0)
    store, tables, exact = filled(plan, batch, options.tokens)
    lengths = torch.full((batch,), options.tokens + 1, dtype=torch.int32, device=GPU)
    kept = Lasting(batch, GPU).keep(batch, lengths, tables)
    k, v = (torch.randn(batch, HEADS, DIM, dtype=torch.bfloat16, device=GPU) for _ in "kv")
    q = torch.randn(batch, ROWS, 1, DIM, dtype=torch.bfloat16, device=GPU)

    def store_and_view() -> LayerView:
        return store.step(kept.pages, exact, kept.lengths, k, v)[0]

    view = store_and_view()
    parts: dict[str, Callable[[], object]] = {
        "store, seal, lay out": store_and_view,
        "attention": lambda: api.attend(q, view, store.codec, DIM**-0.5),
    }
    found = {name: microseconds(part) for name, part in parts.items()}
    record = {"kv": options.kv, "batch": batch, "tokens": options.tokens, "us": found}
    record |= {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    table = Table(title=f"{options.kv}: a layer's decode step, {batch} sequences of {options.tokens} tokens")
    table.add_column("part")
    table.add_column("µs", justify="right")
    for name, time in found.items():
        table.add_row(name, f"{time:.1f}")
    Console().print(table)
    print(json.dumps(record), flush=True)
    if options.out:
        with options.out.open("a") as file:
            file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
