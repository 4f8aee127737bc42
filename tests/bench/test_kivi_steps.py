"""KIVI as `homkv bench pd` has it: the same bytes whoever makes them, and attention on codes and window."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from homkv.bench.generate import MODELS, codec_of
from homkv.bench.pd.forms import KiviForm, check_kernels, make_form
from homkv.bench.pd.kivi import RING, KiviSlots, restored_step, store_on_cpu
from homkv.bench.peers import kivi, kivi_store
from homkv.bench.peers.kivi_codes import KiviCache, KiviWindow, dequantize, quantize
from homkv.errors import FormatError, HomkvError, ShapeError, UnsupportedError

CPU, TINY, LLAMA = torch.device("cpu"), MODELS["tiny"], MODELS["llama-3.1-8b"]
HEADS = 2
LENGTHS = (200, 159, 0, 5)  # one is about to complete a group, one has no codes, one is no sequence


def equal(one: KiviCache, other: KiviCache) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.tensors, other.tensors, strict=True))


def to(device: torch.device, cache: KiviCache) -> KiviCache:
    return KiviCache(*(x.to(device) for x in cache.tensors))


def unused(dim: int, tokens: int = 64, batch: int = 1) -> KiviCache:
    zeros = torch.zeros(batch, HEADS, tokens, dim)
    return KiviCache(*(torch.zeros_like(x) for x in quantize(zeros, zeros).tensors))


@pytest.mark.parametrize("dim", [128, 64, 96])
def test_the_kernel_codes_as_torch_does(device: torch.device, dim: int) -> None:
    """From keys and values as a model has them: heads between tokens."""
    k, v = (torch.randn(64, HEADS, dim).bfloat16().transpose(0, 1) for _ in "kv")
    made, status = to(device, unused(dim)), torch.zeros(1, dtype=torch.int32, device=device)
    kivi_store.code_prompt(k.to(device), v.to(device), made, status)
    assert not int(status)
    expected = quantize(k[None], v[None])
    if device.type == "cpu":
        assert equal(made, expected)
    for found, right in zip(dequantize(to(CPU, made)), dequantize(expected), strict=True):
        assert (found - right).abs().max() < 3  # a code on the edge may fall on either side: one step
        assert (found - right).abs().mean() < 1e-3


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -1e6])
def test_what_codes_cannot_hold_is_refused(device: torch.device, bad: float) -> None:
    k, v = torch.randn(2, HEADS, 32, 64).bfloat16()
    v[1, 7, 9] = bad
    status = torch.zeros(1, dtype=torch.int32, device=device)
    kivi_store.code_prompt(k.to(device), v.to(device), to(device, unused(64, 32)), status)
    assert int(status)
    form = make_form(TINY, "kivi")
    payload = torch.empty(form.payload_bytes(192), dtype=torch.uint8)
    many = torch.cat((v, torch.zeros(HEADS, 160, 64).bfloat16()), 1)
    with pytest.raises(FormatError):
        form.pack(torch.zeros_like(many), many, payload, torch.zeros(1, dtype=torch.int32))


class Steps:
    """Two stores of the same sequences: one for the kernels, one for torch."""

    def __init__(self, device: torch.device, dim: int) -> None:
        self.device, self.dim = device, dim
        k, v = torch.randn(2, len(LENGTHS), HEADS, 96, dim).bfloat16()
        ring_k, ring_v = torch.randn(2, len(LENGTHS), HEADS, RING, dim).bfloat16()
        self.lengths = torch.tensor(LENGTHS, dtype=torch.int32)
        self.cache, self.window = quantize(k, v), KiviWindow(ring_k, ring_v, self.lengths)
        self.far_cache = KiviCache(*(x.clone().to(device) for x in self.cache.tensors))
        far = (x.clone().to(device) for x in (ring_k, ring_v, self.lengths))
        self.far_window = KiviWindow(*far)
        self.status = torch.zeros(1, dtype=torch.int32, device=device)

    def step(self, group: int) -> tuple[Tensor, Tensor]:
        """The kernels' output and torch's after one token more."""
        for lengths in (self.lengths, self.far_window.lengths):
            lengths += lengths > 0
        coded = (self.lengths - RING + 32).clamp(min=0) // 32 * 32
        new = torch.randn(2, len(LENGTHS), 3 * HEADS, self.dim).bfloat16()[:, :, ::3]
        q = torch.randn(len(LENGTHS), group * HEADS, 1, self.dim).half()
        store_on_cpu(*new, self.cache, self.window)
        kivi_store.append(*new.to(self.device), self.far_cache, self.far_window, self.status)
        far = (q.to(self.device), self.far_cache, coded.to(self.device))
        found = kivi.attend(*far, self.dim**-0.5, window=self.far_window).cpu()
        return found, restored_step(q.float(), self.cache, self.window, coded, self.dim**-0.5)


@pytest.mark.parametrize(("dim", "group"), [(128, 4), (64, 2), (96, 7)])
def test_steps_store_and_attend_as_torch_does(device: torch.device, dim: int, group: int) -> None:
    """The second sequence completes its first group in the first step."""
    steps = Steps(device, dim)
    for _ in range(3):
        found, expected = steps.step(group)
        live = steps.lengths > 0
        assert (found[live].float() - expected[live]).norm() < 2e-3 * expected[live].norm()
        assert not found[~live].any()
    assert not int(steps.status)
    if device.type == "cpu":
        assert equal(steps.far_cache, steps.cache)
    live = steps.lengths > 0
    assert torch.equal(steps.far_window.k.cpu()[live], steps.window.k[live])


def test_a_prompt_and_steps_give_the_bytes_of_the_longer_prompt() -> None:
    """Groups that steps complete are those that a prompt would have had; from no codes to three groups."""
    form = make_form(TINY, "kivi")
    assert isinstance(form, KiviForm)
    k, v = torch.randn(2, TINY.num_kv_heads, 240, TINY.head_dim).bfloat16()

    def packed(tokens: int) -> Tensor:
        payload = torch.empty(form.payload_bytes(tokens), dtype=torch.uint8)
        form.pack(k[:, :tokens], v[:, :tokens], payload, torch.zeros(1, dtype=torch.int32))
        return payload

    slots = KiviSlots(form, 2, 240, 0, CPU)
    slot = slots.take(240)
    slots.load(slot, 0, 100, packed(100))
    slots.begin(slot, 100)
    rows, q = slots.rows(2), torch.randn(2, TINY.num_q_heads, 1, TINY.head_dim)
    for t in range(100, 240):
        rows.advance()
        new_k, new_v = (x[None, :, t : t + 1].expand(2, -1, -1, -1) for x in (k, v))
        rows.attend(0, q, new_k, new_v, 0.125)
    cache, exact_k, _ = form.split(packed(240), 240)
    assert form.num_coded(240) == 96
    held = slots.caches[0]
    assert equal(KiviCache(*(x[:1, :, : y.shape[2]] for x, y in zip(held.tensors, cache.tensors, strict=True))), cache)
    newest = torch.arange(96, 240) % RING
    assert torch.equal(slots.ring_k[0][slot][:, newest], exact_k)


@pytest.mark.parametrize("tokens", [1, 128, 159, 160, 4099])
def test_as_many_bytes_as_the_pages_of_kivi(tokens: int) -> None:
    """Of a head of 128 channels, whose quarters are KIVI's groups of 32."""
    codec = codec_of(LLAMA, "kivi")
    form = make_form(LLAMA, "kivi")
    assert form.payload_bytes(tokens) == LLAMA.num_kv_heads * codec.wire_bytes(tokens)
    assert form.kv_bytes(tokens) == LLAMA.num_layers * LLAMA.num_kv_heads * codec.kv_bytes(tokens)


@pytest.mark.parametrize(
    ("name", "error"), [("cachegen", UnsupportedError), ("hack:rqe=0", UnsupportedError), ("kivi:g=33", FormatError)]
)
def test_forms_that_this_bench_has_not(name: str, error: type[HomkvError]) -> None:
    with pytest.raises(error):
        make_form(LLAMA, name)


@pytest.mark.parametrize("name", ["bf16", "fp8", "kivi", "hack", "hack:prefill=int8", "hack-2026", "balanced"])
def test_forms_with_kernels(name: str) -> None:
    check_kernels(make_form(LLAMA, name), name)


@pytest.mark.parametrize("name", ["kvquant", "kivi:bits=4"])
def test_forms_without_kernels_stay_on_cpus(name: str) -> None:
    with pytest.raises(UnsupportedError, match="with kernels for GPUs, found " + name):
        check_kernels(make_form(TINY, name), name)


def test_a_window_must_fit_its_cache(device: torch.device) -> None:
    q = torch.randn(1, HEADS, 1, 64).bfloat16().to(device)
    ring = torch.zeros(1, HEADS, 100, 64).bfloat16().to(device)
    lengths = torch.zeros(1, dtype=torch.int32, device=device)
    with pytest.raises(ShapeError, match="expected a window"):
        kivi.attend(q, to(device, unused(64)), lengths, 1.0, window=KiviWindow(ring, ring, lengths))
