"""The backend by itself, in batches as vLLM's tests of its own backends form them, against exact attention.

vLLM compares every backend with torch on random keys and values (its tests/v1/attention/test_attention_backends.py).
Ours rounds keys and values to pages; so the reference here is float64 attention over what the pages stand for, and
over the exact tokens as they are. docs/vllm.md says which of vLLM's tests have no counterpart. Run by .ci/vllm.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from homkv.errors import UnsupportedError
from homkv.formats.rows import RowsCodec
from homkv.spec import HEAD_DIMS, PAGE_TOKENS, RowsSpec
from homkv.vllm import COUNT_NANS, SCHEDULER
from homkv.vllm.blocks import BlockPlan
from homkv.vllm.launch import ServeOptions, commands

DIM = 64
PLAN, LONG = (BlockPlan.of(RowsSpec.parse(name), DIM, 4) for name in ("balanced", "balanced-long"))
CPU = torch.device("cpu")
ROUNDED, EXACT = 0.02, 2e-5  # largest error of an output: 8-bit queries and weights; float32
# (tokens after the step, new tokens) of each sequence; sequences with one new token come first, as vLLM orders them.
BATCHES = {
    "small decode": [(32, 1), (40, 1)],
    "small prefill": [(32, 8), (40, 8)],
    "small mixed": [(32, 1), (40, 1), (48, 5), (56, 5)],
    "medium decode": [(n, 1) for n in (128, 256, 512, 1024) * 2],
    "medium prefill": [(n, 16) for n in (256, 512, 1024, 2048)],
    "medium mixed": [(n, new) for new in (1, 7) for n in (512, 1024, 2048)],
    "large decode": [(2048, 1)] * 16,
    "large prefill": [(4096, 32)] * 3,
    "large mixed": [(n, new) for new in (1, 32) for n in (1024, 2048, 4096)],
    "one decode": [(1024, 1)],
    "one prefill": [(1024, 64)],
    # What pages add: their borders, whole prompts beside chunks, and chunks longer than blocks.
    "page borders": [(n, 1) for n in (1, 63, 64, 65, 127, 128, 129, 191, 192, 193, 256, 257)],
    "later borders": [(n, 1) for n in (320, 321, 384, 385, 832, 833)],
    "whole prompts": [(77, 1), (1, 1), (65, 65), (300, 300), (900, 900)],
    "long chunks": [(500, 1), (1900, 1000), (2000, 70), (130, 129)],
}
HEADS = {"4 over 2": (4, 2), "4 over 4": (4, 4), "9 over 3": (9, 3), "8 over 1": (8, 1)}


class Batch:
    """Sequences in shuffled blocks of one layer's cache."""

    def __init__(
        self, config: Any, heads: tuple[int, int], lengths: list[tuple[int, int]], plan: BlockPlan = PLAN
    ) -> None:
        from vllm.v1.kv_cache_interface import FullAttentionSpec

        from homkv.vllm.backend import backend_class

        backend, (self.num_heads, self.groups), self.plan = backend_class(plan.name), heads, plan
        config.compilation_config.static_forward_context.clear()
        spec = FullAttentionSpec(
            block_size=plan.block_size, num_kv_heads=self.groups, head_size=DIM, dtype=torch.float32
        )
        self.config, self.spec = config, backend.customize_spec(spec)
        self.builder = backend.get_builder_cls()(self.spec, ["layer"], config, CPU)
        self.impl = backend.get_impl_cls()(
            num_heads=self.num_heads, head_size=DIM, scale=DIM**-0.5, num_kv_heads=self.groups
        )
        self._allocate([total for total, _ in lengths])

    def _allocate(self, totals: list[int]) -> None:
        """Block 0 is nobody's; every sequence has blocks of pages and exact ones; nothing is clean."""
        plan = self.plan
        counts = [-(-total // plan.block_size) for total in totals]
        num_blocks = 1 + sum(counts) + plan.exact_blocks * len(totals)
        free = iter((torch.randperm(num_blocks - 1) + 1).tolist())
        self.tables = torch.zeros(len(totals), max(counts), dtype=torch.int32)
        for row, count in enumerate(counts):
            self.tables[row, :count] = torch.tensor([next(free) for _ in range(count)])
        self.exact = torch.tensor([[next(free) for _ in range(plan.exact_blocks)] for _ in totals], dtype=torch.int32)
        shape = (num_blocks, self.groups, plan.block_size, plan.block_bytes(DIM) // plan.block_size)
        self.memory = torch.randint(0, 255, shape).to(torch.uint8)
        assert self.spec.page_size_bytes == self.memory[0].numel()
        self.impl.exact.kv_cache = self.memory

    def metadata(self, rows: list[int], totals: list[int], new: list[int], **more: Any) -> Any:
        """vLLM's common metadata of one step."""
        from vllm.v1.attention.backend import CommonAttentionMetadata

        starts = torch.tensor([0, *new]).cumsum(0).int()
        lengths = torch.tensor(totals, dtype=torch.int32)
        return CommonAttentionMetadata(
            query_start_loc=starts, query_start_loc_cpu=starts, seq_lens=lengths, seq_lens_cpu_upper_bound=lengths,
            num_reqs=len(rows), num_actual_tokens=int(starts[-1]), max_query_len=max(new), max_seq_len=max(totals),
            block_table_tensor=self.tables[rows], slot_mapping=torch.zeros(int(starts[-1]), dtype=torch.int64), **more,
        )  # fmt: skip

    def step(self, rows: list[int], totals: list[int], q: list[Tensor], k: list[Tensor], v: list[Tensor]) -> Tensor:
        """One forward pass of the layer: outputs of all new tokens, ``[N, H, D]``."""
        from vllm.forward_context import set_forward_context

        built = self.builder.build(0, self.metadata(rows, totals, [len(x) for x in q]))
        found = {"layer": built, self.impl.exact.layer_name: self.exact[rows]}
        query = torch.cat(q)
        with set_forward_context(found, self.config):
            return self.impl.forward(
                None, query, torch.cat(k), torch.cat(v), self.memory, built, torch.full_like(query, torch.nan)
            )


def stands_for(codec: RowsCodec, k: Tensor, v: Tensor, new: int) -> tuple[Tensor, Tensor]:
    """What attention reads of stored tokens ``k v [T, G, D]``: ``[G, T, D]`` float64, pages between exact tokens.

    ``new``: tokens among them that have just joined the window.
    """
    k, v = (x.transpose(0, 1) for x in (k, v))
    window = max((k.shape[1] - new - codec.min_window) // PAGE_TOKENS, 1) * PAGE_TOKENS
    if window == PAGE_TOKENS:
        return k.double(), v.double()
    dense = codec.dense(codec.encode(k[:, 64:window], v[:, 64:window]), torch.float64)
    k, v = (torch.cat((x[:, :64].double(), d, x[:, window:].double()), 1) for x, d in zip((k, v), dense, strict=True))
    return k, v


def by_definition(codec: RowsCodec, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Float64 attention of the last ``q [n, H, D]`` of a sequence ``k v [T, G, D]``."""
    new, total = len(q), len(k)
    if new == 1:  # after the token was stored
        keys, values = stands_for(codec, k, v, 1)
    elif new == total:
        keys, values = (x.transpose(0, 1).double() for x in (k, v))
    else:
        old = stands_for(codec, k[:-new], v[:-new], 0)
        keys, values = (torch.cat((o, x[-new:].transpose(0, 1)), 1) for o, x in zip(old, (k, v), strict=True))
    rows = q.double().transpose(0, 1).unflatten(0, (keys.shape[0], -1))
    scores = rows @ keys.unsqueeze(1).transpose(-1, -2) * DIM**-0.5
    future = torch.arange(total) > torch.arange(total - new, total).unsqueeze(1)
    o = torch.softmax(scores.masked_fill(future, -torch.inf), -1) @ values.unsqueeze(1)
    return o.flatten(0, 1).transpose(0, 1)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """vLLM's configuration for a small Llama in float32."""
    from vllm import envs
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs

    envs.disable_envs_cache()  # an engine of another module may have left one
    folder: Path = tmp_path_factory.mktemp("llama")
    shape = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1}
    shape |= {"vocab_size": 1024, "intermediate_size": 512, "max_position_embeddings": 8192}
    text = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(text | shape))
    arguments = EngineArgs(
        str(folder), skip_tokenizer_init=True, dtype="float32", block_size=PLAN.block_size, scheduler_cls=SCHEDULER
    )
    found = arguments.create_engine_config()
    with set_current_vllm_config(found), pytest.MonkeyPatch.context() as patch:
        patch.setenv(COUNT_NANS, "1")
        yield found


def run(config: Any, heads: tuple[int, int], lengths: list[tuple[int, int]], plan: BlockPlan = PLAN) -> None:
    """Store every sequence's past, run the step, and compare each sequence's outputs."""
    torch.manual_seed(42)
    batch = Batch(config, heads, lengths, plan)
    codec = batch.impl.codec
    k, v = ([torch.randn(total, batch.groups, DIM) for total, _ in lengths] for _ in "kv")
    q = [torch.randn(new, batch.num_heads, DIM) for _, new in lengths]
    past = [(row, total - new) for row, (total, new) in enumerate(lengths) if total > new]
    if past:
        rows, totals = (list(x) for x in zip(*past, strict=True))
        ones = [n for n, total in enumerate(totals) if total == 1]  # first, as vLLM orders them
        order = ones + [n for n in range(len(rows)) if n not in ones]
        rows, totals = ([x[n] for n in order] for x in (rows, totals))
        old_q = [torch.randn(total, batch.num_heads, DIM) for total in totals]
        old = [[x[row][:total] for row, total in zip(rows, totals, strict=True)] for x in (k, v)]
        batch.step(rows, totals, old_q, *old)
    new_k, new_v = ([x[-n:] for x, (_, n) in zip(xs, lengths, strict=True)] for xs in (k, v))
    found = batch.step(list(range(len(lengths))), [total for total, _ in lengths], q, new_k, new_v)
    for (total, new), o, *qkv in zip(lengths, found.split([n for _, n in lengths]), q, k, v, strict=True):
        error = (o.double() - by_definition(codec, *qkv)).abs().max()
        reads_pages = new < total and total - new >= 2 * PAGE_TOKENS + plan.spec.min_window
        assert error < (ROUNDED if reads_pages else EXACT), f"{new} of {total} tokens: off by {error:.2e}"


@pytest.mark.parametrize("name", BATCHES)
def test_a_batch_is_exact_attention_over_what_its_pages_stand_for(config: Any, name: str) -> None:
    run(config, HEADS["4 over 2"], BATCHES[name])


@pytest.mark.parametrize("name", ["page borders", "later borders", "whole prompts", "long chunks", "medium mixed"])
def test_a_longer_window(config: Any, name: str) -> None:
    run(config, HEADS["4 over 2"], BATCHES[name], LONG)


@pytest.mark.parametrize("heads", list(HEADS)[1:])
def test_other_numbers_of_heads(config: Any, heads: str) -> None:
    run(config, HEADS[heads], BATCHES["medium mixed"])


@pytest.mark.parametrize(
    ("more", "found"),
    [
        ({"causal": False}, "not causal"),
        ({"causal": torch.tensor([True, False])}, "not causal"),
        ({"mm_req_doc_ranges": {0: [(0, 3)]}}, "both ways"),
        ({"rswa_prefix_lens": torch.tensor([4])}, "sliding windows"),
    ],
)
def test_batches_with_other_masks_are_refused(config: Any, more: dict[str, Any], found: str) -> None:
    batch = Batch(config, HEADS["4 over 2"], [(8, 8)])
    with pytest.raises(UnsupportedError, match=found):
        batch.builder.build(0, batch.metadata([0], [8], [8], **more))


def test_requests_that_nobody_would_end_are_refused(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM alone samples from NaN. Either the request or the engine must end."""
    monkeypatch.delenv(COUNT_NANS)
    with pytest.raises(UnsupportedError, match=f"{COUNT_NANS}=1.*found scheduler {SCHEDULER} and {COUNT_NANS}=0"):
        Batch(config, HEADS["4 over 2"], [(8, 8)])
    monkeypatch.setenv("VLLM_RAISE_ON_LOGIT_NANS", "1")
    Batch(config, HEADS["4 over 2"], [(8, 8)])


def test_quantized_outputs_are_refused(config: Any) -> None:
    batch, x = Batch(config, HEADS["4 over 2"], [(8, 8)]), torch.zeros(8, 4, DIM)
    with pytest.raises(UnsupportedError, match="quantized output"):
        batch.impl.forward(None, x, x, x, batch.memory, None, x, output_scale=torch.ones(1))


@pytest.mark.parametrize("decode", [0, 1])
def test_vllm_knows_every_option_of_a_server_on_gpus(decode: int) -> None:
    """Those on CPUs are started by live_pair."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    options = ServeOptions("/m", "m", PLAN, device="cuda", num_decode=decode, max_model_len=1024)
    for command in (c for c in commands(options, 8) if c.name != "router"):
        parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(list(command.argv[3:]))
        validate_parsed_serve_args(parsed)
        engine = AsyncEngineArgs.from_cli_args(parsed)
        assert (engine.attention_backend, engine.block_size) == (PLAN.name, PLAN.block_size)
        assert (engine.kv_transfer_config is not None) == bool(decode)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_gpus_may_select_the_backend(head_dim: int) -> None:
    """What vLLM's selector asks on a GPU, and no CPU does; a wrong head_dim is among its reasons to say no."""
    from vllm.platforms.interface import DeviceCapability

    from homkv.vllm.backend import backend_class

    plan = BlockPlan.of(RowsSpec.parse("balanced"), head_dim)
    asked: dict[str, Any] = {"dtype": torch.bfloat16, "kv_cache_dtype": "auto", "block_size": plan.block_size}
    asked |= {"has_sink": False, "use_sparse": False, "use_mm_prefix": False, "use_per_head_quant_scales": False}
    asked |= {"device_capability": DeviceCapability(9, 0), "attn_type": "decoder", "use_kv_connector": True}
    backend = backend_class(plan.name)
    assert backend.validate_configuration(head_size=head_dim, use_mla=False, **asked) == []
    assert backend.validate_configuration(head_size=72, use_mla=False, **asked) == ["head_size not supported"]
    assert backend.validate_configuration(head_size=head_dim, use_mla=True, **asked) == ["MLA not supported"]
