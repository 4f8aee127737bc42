"""The end-to-end benchmark's parts that need no GPU: KV of every kind, the loop on them, the table."""

import io
import math
import sys

import pytest
import torch
from rich.console import Console
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from homkv.attention.triton.runtime import is_available
from homkv.bench import generate
from homkv.bench.generate import (
    MODELS,
    GenerateBenchOptions,
    cases,
    codec_of,
    default_dtype,
    empty_kv,
    fill_pages,
    kv_bytes,
    random_model,
    run,
    speed_table,
)
from homkv.bench.static_kv import StaticKV
from homkv.errors import UnsupportedError
from homkv.generate import Decoder, PagesKV
from homkv.generate.fuse import fused_norms, fused_steps
from homkv.generate.loop import attention_of
from homkv.testing.compare import assert_relative

TINY = MODELS["tiny"]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # kernels are interpreted on the CPU
needs_triton = pytest.mark.skipif(not is_available(), reason="needs a CUDA device or TRITON_INTERPRET=1")


def attend(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float, k_scale: Tensor, v_scale: Tensor) -> Tensor:
    if k.dtype == torch.float8_e4m3fn:
        k, v = (x.to(q.dtype) * s[:, None, None] for x, s in ((k, k_scale), (v, v_scale)))
    mask = torch.arange(k.shape[2]) < lengths[:, None, None, None]
    k, v = (x.to(q.dtype).masked_fill(~mask.transpose(-1, -2), 0) for x in (k, v))  # whatever lies behind the end
    return scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True)


def store(
    new_k: Tensor, new_v: Tensor, k: Tensor, v: Tensor, lengths: Tensor, k_scale: Tensor, v_scale: Tensor
) -> None:
    rows, at = torch.arange(len(lengths)), lengths.long() - 1
    for new, buffer, scale in ((new_k, k, k_scale), (new_v, v, v_scale)):
        if buffer.dtype == torch.float8_e4m3fn:
            new = new / scale[:, None]
        buffer[rows, :, at] = new.to(buffer.dtype)


def static(dtype: torch.dtype, batch: int = 2, capacity: int = 60) -> StaticKV:
    heads = {"num_layers": TINY.num_layers, "num_kv_heads": TINY.num_kv_heads, "head_dim": TINY.head_dim}
    return StaticKV(batch, capacity, dtype=dtype, device="cpu", attend=attend, store=store, **heads)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.02), (torch.float8_e4m3fn, 0.2)])
def test_static_kv_gives_the_models_logits(dtype: torch.dtype, tolerance: float) -> None:
    model = random_model(TINY, torch.device("cpu")).float()
    ids = torch.randint(TINY.vocab_size, (2, 40))
    with torch.no_grad():
        expected = model(ids).logits
    with attention_of(model):
        decoder = Decoder(model, static(dtype), max_new_tokens=20)
        decoder.prefill([ids[0, :30], ids[1, :30]])
        assert_relative(decoder.logits, expected[:, 29], 1e-4)
        for t in range(30, 40):
            decoder.tokens.copy_(ids[:, t : t + 1])
            decoder.step()
            assert_relative(decoder.logits, expected[:, t], tolerance)


def test_filled_kv_decodes() -> None:
    model = random_model(TINY, torch.device("cpu"))
    assert model.dtype == torch.bfloat16
    pages = PagesKV.reserve(
        codec_of(TINY, "balanced"),
        [300, 300],
        num_layers=TINY.num_layers,
        num_kv_heads=TINY.num_kv_heads,
        exact_dtype=torch.bfloat16,
        device="cpu",
        impl="reference",
    )
    fill_pages(pages, 250)
    plain = static(torch.bfloat16, capacity=300)
    plain.fill(250)
    assert pages.num_bytes() < plain.num_bytes()
    for kv in (pages, plain):
        with attention_of(model):
            decoder = Decoder(model, kv, max_new_tokens=20)
            decoder.begin(torch.tensor([1, 2]), torch.tensor([250, 250]))
            assert decoder.run().shape == (2, 20)
    assert [pages.cache.num_tokens(s) for s in pages.seq_ids] == [270, 270]
    pages.cache.check()


def test_bytes_are_known_before_they_are_taken() -> None:
    pages = PagesKV.reserve(
        codec_of(TINY, "balanced"),
        [300] * 3,
        num_layers=TINY.num_layers,
        num_kv_heads=TINY.num_kv_heads,
        exact_dtype=torch.bfloat16,
        device="cpu",
        impl="reference",
    )
    assert kv_bytes(TINY, "balanced", 3, 300) == pages.num_bytes()
    assert kv_bytes(TINY, "bf16", 2, 60) == static(torch.bfloat16).num_bytes()
    assert kv_bytes(TINY, "fp8", 2, 60) == static(torch.float8_e4m3fn).num_bytes()


def test_cases_of_few_tokens_come_first() -> None:
    options = GenerateBenchOptions(batches=(8, 1), contexts=(100, 10, 1000))
    assert cases(options) == [(1, 10), (8, 10), (1, 100), (8, 100), (1, 1000), (8, 1000)]


def test_what_does_not_fit_is_a_row_with_its_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "base_row", lambda kind, name, options: {"kind": kind, "format": name})
    for name, found in {"reset_peak_memory_stats": None, "mem_get_info": (10**6, 10**7)}.items():
        monkeypatch.setattr(torch.cuda, name, lambda found=found: found)
    model, options = random_model(TINY, torch.device("cpu")), GenerateBenchOptions(formats=("bf16",))
    (row,) = generate.case_rows(model, TINY, 4, 10_000, options, math.inf)
    assert row["kv_bytes"] == kv_bytes(TINY, "bf16", 4, 10_068) > 10**6
    assert row["skipped"] == f"its KV takes {row['kv_bytes'] / 2**30:.1f} GiB, 0.0 GiB are free"
    assert "step_ms" not in row


def test_fused_norms_are_the_models_norms() -> None:
    with default_dtype(torch.float32):
        model = random_model(TINY, torch.device("cpu")).float()
    for norm in [m for m in model.modules() if type(m).__name__ == "LlamaRMSNorm"]:
        torch.nn.init.normal_(norm.weight)
    ids = torch.randint(TINY.vocab_size, (1, 9))
    with torch.no_grad():
        expected = model(ids).logits
        with fused_norms(model) as count:
            assert count == 2 * TINY.num_layers + 1
            found = model(ids).logits
        assert_relative(found, expected, 1e-5)
        model.model.norm.register_forward_hook(lambda module, args, out: out + 1)  # now another formula
        with fused_norms(model) as count:
            assert count == 2 * TINY.num_layers
    assert "forward" not in vars(model.model.norm)


def test_fused_steps_are_the_models_steps() -> None:
    with default_dtype(torch.float32):
        model = random_model(TINY, DEVICE).float()
    source, ids = sys.modules[type(model).__module__], torch.randint(TINY.vocab_size, (2, 9), device=DEVICE)
    before = source.apply_rotary_pos_emb
    with torch.no_grad():
        expected = model(ids).logits
        with fused_steps(model) as counts:
            assert counts == (2 * TINY.num_layers + 1, 1, TINY.num_layers)
            assert source.apply_rotary_pos_emb is not before
            found = model(ids).logits
    assert_relative(found, expected, 1e-5)
    assert source.apply_rotary_pos_emb is before
    assert not any("forward" in vars(module) for module in model.modules())


def test_other_formulas_are_left_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(TINY, DEVICE)
    source = sys.modules[type(model).__module__]
    monkeypatch.setattr(source, "apply_rotary_pos_emb", lambda q, k, cos, sin: (q * cos[:, None], k * cos[:, None]))
    model.model.layers[0].mlp.act_fn = torch.nn.GELU()
    with fused_steps(model) as counts:
        assert counts == (2 * TINY.num_layers + 1, 0, TINY.num_layers - 1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="kernels of this machine run on the CPU")
def test_a_model_where_no_kernel_runs_keeps_its_steps() -> None:
    model = random_model(TINY, torch.device("cpu"))
    with fused_steps(model) as counts:
        assert counts == (2 * TINY.num_layers + 1, 0, 0)


def test_the_table_shows_what_was_skipped() -> None:
    rows = [
        {"format": "bf16", "batch": 8, "context": 65536, "skipped": "expected memory"},
        {"format": "small", "batch": 8, "context": 65536, "kv_bytes": 2**30, "peak_bytes": 2**31, "step_ms": 8.0}
        | {"tokens_per_s": 1000.0},
    ]
    console = Console(width=120, record=True)
    console.print(speed_table(rows))
    text = console.export_text()
    assert "skipped: expected memory" in text
    assert "1000" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_an_error() -> None:
    with pytest.raises(UnsupportedError, match="CUDA"):
        run(GenerateBenchOptions(), Console())


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_a_kernel_writes_one_token_per_sequence(dtype: torch.dtype) -> None:
    from homkv.bench.peers.store import store_token

    found, expected = (torch.zeros(2, 3, 2, 8, 96).to(dtype) for _ in "ab")
    # Numbers that fp8 holds: the interpreter does not round as the hardware does.
    new_k, new_v = (
        torch.randint(-8, 9, (3, 2, 96)) / 4,
        torch.randint(-8, 9, (3, 1, 2, 96)).transpose(1, 2)[:, :, 0] / 4,
    )
    lengths, scales = torch.tensor([1, 8, 5], dtype=torch.int32), (torch.tensor([0.5, 0.25]), torch.tensor([2.0, 1.0]))
    store(new_k, new_v, *expected, lengths, *scales)
    new_k, new_v, found, lengths = (x.to(DEVICE) for x in (new_k, new_v, found, lengths))
    store_token(new_k, new_v, *found, lengths, *(scale.to(DEVICE) for scale in scales))
    assert expected.float().any()
    assert torch.equal(found.cpu().float(), expected.float())


@needs_triton
@pytest.mark.parametrize(("name", "tolerance"), [("bf16", 0.02), ("fp8", 0.1), ("near-lossless", 0.1)])
def test_loops_on_kernels_give_the_models_logits(name: str, tolerance: float) -> None:
    model = random_model(TINY, DEVICE)
    ids = torch.randint(TINY.vocab_size, (1, 133), device=DEVICE)
    with torch.no_grad():
        expected = model(ids).logits.float()
    with attention_of(model):
        decoder = Decoder(model, empty_kv(TINY, name, [133], model.device), max_new_tokens=8)
        decoder.prefill(list(ids[:, :131]))  # one more token fills the window, the next seals a page
        for t in (131, 132):
            decoder.tokens.copy_(ids[:, t : t + 1])
            decoder.step()
            assert_relative(decoder.logits, expected[:, t], tolerance)


def test_no_turn_is_begun_behind_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """A case without time is a row that says so; ratios are taken inside the turns of the others."""
    times = {"bf16": 8.0, "small": 2.0}
    monkeypatch.setattr(generate, "base_row", lambda kind, name, options: {"kind": kind, "format": name})
    monkeypatch.setattr(generate, "time_steps", lambda model, shape, name, *rest: times[name])
    model, options = random_model(TINY, torch.device("cpu")), GenerateBenchOptions(formats=("bf16", "small"), seconds=1)
    measured = generate.case_rows(model, TINY, 4, 64, options, math.inf)
    assert [row["tokens_per_s"] for row in measured] == [500, 2000]
    assert measured[1]["speedup"] == 4
    late = generate.case_rows(model, TINY, 4, 64, options, -math.inf)
    assert all(row["skipped"] == "no time left of 1 s" for row in late)
    Console(file=io.StringIO()).print(speed_table(late))
