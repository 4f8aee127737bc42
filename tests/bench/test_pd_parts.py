"""The parts of `homkv bench pd` in one process: forms, slots, continuous batching, digests, sockets."""

import queue
import socket
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from homkv.bench.generate import MODELS, codec_of, random_model
from homkv.bench.pd.batch import Batch, bucket_sizes, make_slots
from homkv.bench.pd.digest import TRAILER_BYTES, DeviceDigest, padded
from homkv.bench.pd.forms import EXACT_DTYPE, PagesForm, make_form
from homkv.bench.pd.prefill import PromptCache, Unsent
from homkv.bench.pd.slots import PageSlots
from homkv.bench.pd.sockets import CHUNK, Incoming, LastWord, Layer, Outgoing, accept, connect
from homkv.bench.pd.workload import WORKLOADS, Lengths, poisson
from homkv.errors import CapacityError, ShapeError, TraceError, TransferError
from homkv.generate import Decoder, PagesKV
from homkv.generate.loop import attention_of
from homkv.models.forward import forward_with_cache

TINY, CPU = MODELS["tiny"], torch.device("cpu")
FORMATS = ["bf16", "fp8", "kivi", "balanced", "hack", "hack-2026"]
PAGE_FORMATS = ["balanced", "hack", "hack-2026"]


@pytest.fixture(scope="module")
def model() -> Iterator[LlamaForCausalLM]:
    torch.manual_seed(0)
    made = random_model(TINY, CPU).float()
    with attention_of(made), torch.no_grad():
        yield made


def prompt(seed: int, length: int) -> Tensor:
    return torch.randint(TINY.vocab_size, (length,), generator=torch.Generator().manual_seed(seed))


def prefill(model: LlamaForCausalLM, ids: Tensor, name: str) -> tuple[int, list[Tensor]]:
    """First token and every layer's payload, as a prefill worker makes them."""
    from homkv.attention.prefill import causal

    form, payloads, status = make_form(TINY, name), [], torch.zeros(1, dtype=torch.int32)

    def on_layer(layer: int, k: Tensor, v: Tensor) -> None:
        payload = torch.empty(form.payload_bytes(len(ids)), dtype=torch.uint8)
        form.pack(k, v, payload, status)
        payloads.append(payload)

    cache = PromptCache(TINY.num_layers, causal, on_layer)
    logits = forward_with_cache(model, ids[None], cache, position_ids=torch.arange(len(ids))[None]).logits
    return int(logits[0, -1].argmax()), payloads


def start(model: LlamaForCausalLM, batch: Batch, name: str, ids: Tensor, room: int) -> tuple[int, int]:
    """Load a prompt and let it join; returns its slot and first token."""
    token, payloads = prefill(model, ids, name)
    slot = batch.slots.take(len(ids) + room)
    for layer, payload in enumerate(payloads):
        batch.slots.load(slot, layer, len(ids), payload)
    batch.join(slot, len(ids), token)
    return slot, token


def new_batch(model: LlamaForCausalLM, name: str, count: int = 3, longest: int = 300) -> Batch:
    batch = Batch(model, make_slots(make_form(TINY, name), count, longest, 0, CPU))
    batch.warm_up()
    return batch


@pytest.mark.parametrize("name", PAGE_FORMATS)
@pytest.mark.parametrize("length", [150, 128])  # 128: hack has whole pages only, and an empty window
def test_a_batch_gives_the_tokens_of_the_decode_loop(model: LlamaForCausalLM, name: str, length: int) -> None:
    """Long enough for a page to be sealed on the way, beside a sequence that joins later and one that leaves."""
    ids, steps = prompt(0, length), 90
    kv = PagesKV.reserve(
        codec_of(TINY, name),
        [len(ids) + steps],
        num_layers=TINY.num_layers,
        num_kv_heads=TINY.num_kv_heads,
        exact_dtype=EXACT_DTYPE,
        device="cpu",
    )
    decoder = Decoder(model, kv, max_new_tokens=steps)
    decoder.prefill([ids])
    expected = decoder.run()[0].tolist()

    batch = new_batch(model, name)
    slot, token = start(model, batch, name, ids, steps)
    found, others = [token], []
    for step in range(steps - 1):
        if step in (5, 40):
            others.append(start(model, batch, name, prompt(step, 80), steps)[0])
        if step == 60:
            batch.leave(others.pop(0))
        found.append(batch.step([slot, *others])[0])
    assert found == expected
    batch.slots.check()


@pytest.mark.parametrize("name", FORMATS)
def test_neighbours_and_empty_slots_change_nothing(model: LlamaForCausalLM, name: str) -> None:
    """A prompt that is loaded while others step is the prompt that was sent."""
    ids = prompt(1, 100)

    def alone() -> list[int]:
        batch = new_batch(model, name)
        slot, _ = start(model, batch, name, ids, 10)
        return [batch.step([slot])[0] for _ in range(6)]

    batch = new_batch(model, name)
    first, _ = start(model, batch, name, prompt(2, 90), 50)
    token, payloads = prefill(model, ids, name)
    late = batch.slots.take(len(ids) + 10)
    for layer, payload in enumerate(payloads):
        batch.slots.load(late, layer, len(ids), payload)
        batch.step([first])  # the late one's row is part of the step, and empty
    batch.join(late, len(ids), token)
    assert [batch.step([first, late])[1] for _ in range(6)] == alone()


def test_buckets_hold_every_slot() -> None:
    assert bucket_sizes(6) == [1, 2, 4, 6]
    assert bucket_sizes(1) == [1]
    assert bucket_sizes(8) == [1, 2, 4, 8]


@pytest.mark.parametrize("name", FORMATS)
def test_slots_keep_their_budget(name: str) -> None:
    form = make_form(TINY, name)
    slots = make_slots(form, 4, 300, 2 * form.kv_bytes(300) + 1, CPU)
    taken = [slots.take(300), slots.take(300)]
    assert not slots.has_room(300)
    with pytest.raises(CapacityError, match="expected room for 300 tokens"):
        slots.take(300)
    assert slots.held_bytes == slots.peak_bytes == 2 * form.kv_bytes(300)
    for slot in taken:
        slots.begin(slot, 200)
        slots.end(slot)
    assert slots.held_bytes == 0
    assert slots.take(300) == 0
    if isinstance(slots, PageSlots):
        assert isinstance(form, PagesForm)
        assert slots._blocks.num_free == slots._blocks.num_blocks - form.codec.num_pages(300)


def test_what_a_device_cannot_hold_is_refused() -> None:
    form = make_form(TINY, "bf16")
    slots = make_slots(form, 2, 100, 0, CPU)
    assert slots.fits(2, 100)
    assert not slots.fits(3, 100)
    assert not slots.fits(1, 101)


@pytest.mark.parametrize("size", [1, 7, 4096, 4097, 10_000])
def test_a_changed_byte_changes_the_sum(size: int) -> None:
    digest = DeviceDigest(CPU)
    message = torch.randint(256, (padded(size) + TRAILER_BYTES,), dtype=torch.uint8)
    digest.seal(message, size)
    assert bool(digest.is_intact(message, size))
    for at in {0, size // 2, size - 1}:
        message[at] ^= 1
        assert not bool(digest.is_intact(message, size))
        message[at] ^= 1
    assert bool(digest.is_intact(message, size))


def test_swapped_rows_change_the_sum() -> None:
    payload = torch.randint(256, (3 * 4096,), dtype=torch.uint8)
    swapped = torch.cat((payload[4096:8192], payload[:4096], payload[8192:]))
    digest = DeviceDigest(CPU)
    assert int(digest(payload)) != int(digest(swapped))


class Ends:
    """Both ends of a TCP link in one process."""

    def __init__(self, damage: bool = False) -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        self.errors: queue.SimpleQueue[BaseException] = queue.SimpleQueue()
        self.events: queue.SimpleQueue[tuple] = queue.SimpleQueue()
        lanes = [connect(listener.getsockname()[1], "ab" * 16, 0, i) for i in range(2)]
        far = accept(listener, "ab" * 16, 2)
        self.place = torch.zeros(100_000, dtype=torch.uint8)
        self.incoming = Incoming(
            list(far.values()), 1 << 14, CPU, lambda request, layer: self.place,
            lambda *chunk: self.events.put(chunk), lambda *word: self.events.put(word), self.errors.put,
        )  # fmt: skip
        self.lanes, self.outgoing = lanes, None if damage else Outgoing(lanes, 1 << 14, CPU, self.errors.put)


def test_layers_cross_in_chunks_and_the_last_word_follows() -> None:
    ends, sent = Ends(), threading.Event()
    assert ends.outgoing is not None
    payload = torch.randint(256, (100_000,), dtype=torch.uint8)
    ends.outgoing.send(Layer(7, 3, payload, None, payload.numel(), lambda layer: sent.set()))
    assert sent.wait(10)
    ends.outgoing.finish(LastWord(7, 42))
    events = [ends.events.get(timeout=10) for _ in range(8)]
    assert sum(event[2] for event in events if len(event) == 3) == 100_000
    assert (7, 42) in events
    assert torch.equal(ends.place, payload)
    assert ends.incoming.digests.num_bytes == ends.outgoing.digests.num_bytes == 100_000


@pytest.mark.parametrize(
    ("chunk", "reason"),
    [
        (CHUNK.pack(1, 0, 0, 4, bytes(16)) + b"data", "expected digest"),
        (CHUNK.pack(1, 0, 0, 1 << 40, bytes(16)), "chunks of at most"),
    ],
)
def test_chunks_that_are_not_what_they_say_are_refused(chunk: bytes, reason: str) -> None:
    ends = Ends(damage=True)
    ends.lanes[0].sendall(chunk)
    error = ends.errors.get(timeout=10)
    assert isinstance(error, TransferError)
    assert reason in str(error)
    assert ends.events.empty()


def test_a_stranger_is_not_let_in() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    stranger = connect(listener.getsockname()[1], "00" * 16, 0, 0)
    friend = connect(listener.getsockname()[1], "ab" * 16, 1, 0)
    found = accept(listener, "ab" * 16, 1)
    assert list(found) == [(1, 0)]
    assert stranger.recv(1) == b""
    friend.close()


def test_unsent_bytes_are_bounded() -> None:
    unsent, passed = Unsent(100), threading.Event()
    unsent.add(500)  # nothing waits: one layer may always go
    thread = threading.Thread(target=lambda: (unsent.add(50), passed.set()), daemon=True)
    thread.start()
    assert not passed.wait(0.05)
    unsent.remove(500)
    assert passed.wait(10)


def test_workloads() -> None:
    requests = poisson(WORKLOADS["long"], 50, 2.0, seed=1)
    assert requests == poisson(WORKLOADS["long"], 50, 2.0, seed=1)
    assert [r.prompt_tokens for r in requests] == [r.prompt_tokens for r in poisson(WORKLOADS["long"], 50, 9.0, 1)]
    assert all(12288 <= r.prompt_tokens <= 16384 and 128 <= r.output_tokens <= 512 for r in requests)
    with pytest.raises(ShapeError):
        poisson(WORKLOADS["long"], 0, 1.0, 0)
    with pytest.raises(TraceError):
        poisson(WORKLOADS["long"], 1, 0.0, 0)
    with pytest.raises(ShapeError):
        Lengths((5, 4), (1, 2))
