"""Tiny models, instances in threads, and a request that must not notice what happens beside it."""

import copy
import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, Self, cast

import msgspec
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from homkv.models import LoadedModel, describe_model
from homkv.seal import pack_layer
from homkv.serve.client import Address, Answer, Client, Query
from homkv.serve.convert import EXACT_DTYPE
from homkv.serve.decode import DecodeInstance
from homkv.serve.dispatch import Dispatcher
from homkv.serve.engine import expectation, serving_codec
from homkv.serve.links import SERVING
from homkv.serve.messages import Evidence, FromDecode, FromPrefill, Prefill, Progress, Reserve, Ticket, Token
from homkv.serve.prefill import PrefillInstance
from homkv.serve.query import Ended
from homkv.transport.assemble import SequencePlan
from homkv.transport.endpoint import Receipt
from homkv.transport.keys import Security
from homkv.transport.link import Peer
from homkv.transport.sender import FrameSender

VOCABULARY, CONTEXT, NUM_LAYERS = 200, 2048, 2
NAN_TOKEN = 199  # its embedding is NaN: whatever attends to it overflows
OPEN = Security(insecure=True)
OPTIONS = replace(SERVING, peer_timeout_s=10.0, ack_timeout_s=20.0, linger_s=0.2)
PROMPT_S = 7.0  # "promptly": far below every timeout of the link, with room for a busy machine
PATIENCE_S = 60.0  # how long a test waits for what must happen; never so long when it does
ENDPOINT = "tcp://127.0.0.1:0"
FORMATS = ["fp16", "balanced"]


def tiny(seed: int = 0, head_dim: int = 64, stop: int | list[int] | None = None) -> LoadedModel:
    """Random Llama whose most likely token leads by far more than rounding (large weights)."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=2 * head_dim,
        intermediate_size=128,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=head_dim,
        max_position_embeddings=CONTEXT,
        initializer_range=0.3,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=stop,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.get_input_embeddings().weight[NAN_TOKEN] = float("nan")
        model.lm_head.weight[NAN_TOKEN] = 0
        model.lm_head.bias = torch.nn.Parameter(torch.zeros(VOCABULARY))
        model.lm_head.bias[NAN_TOKEN] = -1e4  # never drawn, at any temperature: a prompt may hold it, no answer does
    return describe_model(model, cast(Any, SimpleNamespace(model_max_length=CONTEXT)), f"tiny-{seed}")


def twin(loaded: LoadedModel) -> LoadedModel:
    """The same model again: a decode instance changes the attention of the one it holds."""
    return LoadedModel(**{**vars(loaded), "model": copy.deepcopy(loaded.model)})


def prompt(num_tokens: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(1000 + seed)
    return cast(list[int], torch.randint(0, NAN_TOKEN, (num_tokens,), generator=generator).tolist())


def wait_until(condition: Callable[[], bool], timeout_s: float = PATIENCE_S) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"{condition} did not become true"
        time.sleep(0.01)


class Asked:
    """A request to a dispatcher and every token that its owner was told, which must come in order."""

    def __init__(
        self, dispatcher: Dispatcher, query: Query, request_id: str | None = None, patience_s: float = PATIENCE_S
    ) -> None:
        self.patience_s = patience_s  # for each event
        self.events: queue.SimpleQueue[Progress | Token | Ended] = queue.SimpleQueue()
        self.told: list[Token] = []
        self.request_id = dispatcher.submit(query, self.events.put, request_id)

    @property
    def tokens(self) -> list[int]:
        return [token.choice.token for token in self.told]

    @property
    def answer(self) -> tuple[list[int], Evidence | None]:
        """Tokens, and what they were computed from."""
        return self.tokens, self.told[0].evidence if self.told else None

    def next(self) -> Progress | Token | Ended:
        event = self.events.get(timeout=self.patience_s)
        if isinstance(event, Token):
            assert event.index == len(self.told)
            self.told.append(event)
        return event

    def until(self, kind: type) -> None:
        while not isinstance(event := self.next(), kind):
            assert not isinstance(event, Ended), event.error

    def until_tokens(self, num_tokens: int) -> None:
        while len(self.told) < num_tokens:
            event = self.next()
            assert isinstance(event, Token), event

    def end(self) -> Ended:
        while not isinstance(event := self.next(), Ended):
            pass
        assert self.events.empty()  # nothing behind the end
        return event


class Running:
    """An instance with its loop in a thread. An exception in the loop fails the test at the end."""

    def __init__(self, instance: DecodeInstance | PrefillInstance) -> None:
        self.instance, self._stop = instance, threading.Event()
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run)
        self._closed = False

    def _run(self) -> None:
        try:
            self.instance.run(self._stop)
        except BaseException as error:  # kept for the test's thread
            self.error = error

    @property
    def address(self) -> Address:
        return Address(self.instance.listener.endpoint, None)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._stop.set()
            self._thread.join()
            self.instance.close()
            if self.error is not None:
                raise self.error

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass
class Pair:
    """A prefill and a decode instance, and what they should look like when nothing is running."""

    prefill: Running
    decode: Running
    num_free: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.num_free = self._free_blocks()

    @property
    def decoder(self) -> DecodeInstance:
        return cast(DecodeInstance, self.decode.instance)

    @property
    def prefiller(self) -> PrefillInstance:
        return cast(PrefillInstance, self.prefill.instance)

    def client(self) -> Client:
        return Client(self.prefill.address, self.decode.address, OPEN, OPTIONS)

    def ask(self, query: Query) -> Answer:
        with self.client() as client:
            return client.generate(query, timeout_s=60.0)

    def peer(self, role: str = "decode") -> Peer:
        """A bare connection, to say what no client would."""
        running, messages = (self.decode, FromDecode) if role == "decode" else (self.prefill, FromPrefill)
        return Peer(running.address.endpoint, messages, OPEN, None, OPTIONS)

    def _free_blocks(self) -> dict[str, int]:
        return {name: engine.num_free_blocks for name, engine in self.decoder.engines.items()}

    def assert_free(self) -> None:
        """Nothing is held on either side, and nothing runs in the background."""
        wait_until(lambda: self.decoder.num_requests == 0 and self.prefiller.num_requests == 0)
        assert self._free_blocks() == self.num_free
        for engine in self.decoder.engines.values():
            engine.check()
        wait_until(lambda: not any(t.name.startswith(("send-", "pack")) for t in threading.enumerate()))


def start_pair(
    loaded: LoadedModel,
    *,
    decode_model: LoadedModel | None = None,
    formats: list[str] | None = None,
    link_gbps: float | None = None,
    max_tokens: int = 4096,
    max_sequences: int = 16,
    lease_s: float = 60.0,
    max_lease_s: float = 600.0,
    share_prefixes: bool = True,
    prefix_bytes: int = 1 << 30,
    source: str = "fp16",
    chunk_tokens: int = 512,
) -> AbstractContextManager[Pair]:
    decode = DecodeInstance(
        decode_model or twin(loaded),
        formats or FORMATS,
        ENDPOINT,
        OPEN,
        max_tokens=max_tokens,
        max_sequences=max_sequences,
        share_prefixes=share_prefixes,
        lease_s=lease_s,
        max_lease_s=max_lease_s,
        options=OPTIONS,
    )
    prefill = PrefillInstance(
        loaded,
        ENDPOINT,
        OPEN,
        source=source,
        chunk_tokens=chunk_tokens,
        prefix_bytes=prefix_bytes * share_prefixes,
        link_gbps=link_gbps,
        options=OPTIONS,
    )
    return _run_pair(Running(prefill), Running(decode))


@contextmanager
def _run_pair(prefill: Running, decode: Running) -> Iterator[Pair]:
    with decode, prefill:
        yield Pair(prefill, decode)


BYSTANDER = Query(prompt(150, seed=9), "balanced", 40)


@contextmanager
def bystander(pair: Pair, expected: list[int]) -> Iterator[None]:
    """Run a request again and again beside the block; its tokens must be ``expected`` every time."""
    answers: list[list[int]] = []
    errors: list[BaseException] = []
    begun, over = threading.Event(), threading.Event()

    def run() -> None:
        try:
            with pair.client() as client:
                while not over.is_set():
                    answer = client.generate(BYSTANDER, on_token=lambda _: begun.set(), timeout_s=60.0)
                    answers.append(answer.tokens)
        except BaseException as error:  # kept for the test's thread
            errors.append(error)
        finally:
            begun.set()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert begun.wait(PATIENCE_S)
        yield
    finally:
        over.set()
        thread.join()
    assert not errors, errors
    assert answers
    assert all(tokens == expected for tokens in answers)


_seeds = itertools.count(5000)  # a prompt of its own for each: the KV that a test sends must never be shared


class RawRequest:
    """A request whose KV the test sends itself, layer by layer."""

    def __init__(
        self,
        pair: Pair,
        num_tokens: int = 150,
        request_id: str = "raw",
        kv_cache_dtype: str = "balanced",
        ids: list[int] | None = None,
    ):
        self.pair, self.request_id = pair, request_id
        loaded = pair.prefiller.loaded
        self.codec = serving_codec(kv_cache_dtype, loaded.head_dim, loaded.rope)
        self.peer = pair.peer()
        self.peer.send(Reserve(request_id, kv_cache_dtype, ids or prompt(num_tokens, seed=next(_seeds)), 4))
        ticket = self.peer.recv(PATIENCE_S)
        assert isinstance(ticket, Ticket)
        self.ticket = ticket
        self.plan = SequencePlan(
            expect=expectation(loaded, self.codec),
            sequence=request_id,
            epoch=ticket.epoch,
            num_tokens=num_tokens,
            num_pages=self.codec.num_pages(num_tokens),
            num_exact=self.codec.num_exact(num_tokens),
        )

    def order(self, prompt_ids: list[int]) -> Prefill:
        return Prefill(
            self.request_id,
            "balanced",
            prompt_ids,
            self.ticket.epoch,
            self.pair.decode.address.endpoint,
            None,
            first_page=self.ticket.first_page,
            report_progress=True,
        )

    def sender(self, **changes: Any) -> FrameSender:
        plan = SequencePlan(**{**vars(self.plan), **changes})
        return FrameSender(self.pair.decode.address.endpoint, plan, OPEN, options=OPTIONS)

    def send(self, sender: FrameSender, layer: int) -> None:
        k, v = torch.randn(2, 1, self.plan.num_tokens, self.codec.head_dim)
        content = pack_layer(self.codec, k, v, EXACT_DTYPE)
        exact = [x.contiguous().view(torch.uint8).numpy().tobytes() for x in (content.exact_k, content.exact_v)]
        sender.send(layer, exact, content.pages.numpy().tobytes())

    def answer(self, timeout_s: float = PATIENCE_S) -> msgspec.Struct:
        """What the decode instance says next."""
        message = self.peer.recv(timeout_s)
        assert not isinstance(message, Receipt)
        return message

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.peer.close()
