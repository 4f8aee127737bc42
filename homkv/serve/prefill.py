"""The prefill instance: computes prompts exactly and sends each layer's pages while the next layer computes."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor
from transformers import DynamicCache

from homkv.errors import HomkvError, ShapeError, TransferError
from homkv.formats import PageCodec
from homkv.models import LoadedModel
from homkv.models.forward import last_logits
from homkv.seal import LayerContent, pack_layer
from homkv.serve.engine import EXACT_DTYPE, plan_sequence, sample, serving_codec
from homkv.serve.messages import Cancel, Failed, Finish, Prefill, PrefillDone, PrefillTimes, Progress, ToPrefill
from homkv.transport.endpoint import DEFAULTS, LinkError, LinkOptions
from homkv.transport.keys import Security
from homkv.transport.link import Event, Listener, Message, PeerLost
from homkv.transport.sender import FrameSender, FrameTiming
from homkv.transport.shaper import LinkShaper

log = logging.getLogger(__name__)
FINISH_TIMEOUT_S = 600.0  # for the last byte on a slow link; a stuck peer is noticed by the link's own limits
CHECK_S = 0.1  # between looks at the listener while the link is busy


class StreamingCache(DynamicCache):  # type: ignore[misc]  # transformers is untyped
    """transformers' own cache that also hands each layer's new keys and values on."""

    def __init__(self, config: Any, on_layer: Callable[[int, Tensor, Tensor], None]) -> None:
        super().__init__(config=config)
        self._on_layer = on_layer

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store, hand on, return what attention needs."""
        stored: tuple[Tensor, Tensor] = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        self._on_layer(layer_idx, key_states, value_states)
        return stored


@dataclass
class LayerPipe:
    """Packs layers in the background and hands them to the sender, in order. Owns the sender: closes it first."""

    codec: PageCodec
    num_layers: int
    sender: FrameSender
    _worker: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="pack"))
    _jobs: "list[Future[LayerContent]]" = field(default_factory=list)
    busy_s: float = 0.0
    packed_s: float = 0.0

    def put(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Pack and send one layer ``k v [G, T, D]``; returns at once. Raises what an earlier layer failed with."""
        for job in self._jobs:
            if job.done():
                job.result()
        self._jobs.append(self._worker.submit(self._pack, layer, k, v))

    def _pack(self, layer: int, k: Tensor, v: Tensor) -> LayerContent:
        start_s = time.monotonic()
        content = pack_layer(self.codec.at_layer(layer, self.num_layers), k, v, EXACT_DTYPE)
        content = LayerContent(
            content.num_tokens, content.pages, content.exact_k.contiguous(), content.exact_v.contiguous()
        )
        self.packed_s = time.monotonic()
        self.busy_s += self.packed_s - start_s
        exact = [x.view(torch.uint8).numpy().data for x in (content.exact_k, content.exact_v)]
        self.sender.send(layer, exact, content.pages.numpy().data)
        return content  # kept by the future: the sender's buffers must live until it is done

    def finish(self, last: Finish, check: Callable[[], None]) -> tuple[FrameTiming, ...]:
        """Wait until every layer was packed, sent and used; returns the frames' times.

        ``check`` is called all the while and may raise. Raises what packing or sending raised.
        """
        while wait(self._jobs, CHECK_S, FIRST_EXCEPTION).not_done:
            check()
            for job in self._jobs:
                if job.done():
                    job.result()
        for job in self._jobs:
            job.result()
        self.sender.post(last)
        deadline_s, before = time.monotonic() + FINISH_TIMEOUT_S, None
        while True:
            check()
            try:
                return self.sender.finish(CHECK_S)
            except LinkError as error:
                # That our short wait is over is a new error each time; what the sender failed with is always the same.
                if error.reason != "timeout" or error is before or time.monotonic() > deadline_s:
                    raise
                before = error

    def close(self) -> None:
        """Drop layers that have not left. A layer that waits for room in the sender's queue is dropped as well."""
        try:
            self.sender.close()
        finally:
            self._worker.shutdown(cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True)
class _Job:
    """A prompt and who wants it."""

    client: bytes
    ask: Prefill
    received_s: float


class PrefillInstance:
    """Computes one prompt at a time and sends its KV to the decode instance that the request names."""

    def __init__(
        self,
        loaded: LoadedModel,
        endpoint: str,
        security: Security,
        *,
        link_gbps: float | None = None,
        options: LinkOptions = DEFAULTS,
    ) -> None:
        self.loaded, self._security, self._options = loaded, security, options
        self.listener = Listener(endpoint, ToPrefill, security, options)
        self._shaper = LinkShaper(link_gbps)
        self._waiting: deque[_Job] = deque()
        self._current: _Job | None = None
        self._unwanted = False  # the current job's client cancelled it or left
        self._codecs: dict[str, PageCodec] = {}

    @property
    def num_requests(self) -> int:
        """Prompts that wait or are being computed."""
        return len(self._waiting) + (self._current is not None)

    def close(self) -> None:
        """Fail what waits and close the listener."""
        error = TransferError("expected to compute the prompt, found the prefill instance stopping; ask another one")
        try:
            while self._waiting:
                self._reply(self._waiting.popleft(), error)
            self.listener.poll(0.0)  # sends what is queued
        finally:
            self.listener.close()

    def run(self, stop: threading.Event) -> None:
        """Serve until ``stop`` is set."""
        while not stop.is_set():
            self.turn()

    def turn(self, idle_s: float = 0.2) -> None:
        """Handle what arrived and compute one waiting prompt."""
        self._listen(0.0 if self._waiting else idle_s)
        if not self._waiting:
            return
        self._current, self._unwanted = self._waiting.popleft(), False
        try:
            self.listener.send(self._current.client, self._prefill(self._current))
        except HomkvError as error:
            self._reply(self._current, error)
        finally:
            self._current = None

    def _reply(self, job: _Job, error: HomkvError) -> None:
        log.warning("failed %r: %s", job.ask.request_id, error)
        self.listener.send(job.client, Failed.of(job.ask.request_id, error))

    def _listen(self, timeout_s: float) -> None:
        for event in self.listener.poll(timeout_s):
            self._handle(event)

    def _handle(self, event: Event) -> None:
        if isinstance(event, PeerLost):
            self._drop(event.peer, None)
        elif isinstance(event, Message) and isinstance(event.body, Prefill):
            self._waiting.append(_Job(event.peer, event.body, time.monotonic()))
        elif isinstance(event, Message) and isinstance(event.body, Cancel):
            self._drop(event.peer, event.body.request_id)

    def _drop(self, client: bytes, request_id: str | None) -> None:
        """Forget one request of a client, or all of them: no more is computed for it."""

        def matches(job: _Job) -> bool:
            return job.client == client and request_id in (None, job.ask.request_id)

        for job in [job for job in self._waiting if matches(job)]:
            self._waiting.remove(job)
            self._reply(job, _unwanted(job))
        if self._current is not None and matches(self._current):
            self._unwanted = True

    def _check_wanted(self, job: _Job) -> None:
        """Listen, and raise TransferError if the client of the current job cancelled it or left."""
        self._listen(0.0)
        if self._unwanted:
            raise _unwanted(job)

    def _check_prompt(self, ask: Prefill) -> None:
        vocabulary = self.loaded.vocab_size
        if not 0 < len(ask.prompt_ids) <= self.loaded.context_length:
            raise ShapeError(
                f"expected 1 to {self.loaded.context_length} prompt tokens, found {len(ask.prompt_ids)}; "
                "send a shorter prompt, but not an empty one"
            )
        if max(ask.prompt_ids) >= vocabulary:
            raise ShapeError(
                f"expected token ids below the vocabulary's {vocabulary}, found {max(ask.prompt_ids)}; was the prompt "
                "tokenized for another model?"
            )

    def _codec(self, name: str) -> PageCodec:
        if name not in self._codecs:
            self._codecs[name] = serving_codec(name, self.loaded.head_dim, self.loaded.rope)
        return self._codecs[name]

    def _prefill(self, job: _Job) -> PrefillDone:
        """Compute, pack, send, and wait until the decode instance has verified everything."""
        start_s, ask = time.monotonic(), job.ask
        self._check_prompt(ask)
        codec = self._codec(ask.kv_cache_dtype)
        sender = FrameSender(
            ask.decode_endpoint,
            plan_sequence(self.loaded, codec, ask.request_id, ask.epoch, len(ask.prompt_ids)),
            self._security,
            ask.decode_key,
            shaper=self._shaper,
            options=self._options,
        )
        with LayerPipe(codec, self.loaded.num_layers, sender) as pipe:
            first_token = self._compute(job, pipe)
            computed_s = time.monotonic()
            frames = pipe.finish(Finish(ask.request_id, ask.epoch, first_token), lambda: self._check_wanted(job))
        wire_bytes = sum(f.num_bytes for f in frames)
        times = PrefillTimes(
            received_s=job.received_s,
            start_s=start_s,
            computed_s=computed_s,
            packed_s=pipe.packed_s,
            sent_s=max(f.sent_s for f in frames),
            pack_busy_s=pipe.busy_s,
            send_busy_s=self._shaper.seconds(wire_bytes),
            verify_busy_s=sum(f.verify_s for f in frames),
        )
        return PrefillDone(ask.request_id, self._raw_bytes(len(ask.prompt_ids)), wire_bytes, times)

    @torch.no_grad()
    def _compute(self, job: _Job, pipe: LayerPipe) -> int:
        """Run the model over the prompt, feeding the pipe layer by layer; returns the first new token."""
        ask = job.ask

        def on_layer(layer: int, k: Tensor, v: Tensor) -> None:
            pipe.put(layer, k[0], v[0])
            self.listener.send(job.client, Progress(ask.request_id, layer + 1))
            self._check_wanted(job)

        cache = StreamingCache(self.loaded.model.config, on_layer)
        ids = torch.tensor([ask.prompt_ids])
        logits = last_logits(self.loaded.model, ids, cache, logits_to_keep=1)[0]
        generator = torch.Generator().manual_seed(ask.sampling.seed)
        return sample(logits, ask.sampling, generator)

    def _raw_bytes(self, num_tokens: int) -> int:
        """The same KV in 16 bits."""
        return 4 * self.loaded.num_layers * self.loaded.num_kv_heads * self.loaded.head_dim * num_tokens


def _unwanted(job: _Job) -> TransferError:
    return TransferError(f"expected {job.ask.request_id!r} to be wanted, found it cancelled by its client; ask again")
