"""homkv inside transformers: same tokens as the plain model, every padding, every way to generate."""

from collections.abc import Iterator

import pytest
import torch
from hf_cases import attached, generate, kv, padded, prompts
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.cache_utils import DynamicCache, StaticCache

from homkv.errors import CapacityError, FormatError, HomkvError, UnsupportedError
from homkv.hf import KVCache, attach
from homkv.models.forward import returned_cache
from homkv.testing.compare import assert_relative

SIZES = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "initializer_range": 0.2}
SPECIAL = {"max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}


def llama(**changes: object) -> LlamaForCausalLM:
    heads = {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 64}
    return LlamaForCausalLM(LlamaConfig(**SIZES | SPECIAL | heads | changes)).eval()


def qwen2(**changes: object) -> Qwen2ForCausalLM:
    heads = {"num_attention_heads": 7, "num_key_value_heads": 1, "head_dim": 128}
    model = Qwen2ForCausalLM(Qwen2Config(**SIZES | SPECIAL | heads | changes)).eval()
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.k_proj.bias, std=3)  # what makes Qwen2's keys hard to quantize
    return model


MODELS = {"llama 3:1, head 64": llama, "qwen2 7:1, head 128": qwen2}
models = pytest.mark.parametrize("build", MODELS.values(), ids=MODELS.keys())


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


# -- generation ----------------------------------------------------------------------------------------------------


@models
def test_16_bit_pages_generate_what_the_model_generates(build: type) -> None:
    model, ids = build(), prompts(2, 150)
    expected = generate(model, ids)
    with attached(model) as attachment:
        assert torch.equal(generate(model, ids), expected)
    cache = attachment.last_cache
    assert [cache.paged.num_tokens(s) for s in cache.seq_ids] == [161, 161]
    assert cache.kv_bytes() == 2 * 2 * model.config.num_key_value_heads * cache.codec.kv_bytes(161)


@models
@pytest.mark.parametrize(("name", "tolerance"), [("fp16", 2e-3), ("int8", 0.03), ("near-lossless", 0.5)])
def test_logits_are_near_those_of_the_model(build: type, name: str, tolerance: float) -> None:
    model, ids = build(), prompts(2, 200)
    expected = model(ids).logits[:, 190:]
    with attached(model, name):
        out = model(ids[:, :190], use_cache=True)
        found = []
        for t in range(190, 200):
            out = model(ids[:, t : t + 1], **kv(returned_cache(out)))
            found.append(out.logits[:, -1])
    difference = (torch.stack(found, 1) - expected).square().mean().sqrt()
    assert difference <= tolerance * expected.square().mean().sqrt()
    assert name == "fp16" or difference > 0


@models
def test_chunked_prefill_is_prefill(build: type) -> None:
    model, ids = build(), prompts(2, 170)
    expected = model(ids).logits
    with attached(model):
        past, found = None, []
        for chunk in ids.split([70, 1, 64, 35], 1):
            out = model(chunk, **kv(past), use_cache=True)
            past = returned_cache(out)
            found.append(out.logits)
    assert isinstance(past, KVCache)
    assert_relative(torch.cat(found, 1), expected, 5e-3)  # keys and values were rounded to fp16
    with attached(model, exact_dtype=torch.float32):
        whole = model(ids[:, :60], use_cache=True).logits
        first = model(ids[:, :30], use_cache=True)
        second = model(ids[:, 30:60], **kv(returned_cache(first))).logits
    assert_relative(torch.cat((first.logits, second), 1), whole, 1e-4)


def test_generate_can_prefill_in_chunks() -> None:
    model, ids = llama(), prompts(1, 150)
    with attached(model):
        assert torch.equal(generate(model, ids, prefill_chunk_size=40), generate(model, ids))


@models
@pytest.mark.parametrize("name", ["fp16", "balanced"])
def test_a_left_padded_batch_generates_what_each_prompt_alone_does(build: type, name: str) -> None:
    model, ids = build(), [prompts(n) for n in (150, 20, 137)]
    batch, mask = padded(ids, "left")
    with attached(model, name) as attachment:
        found = generate(model, batch, attention_mask=mask)[:, batch.shape[1] :]
        cache = attachment.last_cache
        assert [cache.paged.num_tokens(s) for s in cache.seq_ids] == [161, 31, 148]
        for row, alone in zip(found, ids, strict=True):
            assert torch.equal(row, generate(model, alone[None])[0, len(alone) :])


@models
def test_a_right_padded_batch_gives_the_logits_of_each_prompt(build: type) -> None:
    model, ids = build(), [prompts(n) for n in (30, 10)]
    batch, mask = padded(ids, "right")
    with attached(model):
        found = model(batch, attention_mask=mask, use_cache=True).logits
    for row, alone in zip(found, ids, strict=True):
        assert_relative(row[: len(alone)], model(alone[None]).logits[0], 1e-4)


def test_sampling_is_reproducible() -> None:
    model, ids = llama(), prompts(2, 140)
    runs = []
    with attached(model, "balanced"):
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            runs.append(generate(model, ids, do_sample=True, temperature=2.0, top_k=0))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_beams_share_their_past() -> None:
    model, ids = llama(), prompts(2, 140)
    expected = generate(model, ids, num_beams=3)
    with attached(model) as attachment:
        assert torch.equal(generate(model, ids, num_beams=3), expected)
    cache = attachment.last_cache
    assert len(cache.seq_ids) == 6
    used = cache.paged._blocks.num_blocks - cache.paged.num_free_blocks
    assert used < 6 * cache.codec.num_pages(140)


def test_gradients_do_not_pile_up_in_the_cache() -> None:
    model, ids = llama(), prompts(1, 140)
    with torch.enable_grad(), attached(model, "balanced") as attachment:
        out = model(ids, use_cache=True)
        model(ids[:, :1], **kv(returned_cache(out)))
    view = attachment.last_cache.paged.view(0, attachment.last_cache.seq_ids)
    assert not view.exact_k.requires_grad
    assert not view.exact_v.requires_grad


# -- caches --------------------------------------------------------------------------------------------------------


def test_a_cache_can_be_passed_reset_and_used_again() -> None:
    model, ids = llama(), prompts(2, 140)
    with attached(model) as attachment:
        cache = attachment.new_cache()
        first = generate(model, ids, **kv(cache))
        assert attachment.last_cache is None
        assert cache.get_seq_length() == 151
        cache.reset()
        assert cache.get_seq_length() == 0
        assert torch.equal(generate(model, ids, **kv(cache)), first)


def test_sequences_can_be_continued_elsewhere() -> None:
    """What a decode instance does: adopt stored sequences of unequal length in a new cache."""
    model, ids = llama(), prompts(1, 150)
    with attached(model) as attachment:
        expected = generate(model, ids)
        out = model(ids[:, :-1], use_cache=True)
        cache = KVCache.adopt(returned_cache(out).paged, returned_cache(out).seq_ids)
        assert torch.equal(generate(model, ids, **kv(cache)), expected)
    assert attachment.last_cache is returned_cache(out)


def test_caches_of_other_kinds_are_refused() -> None:
    model, ids = llama(), prompts(1, 8)
    started = returned_cache(model(ids, use_cache=True))
    static = StaticCache(config=model.config, max_cache_len=64)
    with attached(model):
        for past in (started, static):
            with pytest.raises(UnsupportedError, match="homkv cache"):
                model(ids[:, :1], **kv(past), use_cache=True)
        own = DynamicCache(config=model.config)
        model(ids, **kv(own), use_cache=True)
        with pytest.raises(UnsupportedError, match="returned"):  # it stayed empty: going on would forget the prompt
            model(ids[:, :1], **kv(own), use_cache=True)


def test_what_pages_cannot_do_is_refused() -> None:
    model, ids = llama(), prompts(2, 140)
    with attached(model):
        cache = returned_cache(model(ids, use_cache=True))
        for call in (
            lambda: cache.crop(1),
            lambda: cache.batch_repeat_interleave(2),
            lambda: cache.batch_select_indices(torch.tensor([0])),
            lambda: cache.layers[0].reorder_cache(torch.tensor([0, 1])),
            lambda: model(ids[:1, :1], **kv(cache)),
            lambda: model(ids, attention_mask=torch.ones(2, 1, 140, 140, dtype=torch.bool).tril()),
        ):
            with pytest.raises(UnsupportedError):
                call()
        with pytest.raises(HomkvError, match="empty"):
            _ = KVCache(cache.codec, num_layers=2, num_kv_heads=2, max_tokens=10).paged


def test_a_cache_needs_its_attention() -> None:
    model, ids = llama(), prompts(1, 8)
    with attached(model) as attachment:
        cache = attachment.new_cache()
    model(ids, **kv(cache))
    with pytest.raises(HomkvError, match="attach"):
        model(ids, **kv(cache))


def test_a_full_cache_refuses_and_can_go_on_afterwards() -> None:
    model, ids = llama(), prompts(1, 400)
    with attached(model, max_tokens=64) as attachment:
        cache = attachment.new_cache()
        model(ids[:, :60], **kv(cache))
        with pytest.raises(CapacityError, match="at most 64 tokens"):
            model(ids[:, 60:], **kv(cache))
        expected = model(ids[:, :64]).logits[:, -1:]
        assert_relative(model(ids[:, 60:64], **kv(cache)).logits[:, -1:], expected, 5e-3)


def test_without_a_cache_attention_is_the_models_own() -> None:
    model, ids = llama(), prompts(2, 40)
    expected = model(ids, use_cache=False).logits
    with attached(model) as attachment:
        assert_relative(model(ids, use_cache=False).logits, expected, 1e-5)
        assert attachment.last_cache is None
        with pytest.raises(UnsupportedError, match="padding without a cache"):
            model(ids, attention_mask=padded([ids[0], ids[1, :9]], "left")[1], use_cache=False)


# -- attaching -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True])
def test_leaving_the_block_undoes_everything(fails: bool) -> None:
    model, ids = llama(), prompts(1, 20)
    before = model.config._attn_implementation
    expected = model(ids).logits
    try:
        with attached(model):
            assert model.config._attn_implementation == "homkv"
            if fails:
                raise KeyError("inside the block")
    except KeyError:
        assert fails
    assert model.config._attn_implementation == before
    assert not model._forward_pre_hooks
    out = model(ids, use_cache=True)
    assert isinstance(returned_cache(out), DynamicCache)
    assert torch.equal(out.logits, expected)
    with attached(model):
        model(ids)


def test_attaching_twice_is_refused() -> None:
    model = llama()
    with attached(model), pytest.raises(UnsupportedError, match="attached"), attach(model, "fp16", impl="reference"):
        pass
    assert model.config._attn_implementation != "homkv"


def test_models_and_formats_that_are_not_covered_are_refused() -> None:
    sliding = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0}
    with pytest.raises(UnsupportedError, match="full attention"):
        attach(qwen2(**sliding))
    with pytest.raises(UnsupportedError, match="head_dim"):
        attach(llama(head_dim=48))
    with pytest.raises(FormatError, match="one of"):
        attach(llama(), "fp7")
    with pytest.raises(UnsupportedError, match="impl"):
        attach(llama(), "fp16", impl="cuda").new_cache()._open(1)
    training = llama(attention_dropout=0.1).train()
    with attached(training), pytest.raises(UnsupportedError, match="dropout"):
        training(prompts(1, 4))


def test_head_dims_that_rows_refuse_work_in_16_bits() -> None:
    model, ids = llama(head_dim=48), prompts(1, 70)
    expected = generate(model, ids)
    with attached(model, "fp16"):
        assert torch.equal(generate(model, ids), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["balanced", "hack"])
def test_16_bit_models_run(dtype: torch.dtype, name: str) -> None:
    model, ids = llama().to(dtype), prompts(1, 140)
    with attached(model, name) as attachment:
        out = generate(model, ids, output_logits=True, return_dict_in_generate=True)
    assert all(torch.isfinite(logits).all() for logits in out.logits)
    assert attachment.last_cache.paged.exact_dtype == dtype


def test_packed_documents_are_refused() -> None:
    model, ids = llama(), prompts(1, 8)
    with attached(model), pytest.raises(UnsupportedError, match="row of its own"):
        model(ids, position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]]))
