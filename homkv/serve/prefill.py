"""The prefill instance: computes prompts exactly and sends each layer's pages while the next layer computes."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from homkv.errors import HomkvError, ShapeError, TransferError
from homkv.formats import PageCodec, make_codec
from homkv.models import LoadedModel
from homkv.seal import LayerContent, pack_layer
from homkv.serve.engine import EXACT_DTYPE, expectation, sample
from homkv.serve.messages import Cancel, Failed, Finish, Prefill, PrefillDone, PrefillTimes, Progress, ToPrefill
from homkv.transport.assemble import SequencePlan
from homkv.transport.endpoint import LinkOptions
from homkv.transport.keys import Security
from homkv.transport.link import Event, Listener, Message, PeerLost
from homkv.transport.sender import FrameSender
from homkv.transport.shaper import LinkShaper

log = logging.getLogger(__name__)
FINISH_TIMEOUT_S = 600.0  # for the last byte on a slow link; a stuck peer is noticed by the link's own limits


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
    """Packs layers in the background and hands them to the sender, in order."""

    codec: PageCodec
    sender: FrameSender
    _worker: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="pack"))
    _jobs: "list[Future[LayerContent]]" = field(default_factory=list)
    busy_s: float = 0.0
    packed_s: float = 0.0

    def put(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Pack and send one layer ``k v [G, T, D]``; returns at once."""
        self._jobs.append(self._worker.submit(self._pack, layer, k, v))

    def _pack(self, layer: int, k: Tensor, v: Tensor) -> LayerContent:
        start_s = time.monotonic()
        content = pack_layer(self.codec, k, v, EXACT_DTYPE)
        content = LayerContent(
            content.num_tokens, content.pages, content.exact_k.contiguous(), content.exact_v.contiguous()
        )
        self.packed_s = time.monotonic()
        self.busy_s += self.packed_s - start_s
        exact = [x.view(torch.uint8).numpy().data for x in (content.exact_k, content.exact_v)]
        self.sender.send(layer, exact, content.pages.numpy().data)
        return content  # kept by the future: the sender's buffers must live until it is done

    def join(self) -> None:
        """Wait until every layer is packed and queued. Raises what packing or sending raised."""
        for job in self._jobs:
            job.result()

    def close(self) -> None:
        """Drop layers that have not begun; waits for the one that has."""
        self._worker.shutdown(cancel_futures=True)


class PrefillInstance:
    """Computes one prompt at a time and sends its KV to the decode instance that the request names."""

    def __init__(
        self,
        loaded: LoadedModel,
        endpoint: str,
        security: Security,
        *,
        link_gbps: float | None = None,
        options: LinkOptions = LinkOptions(),  # noqa: B008
    ) -> None:
        self.loaded, self._security, self._options = loaded, security, options
        self.listener = Listener(endpoint, ToPrefill, security, options)
        self._shaper = LinkShaper(link_gbps)
        self._waiting: deque[tuple[bytes, Prefill, float]] = deque()
        self._gone: set[tuple[bytes, str | None]] = set()  # (client, request) to drop; None drops all of a client
        self._codecs: dict[str, PageCodec] = {}

    def close(self) -> None:
        """Close the listener."""
        self.listener.close()

    def run(self, stop: threading.Event) -> None:
        """Serve until ``stop`` is set."""
        while not stop.is_set():
            self.turn()

    def turn(self, idle_s: float = 0.2) -> None:
        """Handle what arrived and compute one waiting prompt."""
        self._listen(0.0 if self._waiting else idle_s)
        if self._waiting:
            client, ask, received_s = self._waiting.popleft()
            try:
                self.listener.send(client, self._prefill(client, ask, received_s))
            except HomkvError as error:
                log.warning("failed %r: %s", ask.request_id, error)
                self.listener.send(client, Failed.of(ask.request_id, error))

    def _listen(self, timeout_s: float) -> None:
        for event in self.listener.poll(timeout_s):
            self._handle(event)

    def _handle(self, event: Event) -> None:
        if isinstance(event, PeerLost):
            self._gone.add((event.peer, None))
        elif isinstance(event, Message) and isinstance(event.body, Prefill):
            self._waiting.append((event.peer, event.body, time.monotonic()))
        elif isinstance(event, Message) and isinstance(event.body, Cancel):
            self._gone.add((event.peer, event.body.request_id))

    def _check_wanted(self, client: bytes, ask: Prefill) -> None:
        """Raise TransferError if the client cancelled or left, so that no more is computed for it."""
        if (client, ask.request_id) in self._gone or (client, None) in self._gone:
            self._gone.discard((client, ask.request_id))
            raise TransferError(f"expected {ask.request_id!r} to be wanted, found it cancelled by its client")

    def _check_prompt(self, ask: Prefill) -> None:
        vocabulary = self.loaded.model.get_input_embeddings().weight.shape[0]
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
            self._codecs[name] = make_codec(name, self.loaded.head_dim, self.loaded.rope.channel_order())
        return self._codecs[name]

    def _prefill(self, client: bytes, ask: Prefill, received_s: float) -> PrefillDone:
        """Compute, pack, send, and wait until the decode instance has verified everything."""
        start_s = time.monotonic()
        self._check_wanted(client, ask)
        self._check_prompt(ask)
        codec, num_tokens = self._codec(ask.kv_cache_dtype), len(ask.prompt_ids)
        plan = SequencePlan(
            expect=expectation(self.loaded, codec),
            sequence=ask.request_id,
            epoch=ask.epoch,
            num_tokens=num_tokens,
            num_pages=codec.num_pages(num_tokens),
            num_exact=codec.num_exact(num_tokens),
        )
        with FrameSender(
            ask.decode_endpoint, plan, self._security, ask.decode_key, shaper=self._shaper, options=self._options
        ) as sender:
            pipe = LayerPipe(codec, sender)
            try:
                first_token = self._compute(client, ask, pipe)
                computed_s = time.monotonic()
                pipe.join()
            finally:
                pipe.close()
            sender.post(Finish(ask.request_id, ask.epoch, first_token))
            frames = sender.finish(FINISH_TIMEOUT_S)
        wire_bytes = sum(f.num_bytes for f in frames)
        times = PrefillTimes(
            received_s=received_s,
            start_s=start_s,
            computed_s=computed_s,
            packed_s=pipe.packed_s,
            sent_s=max(f.sent_s for f in frames),
            pack_busy_s=pipe.busy_s,
            send_busy_s=self._link_busy_s(wire_bytes),
            verify_busy_s=sum(f.verify_s for f in frames),
        )
        return PrefillDone(ask.request_id, self._raw_bytes(num_tokens), wire_bytes, times)

    @torch.no_grad()
    def _compute(self, client: bytes, ask: Prefill, pipe: LayerPipe) -> int:
        """Run the model over the prompt, feeding the pipe layer by layer; returns the first new token."""

        def on_layer(layer: int, k: Tensor, v: Tensor) -> None:
            pipe.put(layer, k[0], v[0])
            self.listener.send(client, Progress(ask.request_id, layer + 1))
            self._listen(0.0)
            self._check_wanted(client, ask)

        cache = StreamingCache(self.loaded.model.config, on_layer)
        ids = torch.tensor([ask.prompt_ids])
        logits = self.loaded.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1]
        generator = torch.Generator().manual_seed(ask.sampling.seed)
        return sample(logits.float(), ask.sampling, generator)

    def _raw_bytes(self, num_tokens: int) -> int:
        """The same KV in 16 bits."""
        return 4 * self.loaded.num_layers * self.loaded.num_kv_heads * self.loaded.head_dim * num_tokens

    def _link_busy_s(self, num_bytes: int) -> float:
        """Time that the emulated link needs for this many bytes; 0 if unshaped."""
        return 0.0 if self._shaper.gbps is None else num_bytes * 8 / (self._shaper.gbps * 1e9)
