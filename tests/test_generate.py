"""The decode loop gives what attach() and model.generate give, for every format, padding and end."""

import pytest
import torch
from test_hf import SIZES, SPECIAL, kv, llama, padded, prompts, qwen2
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from homkv.attention.triton.runtime import is_available
from homkv.errors import CapacityError, FormatError, ShapeError, UnsupportedError
from homkv.generate import Decoder, PagesKV, StepKV, generate
from homkv.generate.loop import attention_of, split_prompts
from homkv.generate.sampling import Sampling, choose
from homkv.hf import attach, measure
from homkv.testing.compare import assert_relative

MODELS = {"llama 3:1, head 64": llama, "qwen2 7:1, head 128": qwen2}
models = pytest.mark.parametrize("build", MODELS.values(), ids=MODELS.keys())
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # kernels are interpreted on the CPU
needs_triton = pytest.mark.skipif(not is_available(), reason="needs a CUDA device or TRITON_INTERPRET=1")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def expect(model: PreTrainedModel, ids: Tensor, name: str, count: int, **options: object) -> Tensor:
    """New tokens by transformers' own loop on attached pages."""
    options = {"attention_mask": torch.ones_like(ids)} | options
    with attach(model, name, impl="reference"):
        out = model.generate(ids, max_new_tokens=count, do_sample=False, **options)
    return out[:, ids.shape[1] :]


# -- same tokens ---------------------------------------------------------------------------------------------------


@models
@pytest.mark.parametrize("name", ["balanced", "fp16", "hack-2026", "hack:rounding=nearest"])
def test_the_loop_generates_what_generate_generates(build: type, name: str) -> None:
    model, ids = build(), prompts(2, 120)
    found = generate(model, ids, name, max_new_tokens=80, impl="reference")  # long enough to seal a page
    assert torch.equal(found, expect(model, ids, name, 80))
    assert model.config._attn_implementation != "homkv"


@pytest.mark.parametrize("side", ["left", "right"])
def test_prompts_of_unequal_length_are_as_if_alone(side: str) -> None:
    model, ids = llama(), [prompts(n) for n in (150, 1, 70, 132)]
    batch, mask = padded(ids, side)
    found = generate(model, batch, max_new_tokens=20, attention_mask=mask)
    for row, alone in zip(found, ids, strict=True):
        assert torch.equal(row, generate(model, alone[None], max_new_tokens=20)[0])


def test_sequences_end_one_by_one() -> None:
    model, ids = llama(), prompts(3, 40)
    free = generate(model, ids, "fp16", max_new_tokens=40)
    ends = [int(free[0, 5]), int(free[1, 20]), int(free[2, 11])]
    expected = expect(model, ids, "fp16", 40, eos_token_id=ends, pad_token_id=0)
    assert torch.equal(generate(model, ids, "fp16", max_new_tokens=40, eos_token_id=ends), expected)
    only = expect(model, ids[:1], "fp16", 40, eos_token_id=ends[0], pad_token_id=0)
    assert only.shape[1] < 40
    assert torch.equal(generate(model, ids[:1], "fp16", max_new_tokens=40, eos_token_id=ends[0]), only)


def test_the_cache_has_its_sequences_back() -> None:
    model, ids = llama(), prompts(2, 130)
    codec, settings = measure(model, "balanced")
    pages = PagesKV.reserve(codec, [130 + 66] * 2, impl="reference", **settings)
    with attention_of(model):
        decoder = Decoder(model, pages, max_new_tokens=66)
        decoder.prefill(list(ids))
        tokens = decoder.run()
    pages.cache.check()
    assert [pages.cache.num_tokens(s) for s in pages.seq_ids] == [195, 195]
    with attach(model, "balanced", impl="reference") as attached:
        model(ids, use_cache=True)
        for t in range(65):
            model(tokens[:, t : t + 1], **kv(attached.last_cache))
    other = attached.last_cache
    for layer in range(2):
        for a, b in zip(pages.seq_ids, other.seq_ids, strict=True):
            found, expected = pages.cache.export_layer(layer, a), other.paged.export_layer(layer, b)
            assert found.num_tokens == expected.num_tokens
            assert torch.equal(found.pages, expected.pages)
            assert torch.equal(found.exact_k, expected.exact_k)


# -- choosing tokens -----------------------------------------------------------------------------------------------


def test_sampling_draws_with_the_models_probabilities() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -torch.inf]]).expand(20_000, 4)
    p = torch.softmax(logits[0], -1)
    for top_p, expected in ((1.0, p), (0.6, torch.tensor([0.0, 0.0, 1.0, 0.0])), (0.8, p * torch.tensor([0, 1, 1, 0]))):
        chosen = choose(logits, Sampling(1.0, top_p), torch.Generator().manual_seed(1))
        found = chosen.bincount(minlength=4) / len(chosen)
        assert torch.allclose(found, expected / expected.sum(), atol=0.015)


def test_sampling_is_reproducible() -> None:
    model, ids = llama(), prompts(2, 30)
    runs = [generate(model, ids, max_new_tokens=12, sampling=Sampling(2.0, 0.9, seed)) for seed in (1, 1, 2)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


# -- other caches, errors ------------------------------------------------------------------------------------------


class PlainKV(StepKV):
    """Keys and values side by side, nothing else."""

    is_capturable = False
    device = torch.device("cpu")

    def __init__(self, lengths: list[int], layers: int, heads: int, dim: int) -> None:
        self.num_sequences, self.lengths = len(lengths), torch.zeros(len(lengths), dtype=torch.long)
        self.k, self.v = (torch.zeros(layers, len(lengths), heads, max(lengths), dim) for _ in "kv")

    def prefill(self, layer: int, row: int, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> Tensor:
        self.lengths[row] = k.shape[2]
        self.k[layer, row, :, : k.shape[2]], self.v[layer, row, :, : k.shape[2]] = k[0], v[0]
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=softmax_scale, enable_gqa=True
        )

    def start(self) -> None: ...

    def check(self) -> None: ...

    def finish(self) -> None: ...

    def advance(self) -> None:
        self.lengths += 1

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> Tensor:
        rows = torch.arange(self.num_sequences)
        self.k[layer, rows, :, self.lengths - 1], self.v[layer, rows, :, self.lengths - 1] = k[:, :, 0], v[:, :, 0]
        mask = torch.arange(self.k.shape[3]) < self.lengths[:, None, None, None]
        return torch.nn.functional.scaled_dot_product_attention(
            q, self.k[layer], self.v[layer], mask, scale=softmax_scale, enable_gqa=True
        )

    def num_bytes(self) -> int:
        return self.k.nbytes + self.v.nbytes


def test_any_cache_can_take_part() -> None:
    model, ids = llama(), [prompts(9), prompts(31)]
    with attention_of(model):
        decoder = Decoder(model, PlainKV([60, 60], 2, 2, 64), max_new_tokens=20)
        decoder.prefill(ids)
        found = decoder.run()
    for row, alone in zip(found, ids, strict=True):
        expected = model.generate(
            alone[None], attention_mask=torch.ones_like(alone[None]), max_new_tokens=20, do_sample=False
        )
        assert torch.equal(row, expected[0, len(alone) :])


def test_what_cannot_be_stored_is_an_error() -> None:
    model, ids = llama(), prompts(2, 20)
    torch.nn.init.constant_(model.model.layers[1].self_attn.v_proj.weight, 1e5)
    with pytest.raises(FormatError):
        generate(model, ids, max_new_tokens=4)
    assert model.config._attn_implementation != "homkv"
    model = llama()
    model.lm_head.weight.data[3] = torch.inf
    with pytest.raises(FormatError, match="logits"):
        generate(model, ids, max_new_tokens=4)


def test_values_that_break_a_step_are_noticed() -> None:
    model, ids = llama(), prompts(1, 20)
    codec, settings = measure(model, "balanced")
    pages = PagesKV.reserve(codec, [60], impl="reference", **settings)
    with attention_of(model):
        decoder = Decoder(model, pages, max_new_tokens=40)
        decoder.prefill(list(ids))
        pages.cache.status.fill_(1)  # as a kernel does
        with pytest.raises(FormatError, match="free the sequences"):
            decoder.run()
    with pytest.raises(FormatError, match="free these"):
        pages.cache.export_layer(0, pages.seq_ids[0])
    pages.cache.free(pages.seq_ids[0])


def test_wrong_use_is_refused() -> None:
    model, ids = llama(), prompts(2, 20)
    with pytest.raises(CapacityError, match="max_new_tokens"):
        generate(model, ids, max_new_tokens=0)
    with pytest.raises(ShapeError, match="at least one token"):
        generate(model, ids, max_new_tokens=4, attention_mask=torch.tensor([[1] * 20, [0] * 20]))
    with pytest.raises(ShapeError, match="mask alike"):
        split_prompts(ids, torch.ones(2, 19))
    with pytest.raises(UnsupportedError, match="attach"):
        generate(model, ids, "hack:rqe=0", max_new_tokens=4)
    with pytest.raises(UnsupportedError, match="CUDA graph"):
        generate(model, ids, max_new_tokens=4, impl="reference", capture=True)
    codec, settings = measure(model, "balanced")
    pages = PagesKV.reserve(codec, [25, 25], impl="reference", **settings)
    with attention_of(model):
        decoder = Decoder(model, pages, max_new_tokens=1)
        decoder.prefill(list(ids))
        with pytest.raises(CapacityError, match="one more"):
            decoder.step()


# -- kernels -------------------------------------------------------------------------------------------------------


def narrow_llama(**changes: object) -> LlamaForCausalLM:
    heads = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    return LlamaForCausalLM(LlamaConfig(**SIZES | SPECIAL | heads | changes)).eval()


@needs_triton
def test_kernels_give_the_reference() -> None:
    model, ids = narrow_llama().to(DEVICE), [prompts(195), prompts(7)]
    batch, mask = padded(ids, "left")
    logits = {}
    for impl in ("triton", "reference"):
        codec, settings = measure(model, "balanced")
        pages = PagesKV.reserve(codec, [200, 12], impl=impl, **settings)
        with attention_of(model):
            decoder = Decoder(model, pages, max_new_tokens=5)
            decoder.prefill(split_prompts(batch.to(DEVICE), mask.to(DEVICE)))
            rows = [decoder.logits]
            for token in (5, 6):  # the second seals a page
                decoder.tokens.fill_(token)
                decoder.step()
                rows.append(decoder.logits)
        pages.finish()
        pages.cache.check()
        logits[impl] = torch.stack(rows)
    assert_relative(logits["triton"], logits["reference"], 0.02)


@needs_cuda
@pytest.mark.parametrize("name", ["small", "balanced", "near-lossless"])
def test_cuda_graphs_give_the_tokens_of_plain_steps(name: str) -> None:
    model = narrow_llama().cuda().bfloat16()
    batch, mask = padded([prompts(n) for n in (150, 20, 131)], "left")
    both = [
        generate(model, batch.cuda(), name, max_new_tokens=150, attention_mask=mask.cuda(), capture=capture)
        for capture in (True, False)
    ]
    assert torch.equal(*both)


@needs_cuda
@pytest.mark.parametrize("name", ["balanced", "hack-2026", "fp16"])
def test_cuda_models_can_be_attached(name: str) -> None:
    model, ids = narrow_llama().cuda(), prompts(2, 190).cuda()
    logits = []
    for impl in (None, "reference"):
        with attach(model, name, impl=impl, max_tokens=400) as attached, torch.no_grad():
            parts = ids.split([140, 30, 1, 19], 1)
            out = [model(part, **kv(attached.last_cache), use_cache=True).logits for part in parts]
        attached.last_cache.paged.check()
        logits.append(torch.cat(out, 1))
    assert_relative(logits[0], logits[1], 0.02)


@needs_cuda
def test_cuda_sampling_in_a_graph_is_reproducible() -> None:
    model, ids = narrow_llama().cuda().bfloat16(), prompts(2, 30).cuda()
    runs = [generate(model, ids, max_new_tokens=30, sampling=Sampling(2.0, 0.9, seed)) for seed in (1, 1, 2)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
