"""On a GPU with vLLM: requests whose keys do not fit end alone, beside decode steps in CUDA graphs.

    python -m pytest -p no:cacheprovider --rootdir tests/vllm -c /dev/null tests/vllm/live_gpu.py

A small Llama with weights that vLLM makes up, prompts in chunks, a prefix cache, sampling with and without temperature.
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from homkv.spec import RowsSpec
from homkv.vllm import COUNT_NANS, SCHEDULER
from homkv.vllm.blocks import BlockPlan

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; live_engine.py does this on CPUs")
DIM, VOCAB, CHUNK = 128, 4096, 1024
PLAN = BlockPlan.of(RowsSpec.parse("balanced"), DIM)
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 1024, "intermediate_size": 2048,
    "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": DIM, "vocab_size": VOCAB,
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}, "hidden_act": "silu",
    "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GRAPHS = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 4, 8]}
NEW_TOKENS = 200
SLOW = DIM // 2 - 1  # the channel that turns slowest; those of fast ones are not stored

Ends = list[tuple[str, int]]  # why an answer ended, and how many tokens it has


class Engine:
    """vLLM in this process."""

    def __init__(self, folder: Path) -> None:
        from vllm import LLM

        (folder / "config.json").write_text(json.dumps(CONFIG))
        self.llm = LLM(
            str(folder), load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16", max_model_len=4096, seed=0,
            max_num_seqs=8, max_num_batched_tokens=CHUNK, block_size=PLAN.block_size, attention_backend=PLAN.name,
            scheduler_cls=SCHEDULER, kv_cache_memory_bytes=2**28, gpu_memory_utilization=0.2,
            compilation_config=GRAPHS, kernel_config={"enable_jit_warmup": False},
        )  # fmt: skip
        layers: Any = self.llm.llm_engine.vllm_config.compilation_config.static_forward_context
        self.impl = layers["model.layers.1.self_attn.attn"].impl

    def ends(self, prompts: list[list[int]], temperature: float = 0) -> Ends:
        from vllm import SamplingParams

        how = SamplingParams(temperature=temperature, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False)
        asked = [{"prompt_token_ids": ids} for ids in prompts]
        answers = [output.outputs[0] for output in self.llm.generate(asked, how, use_tqdm=False)]
        return [(str(answer.finish_reason), len(answer.token_ids)) for answer in answers]

    def spoil(self, value: float, at: int, length: int) -> Any:
        """The second layer's forward, with one number of a key of prompts whose first chunk has ``length`` tokens."""

        def forward(layer: Any, q: Any, key: Any, v: Any, cache: Any, step: Any, *more: Any, **others: Any) -> Any:
            for chunk in step.chunks if step is not None else []:
                if chunk.start == 0 and chunk.at.stop - chunk.at.start == length:
                    key[chunk.at][at, 0, SLOW] = value
            return type(self.impl).forward(self.impl, layer, q, key, v, cache, step, *more, **others)

        return forward


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    settings = {COUNT_NANS: "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_FLASHINFER_SAMPLER": "0"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        yield Engine(tmp_path_factory.mktemp("llama"))


def prompt(length: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(10, VOCAB) for _ in range(length)]


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize(("value", "seed"), [(2e5, 10), (torch.nan, 20), (torch.inf, 30), (-torch.inf, 40)])
def test_a_prompt_whose_chunk_reads_a_marked_page_ends_alone(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, value: float, seed: int, temperature: int
) -> None:
    right, wrong = prompt(300, 1), prompt(2000, seed + temperature)
    expected = [("length", NEW_TOKENS), ("error", 0)]
    with monkeypatch.context() as patch:
        patch.setattr(engine.impl, "forward", engine.spoil(value, 70, CHUNK - len(right)))
        assert engine.ends([right, wrong], temperature) == expected
    assert engine.ends([right, wrong], temperature) == expected  # the page comes from the prefix cache
    assert engine.ends([right, prompt(2000, 0)], temperature) == [("length", NEW_TOKENS)] * 2


def test_an_answer_ends_when_its_window_has_passed_a_marked_page(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Token 250 of 310 is in the window at first, and exact: 2e5 is a number like others there."""
    right, wrong = prompt(300, 1), prompt(310, 3)
    with monkeypatch.context() as patch:
        patch.setattr(engine.impl, "forward", engine.spoil(2e5, 250, len(wrong)))
        (whole, (reason, count)) = engine.ends([right, wrong])
    assert whole == ("length", NEW_TOKENS)
    assert reason == "error"
    assert 0 < count < 64
