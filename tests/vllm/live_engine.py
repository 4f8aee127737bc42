"""One vLLM engine on pages, against the transformers path. Run by .ci/vllm, where vLLM is installed."""

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from live_cases import HEAD_DIM, LAYERS, by_transformers, model_folder, text_tokens

from homkv.spec import RowsSpec
from homkv.vllm import COUNT_NANS, SCHEDULER
from homkv.vllm.blocks import BlockPlan

PLAN = BlockPlan.of(RowsSpec.parse("balanced"), HEAD_DIM, 4)  # float32: what is compared is the arithmetic
NUM_BLOCKS = 15  # of 832 tokens, one of which vLLM keeps: three sequences of 800 tokens cannot all grow beyond 832
CHUNK = 512
NEW_TOKENS = 16

Answer = tuple[list[int], list[float], int]  # tokens, their logprobs, prompt tokens found in the prefix cache


class Engine:
    """vLLM in this process."""

    def __init__(self) -> None:
        from vllm import LLM

        self.llm = LLM(
            model_folder(),
            dtype="float32",
            enforce_eager=True,
            block_size=PLAN.block_size,
            num_gpu_blocks_override=NUM_BLOCKS,
            max_model_len=2048,
            max_num_seqs=8,
            max_num_batched_tokens=CHUNK,
            disable_log_stats=False,
            scheduler_cls=SCHEDULER,
        )

    def answer(self, prompts: list[list[int]], count: int = NEW_TOKENS) -> list[Answer]:
        from vllm import SamplingParams

        asked = [{"prompt_token_ids": ids} for ids in prompts]
        greedy = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, logprobs=1)
        found: list[Answer] = []
        for output in self.llm.generate(asked, greedy, use_tqdm=False):
            tokens = list(output.outputs[0].token_ids)
            chosen = [at[token].logprob for at, token in zip(output.outputs[0].logprobs, tokens, strict=True)]
            found.append((tokens, chosen, int(output.num_cached_tokens or 0)))
        return found

    def ends(self, prompts: list[list[int]]) -> list[tuple[str, list[int]]]:
        """Why each answer ended, and its tokens."""
        from vllm import SamplingParams

        asked = [{"prompt_token_ids": ids} for ids in prompts]
        greedy = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
        outputs = [output.outputs[0] for output in self.llm.generate(asked, greedy, use_tqdm=False)]
        return [(str(output.finish_reason), list(output.token_ids)) for output in outputs]

    def metric(self, name: str) -> float:
        return sum(m.value for m in self.llm.get_metrics() if m.name == name)


@pytest.fixture(scope="module")
def ids() -> list[int]:
    return text_tokens()


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    settings = {"HOMKV_VLLM_BACKEND": PLAN.name, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "0"}
    settings[COUNT_NANS] = "1"
    cores = os.sched_getaffinity(0)  # vLLM takes the process's main thread to the core it is bound to
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (settings | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}).items():
            patch.setenv(name, value)
        yield Engine()
    os.sched_setaffinity(0, cores)


Record = Callable[[str, object], None]


def compare(prompts: list[list[int]], answers: list[Answer], record: Record) -> list[tuple[int, float]]:
    """Per answer: tokens that the transformers path would not have chosen, and the mean difference of logprobs."""
    expected = by_transformers(prompts, [tokens for tokens, _, _ in answers])
    found = []
    for (tokens, logprobs, _), (greedy, reference) in zip(answers, expected, strict=True):
        others = sum(a != b for a, b in zip(tokens, greedy, strict=True))
        gap = sum(abs(a - b) for a, b in zip(logprobs, reference, strict=True)) / len(tokens)
        found.append((others, gap))
    shown = (f"{len(p)} tokens: {others} other, {gap:.4f}" for p, (others, gap) in zip(prompts, found, strict=True))
    record("measured", "tokens chosen otherwise and mean difference of logprobs, " + "; ".join(shown))
    return found


def test_the_backend_is_ours(engine: Engine) -> None:
    config: Any = engine.llm.llm_engine.vllm_config
    layers = config.compilation_config.static_forward_context
    assert {x.get_attn_backend().get_name() for x in layers.values()} == {PLAN.name}
    assert len(layers) == 2 * LAYERS


def test_text_and_logprobs_are_those_of_the_transformers_path(
    engine: Engine, ids: list[int], record_property: Record
) -> None:
    """Prompts that fit one chunk: before, at and behind the first pages; the answer to 310 tokens fills a page."""
    prompts = [ids[:1], ids[100:130], ids[:64], ids[:65], ids[:200], ids[40:350], ids[40:500]]
    one_by_one = [engine.answer([prompt])[0] for prompt in prompts]  # so that no prompt is cut by the batch's budget
    for others, gap in compare(prompts, one_by_one, record_property):
        assert others == 0
        assert gap < 0.002


def test_a_batch_of_unequal_prompts_in_chunks(engine: Engine, ids: list[int], record_property: Record) -> None:
    """Chunks of 512 tokens cut pages and attend to sealed ones; prompts and answers share steps."""
    prompts = [ids[7:500], ids[30:140], ids[300:680], ids[11:40]]
    for others, gap in compare(prompts, engine.answer(prompts), record_property):
        assert others <= 3
        assert gap < 0.15


def test_a_prefix_is_computed_once(engine: Engine, ids: list[int], record_property: Record) -> None:
    prompt, other = ids[50:950], ids[50:890] + ids[:40]
    (first,), (again,), (branch,) = (engine.answer([p], 12) for p in (prompt, prompt, other))
    assert first[2] == 0
    assert again[2] == branch[2] == PLAN.block_size
    for others, gap in compare([prompt, other], [again, branch], record_property):
        assert others <= 3
        assert gap < 0.15


def test_a_preempted_sequence_goes_on_where_it_was(engine: Engine, ids: list[int], record_property: Record) -> None:
    """Three sequences fill the pool when they grow into their second block: one must give way and come back."""
    before = engine.metric("vllm:num_preemptions")
    prompts = [ids[i * 90 : i * 90 + 800] for i in range(3)]
    answers = engine.answer(prompts, 40)
    assert engine.metric("vllm:num_preemptions") > before
    last = slice(2, 3)  # vLLM takes the blocks of the sequence that came last
    ((others, gap),) = compare(prompts[last], answers[last], record_property)
    assert others <= 8
    assert gap < 0.3


def test_a_request_whose_keys_do_not_fit_ends_alone_and_so_does_who_shares_its_pages(
    engine: Engine, ids: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One layer's key of token 70 is finite, and too large for a page; the prompt's second chunk reads that page."""
    layers: Any = engine.llm.llm_engine.vllm_config.compilation_config.static_forward_context
    impl = layers["model.layers.3.self_attn.attn"].impl
    right, wrong = ids[500:630], ids[20:920]
    alone = engine.ends([right])
    assert alone[0][0] == "length"

    def spoiled(layer: Any, query: Any, key: Any, value: Any, cache: Any, step: Any, *more: Any, **others: Any) -> Any:
        for chunk in step.chunks:
            if chunk.start == 0 and chunk.at.stop - chunk.at.start > len(right):
                key[chunk.at][70, 0, 31] = 2e5  # a slow channel: fast ones are not stored
        return type(impl).forward(impl, layer, query, key, value, cache, step, *more, **others)

    with monkeypatch.context() as patch:
        patch.setattr(impl, "forward", spoiled)
        assert engine.ends([right, wrong]) == [*alone, ("error", [])]
    assert engine.metric("vllm:corrupted_requests") == 1
    assert engine.ends([wrong]) == [("error", [])]  # its pages come from the prefix cache
    assert engine.ends([ids[21:921], right])[1:] == alone


@pytest.mark.parametrize(
    "arguments",
    [
        {"sliding_window": 128},
        {"alibi_slopes": [1.0]},
        {"logits_soft_cap": 30.0},
        {"kv_cache_dtype": "fp8"},
        {"attn_type": "encoder_only"},
        {"kv_sharing_target_layer_name": "x"},
        {"sinks": [0.0]},
        {"head_size": 128},
        {"head_size": 72},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_what_pages_do_not_compute_is_refused(engine: Engine, arguments: dict[str, Any]) -> None:
    from vllm.config import set_current_vllm_config

    from homkv.errors import UnsupportedError
    from homkv.vllm.backend import backend_class

    usual = {"num_heads": 9, "head_size": 64, "scale": 0.125, "num_kv_heads": 3}
    with (
        set_current_vllm_config(engine.llm.llm_engine.vllm_config),
        pytest.raises(UnsupportedError, match="expected"),
    ):
        backend_class(PLAN.name).get_impl_cls()(**(usual | arguments))


def test_latent_attention_is_refused_where_cpus_would_take_a_backend_of_their_own(engine: Engine) -> None:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from homkv.errors import UnsupportedError

    for mla in (AttentionBackendEnum.CPU_MLA, AttentionBackendEnum.AMX_MLA):
        with pytest.raises(UnsupportedError, match="MLA"):
            mla.get_class()


def test_speculation_is_refused(engine: Engine) -> None:
    from copy import copy

    from homkv.errors import UnsupportedError
    from homkv.vllm.impl import refuse

    config = copy(engine.llm.llm_engine.vllm_config)
    object.__setattr__(config, "speculative_config", object())
    with pytest.raises(UnsupportedError, match="speculative decoding"):
        refuse(config, {})


def test_registration_can_be_repeated() -> None:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from homkv.vllm import register

    register()
    register()
    assert AttentionBackendEnum.CPU_ATTN.get_class().get_name() == PLAN.name
    assert AttentionBackendEnum[PLAN.name].get_class() is AttentionBackendEnum.CPU_ATTN.get_class()
