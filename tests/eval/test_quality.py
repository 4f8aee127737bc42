"""Teacher-forced quality: exact formats lose nothing, coarser ones lose more, the numbers are what they claim."""

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from homkv.errors import ShapeError
from homkv.eval.quality import decode_forced, divergence, passkey, run_exact
from homkv.eval.report import QualityOptions, chunk_ids, measure
from homkv.models import LoadedModel, describe_model
from homkv.texts import PasskeyPrompt


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=200,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=512,
        initializer_range=0.12,  # sharp attention, so that quantization shows
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0}, unk_token="a")))
    return describe_model(LlamaForCausalLM(config), tokenizer, "tiny")


def ids(batch: int, count: int) -> torch.Tensor:
    return torch.randint(0, 200, (batch, count), generator=torch.Generator().manual_seed(1))


def test_16_bit_kv_is_the_exact_model(loaded: LoadedModel) -> None:
    exact = run_exact(loaded, ids(2, 220), 200)
    found = divergence(loaded, exact, "fp16")
    assert found.num_tokens == 40
    assert 0 <= found.kl < 1e-5
    assert found.top1 == 1
    assert len(found.kl_per_row) == 2


def test_fewer_bits_lose_more(loaded: LoadedModel) -> None:
    exact = run_exact(loaded, ids(2, 300), 280)
    names = ("int8", "near-lossless", "k2222v2222")
    eight, four, two = (divergence(loaded, exact, name, impl="reference").kl for name in names)
    assert eight < four < two


def test_kl_is_zero_against_itself_and_counts_every_token(loaded: LoadedModel) -> None:
    exact = run_exact(loaded, ids(1, 160), 150)
    steps = 0

    def step() -> None:
        nonlocal steps
        steps += 1

    logits = torch.stack(list(decode_forced(loaded, exact, "fp16", step=step)), 1)
    assert steps == 10
    assert logits.shape == exact.logits.shape
    torch.testing.assert_close(logits, exact.logits, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(("count", "prefix"), [(100, 0), (100, 100), (600, 500)])
def test_impossible_splits_are_refused(loaded: LoadedModel, count: int, prefix: int) -> None:
    with pytest.raises(ShapeError, match="expected 0 < prefix"):
        run_exact(loaded, ids(1, count), prefix)


def test_passkey_counts_prompts_that_are_repeated(loaded: LoadedModel) -> None:
    context = tuple(ids(1, 150)[0].tolist())
    answer: list[int] = []
    for _ in range(3):  # what this model says anyway
        answer.append(int(loaded.model(torch.tensor([[*context, *answer]])).logits[0, -1].argmax()))
    right = PasskeyPrompt("12345", 0.5, context[:140], context[140:], tuple(answer))
    wrong = PasskeyPrompt("12345", 0.5, context[:140], context[140:], tuple((a + 1) % 200 for a in answer))
    assert passkey(loaded, [right, wrong, right], ["fp16"]) == {"fp16": 2}


@pytest.mark.model
def test_balanced_keeps_a_real_model_and_hack_does_not(smollm2: LoadedModel) -> None:
    options = QualityOptions(("balanced", "hack"), chunks=1, prefix=480, scored=32, passkey_prompts=0)
    begun = []

    def begin(what: str, steps: int) -> object:
        begun.append((what, steps))
        return lambda: None

    balanced, hack = measure(smollm2, options, begin)  # type: ignore[arg-type]
    assert balanced.kl < 0.03
    assert balanced.top1 > 0.8
    assert hack.kl > 20 * balanced.kl
    assert ("balanced: divergence", 32) in begun


@pytest.mark.model
def test_chunks_are_consecutive_tokens(smollm2: LoadedModel) -> None:
    chunks = chunk_ids(smollm2, 3, 100)
    assert torch.equal(chunks.flatten(), chunk_ids(smollm2, 1, 300).flatten())
    with pytest.raises(ShapeError, match="chunks of"):
        chunk_ids(smollm2, 0, 100)
