"""The prefill instance: computes prompts chunk by chunk, in turns, sending a layer's pages while the next computes."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from homkv.errors import HomkvError, ShapeError, TransferError, UnsupportedError
from homkv.formats import PageCodec
from homkv.formats.exact import EXACT_DTYPES
from homkv.formats.per_layer import PerLayerCodec
from homkv.models import LoadedModel
from homkv.models.forward import last_logits
from homkv.serve.choose import choose
from homkv.serve.engine import codec_for, plan_sequence
from homkv.serve.kept import KeptPrefixes
from homkv.serve.links import SERVING
from homkv.serve.logs import get_logger
from homkv.serve.messages import (
    AskStatus,
    Cancel,
    Choice,
    Failed,
    Finish,
    Prefill,
    PrefillDone,
    PrefillTimes,
    Progress,
    ToPrefill,
)
from homkv.serve.pipe import LayerPipe
from homkv.serve.prompt import PromptJob
from homkv.serve.status import StatusBoard
from homkv.serve.turns import Turns
from homkv.transport.endpoint import LinkOptions
from homkv.transport.keys import Security
from homkv.transport.link import Event, Listener, Message, PeerLost
from homkv.transport.sender import FrameSender, FrameTiming
from homkv.transport.shaper import LinkShaper

log = get_logger(__name__)
SEND_TIMEOUT_S = 600.0  # for the last byte on a slow link; a stuck peer is noticed by the link's own limits
SENDING_IDLE_S = 0.005  # between looks at transfers while nothing computes
PROBE_EVERY = 16  # prompts of which one has a layer's reconstruction error measured


class PrefillInstance:
    """Computes prompts and sends their KV to the decode instances that the requests name.

    ``source``: format in which prompts are kept here and from which the wire's format is made. ``chunk_tokens``: of one
    turn. ``prefix_bytes``: for pages of finished prompts. ``overlap``: layers travel while the next ones are computed.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        endpoint: str,
        security: Security,
        *,
        source: str = "fp16",
        chunk_tokens: int = 512,
        prefix_bytes: int = 256 << 20,
        overlap: bool = True,
        link_gbps: float | None = None,
        options: LinkOptions = SERVING,
    ) -> None:
        self.loaded, self._security, self._options = loaded, security, options
        self._codecs: dict[str, PageCodec] = {}
        self.source, self.chunk_tokens = self._codec(source), chunk_tokens
        if isinstance(self.source, PerLayerCodec):
            raise UnsupportedError("expected a source with pages of one size, found a per-layer plan; use fp16")
        root = f"{loaded.fingerprint}/{self.source.layout_id}"
        self.prefixes = KeptPrefixes(self.source, root, prefix_bytes)
        self.listener = Listener(endpoint, ToPrefill, security, options)
        self.status = StatusBoard("prefill", loaded.fingerprint, [self.source.name])
        self.is_draining = False
        self._shaper, self._overlap = LinkShaper(link_gbps), overlap
        self._turns: Turns[PromptJob] = Turns()
        self._sending: list[PromptJob] = []
        self._closer = ThreadPoolExecutor(4, thread_name_prefix="close")  # closing may wait for a dead peer
        self._num_begun, self._link_bytes_per_s = 0, 0.0
        self._current: PromptJob | None = None  # in the middle of a chunk

    @property
    def num_requests(self) -> int:
        """Prompts that wait, are being computed or are on their way."""
        return len(self._turns) + len(self._sending)

    def close(self) -> None:
        """Fail what has not been delivered and close the listener."""
        error = TransferError("expected to compute the prompt, found the prefill instance stopping; ask another one")
        try:
            for job in [*self._turns, *self._sending]:
                self._end(job, Failed.of(job.ask.request_id, error))
            self.listener.poll(0.0)  # sends what is queued
        finally:
            self._closer.shutdown()
            self.listener.close()

    def run(self, stop: threading.Event, drain_s: float = 0.0) -> None:
        """Serve until ``stop`` is set; then take nothing new, and go on for up to ``drain_s`` with what is left."""
        while not stop.is_set():
            self.turn()
        self.is_draining, deadline_s = True, time.monotonic() + drain_s
        while self.num_requests and time.monotonic() < deadline_s:
            self.turn()

    def turn(self, idle_s: float = 0.2) -> None:
        """Handle what arrived, look at transfers, compute one chunk."""
        self._listen(0.0 if len(self._turns) else SENDING_IDLE_S if self._sending else idle_s)
        for job in list(self._sending):
            self._guarded(job, self._deliver)
        chosen = self._turns.next()
        if chosen is not None:
            with self.status.computing():
                self._guarded(chosen, self._compute_chunk)

    def _guarded(self, job: PromptJob, work: Callable[[PromptJob], None]) -> None:
        """Do something for a job; an error ends the job and nothing else."""
        try:
            work(job)
        except HomkvError as error:
            log.warning("failed", request_id=job.ask.request_id, error=type(error).__name__, detail=str(error))
            self.status.counters[f"failed.{type(error).__name__}"] += 1
            self._end(job, Failed.of(job.ask.request_id, error))

    def _end(self, job: PromptJob, last: Failed | PrefillDone) -> None:
        """Forget a job and say how it ended; the only place that does."""
        if job in self._sending:
            self._sending.remove(job)
        else:
            self._turns.remove(job)
        if job.pipe is not None:
            self._closer.submit(job.pipe.close)
        job.cache = None
        self.listener.send(job.client, last)

    # -- arriving ----------------------------------------------------------------------------------------------

    def _listen(self, timeout_s: float) -> None:
        for event in self.listener.poll(timeout_s):
            self._handle(event)

    def _handle(self, event: Event) -> None:
        if isinstance(event, PeerLost):
            self._drop(event.peer, None)
        elif isinstance(event, Message) and isinstance(event.body, Prefill):
            self._accept(PromptJob(event.peer, event.body, time.monotonic()))
        elif isinstance(event, Message) and isinstance(event.body, Cancel):
            self._drop(event.peer, event.body.request_id)
        elif isinstance(event, Message) and isinstance(event.body, AskStatus):
            report = self.status.report(event.body.number, self.listener.refused, self._gauges())
            self.listener.send(event.peer, report)

    def _gauges(self) -> dict[str, float]:
        return {
            "requests_waiting": sum(job.cache is None for job in self._turns),
            "requests_computing": sum(job.cache is not None for job in self._turns),
            "requests_sending": len(self._sending),
            "prompt_tokens_left": sum(len(job.ask.prompt_ids) - job.num_computed for job in self._turns),
            "prefix_pages_asked": self.prefixes.index.num_asked,
            "prefix_pages_found": self.prefixes.index.num_found,
            "prefix_pages_held": len(self.prefixes.index),
            "prefix_bytes": self.prefixes.num_bytes,
            "link_bytes_per_s": self._link_bytes_per_s,
        }

    def _accept(self, job: PromptJob) -> None:
        try:
            self._check(job.ask)
        except HomkvError as error:
            self.listener.send(job.client, Failed.of(job.ask.request_id, error))
            return
        self._turns.add(job, -(-len(job.ask.prompt_ids) // self.chunk_tokens))

    def _check(self, ask: Prefill) -> None:
        vocabulary, context = self.loaded.vocab_size, self.loaded.context_length
        if self.is_draining:
            raise TransferError("expected to take a prompt, found the prefill instance stopping; ask another one")
        if ask.source != self.source.name:
            raise UnsupportedError(
                f"expected source {self.source.name!r}, in which this prefill instance keeps KV, found {ask.source!r}; "
                "ask an instance that keeps it so"
            )
        if not 0 < len(ask.prompt_ids) <= context:
            raise ShapeError(
                f"expected 1 to {context} prompt tokens, found {len(ask.prompt_ids)}; "
                "send a shorter prompt, but not an empty one"
            )
        if max(ask.prompt_ids) >= vocabulary:
            raise ShapeError(
                f"expected token ids below the vocabulary's {vocabulary}, found {max(ask.prompt_ids)}; was the prompt "
                "tokenized for another model?"
            )
        self._codec(ask.kv_cache_dtype)

    def _drop(self, client: bytes, request_id: str | None) -> None:
        """Forget one request of a client, or all of them. A chunk that is being computed notices between layers."""
        for job in [*self._turns, *self._sending]:
            if job.client == client and request_id in (None, job.ask.request_id):
                job.is_unwanted = True
                if job is not self._current:
                    self._guarded(job, PromptJob.check_wanted)

    def _codec(self, name: str) -> PageCodec:
        if name not in self._codecs:
            self._codecs[name] = codec_for(self.loaded, name)
        return self._codecs[name]

    # -- computing ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _compute_chunk(self, job: PromptJob) -> None:
        """Run the model over a prompt's next chunk; the last one feeds the pipe layer by layer."""
        if job.cache is None:
            kept = self.prefixes.match(job.ask.prompt_ids)
            job.open(self.loaded.model.config, self.source, kept, self.loaded.model.dtype)
        assert job.cache is not None
        chunk = job.ask.prompt_ids[job.num_computed : job.num_computed + self.chunk_tokens]
        is_last = job.num_computed + len(chunk) == len(job.ask.prompt_ids)
        if is_last:
            job.pipe = self._open_pipe(job)
        job.cache.on_layer = lambda layer, k, v: self._on_layer(job, layer, k, v)
        self._current = job
        try:
            logits = last_logits(self.loaded.model, torch.tensor([chunk]), job.cache, logits_to_keep=1)[0]
        finally:
            self._current = None
        job.num_computed += len(chunk)
        self.status.counters["prompt_tokens"] += len(chunk)
        if is_last:
            choice = choose(logits, job.ask.sampling, job.ask.first_index)
            self._send(job, choice)

    def _on_layer(self, job: PromptJob, layer: int, k: Tensor, v: Tensor) -> None:
        if job.pipe is not None:
            job.pipe.put(layer, k[0], v[0])
        job.num_layers += 1
        if job.ask.report_progress:
            self.listener.send(job.client, Progress(job.ask.request_id, job.num_layers))
        self._listen(0.0)
        job.check_wanted()

    def _open_pipe(self, job: PromptJob) -> LayerPipe:
        ask, target = job.ask, self._codec(job.ask.kv_cache_dtype)
        plan = plan_sequence(
            self.loaded,
            target,
            ask.request_id,
            ask.epoch,
            len(ask.prompt_ids),
            source=self.source.name,
            first_page=ask.first_page,
        )
        if not 0 <= ask.first_page <= plan.num_pages:
            raise ShapeError(f"expected a first page up to {plan.num_pages}, found {ask.first_page}; see the ticket")
        if self.source.name not in EXACT_DTYPES and self.source.name != target.name:
            log.info("converts in transit", request_id=ask.request_id, source=self.source.name, format=target.name)
        sender = FrameSender(
            ask.decode_endpoint, plan, self._security, ask.decode_key, shaper=self._shaper, options=self._options
        )
        self._num_begun += 1
        probed = self._num_begun % PROBE_EVERY == 1
        middle = self.loaded.num_layers // 2
        return LayerPipe(
            self.source,
            target,
            self.loaded.num_layers,
            sender,
            ask.first_page,
            job.kept,
            middle if probed else None,
            self._overlap,
        )

    # -- sending -----------------------------------------------------------------------------------------------

    def _send(self, job: PromptJob, choice: Choice) -> None:
        """The prompt is computed: its transfer goes on while others compute."""
        assert job.pipe is not None
        job.computed_s, job.cache = time.monotonic(), None
        job.pipe.finish(Finish(job.ask.request_id, job.ask.epoch, choice))
        self._turns.remove(job)
        self._sending.append(job)

    def _deliver(self, job: PromptJob) -> None:
        """Report a transfer that is complete. Raises for one that failed or takes too long."""
        assert job.pipe is not None
        frames = job.pipe.poll()
        if frames is not None:
            self.prefixes.add(job.ask.prompt_ids, job.pipe.layers())
            self._end(job, self._done(job, job.pipe, frames))
        elif time.monotonic() - job.computed_s > SEND_TIMEOUT_S:
            raise TransferError(
                f"expected {job.ask.request_id!r} delivered within {SEND_TIMEOUT_S} s, found it under way; use a "
                "faster link or a smaller format"
            )

    def _link_rate(self, frames: tuple[FrameTiming, ...]) -> float:
        """Bytes per second that the link carries, at least: a receipt also waits for the decode instance's step.

        So the fastest frame so far says the most. A shaped link's rate is known.
        """
        if self._shaper.gbps is None:
            paces = (f.num_bytes / max(f.acked_s - f.sent_s - f.verify_s, 1e-6) for f in frames)
            self._link_bytes_per_s = max(self._link_bytes_per_s, *paces)
        else:
            self._link_bytes_per_s = self._shaper.gbps * 1e9 / 8
        return self._link_bytes_per_s

    def _done(self, job: PromptJob, pipe: LayerPipe, frames: tuple[FrameTiming, ...]) -> PrefillDone:
        ask, wire_bytes = job.ask, sum(f.num_bytes for f in frames)
        times = PrefillTimes(
            received_s=job.received_s,
            start_s=job.start_s,
            computed_s=job.computed_s,
            packed_s=pipe.packed_s,
            sent_s=max(f.sent_s for f in frames),
            pack_busy_s=pipe.busy_s,
            send_busy_s=wire_bytes / self._link_rate(frames),
            verify_busy_s=sum(f.verify_s for f in frames),
        )
        num_sent = len(ask.prompt_ids) - ask.first_page * pipe.target.page_tokens
        raw_bytes = 4 * self.loaded.num_layers * self.loaded.num_kv_heads * self.loaded.head_dim * num_sent
        return PrefillDone(ask.request_id, raw_bytes, wire_bytes, times, job.num_cached, pipe.error)
