"""The decode worker: grants room, takes layers in, decodes what is complete, all running sequences in one step."""

import gc
import socket
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor

from homkv.bench.pd import direct, nixl
from homkv.bench.pd.batch import Batch, make_slots
from homkv.bench.pd.digest import DeviceDigest
from homkv.bench.pd.forms import Form, make_form
from homkv.bench.pd.messages import (
    Cell,
    Close,
    Closed,
    Connect,
    Connected,
    Finished,
    Granted,
    Hello,
    Join,
    Joined,
    Open,
    Opened,
    Reserve,
    Start,
    Step,
)
from homkv.bench.pd.sockets import Incoming, accept
from homkv.bench.pd.worker import Worker, lane_of, num_lanes
from homkv.errors import CapacityError, TransferError

TIMED_STEPS = 6
TIMED_PAGES = 3
SPARE_BYTES = 6 << 30  # of a GPU, besides KV: steps' own memory, and what the other side of a shared GPU may need


@dataclass
class Sequence:
    """One request from its grant to its last token."""

    ask: Reserve
    slot: int
    payloads: dict[int, Tensor] = field(default_factory=dict)  # by layer; between devices: with their trailers
    missing: dict[int, int] = field(default_factory=dict)  # layer -> bytes that have not come
    layers_left: int = 0
    first_token: int | None = None
    arrived_s: float = 0.0
    first_token_s: float = 0.0
    tokens: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Prepared:
    """A format's slots and captured steps."""

    form: Form
    batch: Batch
    steps: list[Step]
    device_bytes: int


@dataclass(frozen=True)
class Arrived:
    """All of a request is there."""

    request: int


class DecodeWorker(Worker):
    """See the module."""

    def __init__(self, start: Start) -> None:
        super().__init__(start)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._waiting: deque[Reserve] = deque()
        self._sequences: dict[int, Sequence] = {}
        self._running: list[Sequence] = []
        self._lock = threading.Lock()
        self._sockets: dict[tuple[int, int], socket.socket] = {}  # by prefill worker and lane
        self._incoming: list[Incoming] = []
        self._from_devices: list[direct.DirectIncoming | nixl.NixlIncoming] = []
        self._kept: dict[object, Prepared] = {}
        self._current: Prepared | None = None
        self._log: list[tuple[int, int, float]] = []
        self._digest = DeviceDigest(self.device)
        self._digest_s, self._digest_bytes = 0.0, 0
        self.say(Hello(self._listener.getsockname()[1]))

    @property
    def current(self) -> Prepared:
        """What decodes in this cell."""
        assert self._current is not None
        return self._current

    @property
    def batch(self) -> Batch:
        """Its sequences."""
        return self.current.batch

    @property
    def is_busy(self) -> bool:
        """See Worker."""
        return bool(self._running)

    def handle(self, event: Any) -> None:
        """See Worker."""
        match event:
            case Connect():
                self._connect()
            case Join():
                self._join(event.kind)
            case Open():
                self._open(event.cell)
            case Reserve():
                self._waiting.append(event)
            case Arrived():
                self._start(self._sequences[event.request])
            case Close():
                self._close()

    def _connect(self) -> None:
        start = self.start
        self._sockets = accept(self._listener, start.token, start.num_prefill * num_lanes(start))
        tcp = [s for (_, lane), s in self._sockets.items() if lane < start.lanes]
        self._incoming = [
            Incoming(tcp, start.chunk_bytes, self.device, self._place, self._count, self._finish, self.fail)
        ]
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
        self.say(Connected(name, self.model.num_parameters()))

    def _join(self, kind: str) -> None:
        """Open a link from every prefill worker's device."""
        start, take = self.start, (self.device, self._take_whole, self._finish, self.fail)
        groups = direct.join(start, self.device) if kind == "direct" else {}
        for rank in range(start.num_prefill):
            lane = self._sockets[rank, lane_of(start, kind)]
            self._from_devices.append(
                direct.DirectIncoming(lane, groups[rank, start.rank], rank, *take)
                if kind == "direct"
                else nixl.NixlIncoming(lane, f"to-{start.rank}-{rank}", *take)
            )
        self.say(Joined(kind))

    def _open(self, cell: Cell) -> None:
        """Make room and capture steps, unless an earlier cell's serve: formats may take turns at no cost."""
        key = (cell.format, cell.slots, cell.longest, cell.kv_budget_bytes)
        if key not in self._kept:
            self._current = None
            self._kept[key] = self._prepare(cell)
        self._current = self._kept[key]
        self.batch.slots.peak_bytes = 0
        for link in self._incoming:
            link.digests.reset()
        self._digest_s, self._digest_bytes = 0.0, 0
        self._log.clear()
        self.reset_peak()
        self.say(Opened(self.batch.slots.allocated_bytes, self.current.steps))

    def _prepare(self, cell: Cell) -> Prepared:
        """Slots with captured steps, timed on KV of zeros. What earlier cells kept goes if memory is short."""
        form = make_form(self.shape, cell.format)
        in_flight = 2 * self.shape.num_layers * form.payload_bytes(cell.prompts[1])  # layers that gather
        self._make_room(cell.slots * form.kv_bytes(cell.longest) + in_flight + SPARE_BYTES)
        before = self._device_bytes()
        batch = Batch(self.model, make_slots(form, cell.slots, cell.longest, cell.kv_budget_bytes, self.device))
        batch.warm_up()
        return Prepared(form, batch, self._time_steps(cell, batch), self._device_bytes() - before)

    def _make_room(self, num_bytes: int) -> None:
        if self.device.type != "cuda":
            return
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        if torch.cuda.mem_get_info(self.device)[0] < num_bytes:
            self._kept.clear()
            gc.collect()
            torch.cuda.empty_cache()

    def _device_bytes(self) -> int:
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0

    def peak_bytes(self) -> int:
        """See Worker. Without what is kept for other formats."""
        others = sum(kept.device_bytes for kept in self._kept.values() if kept is not self._current)
        return max(super().peak_bytes() - others, 0)

    def _time_steps(self, cell: Cell, batch: Batch) -> list[Step]:
        """Steps of one and of many sequences, behind short and long prompts."""
        out = []
        slots = batch.slots
        for count in sorted({1, max(slots.count // 2, 1), slots.count}):
            for tokens in sorted(set(cell.prompts)):
                if not slots.fits(count, tokens + TIMED_STEPS):
                    continue
                taken = [slots.take(tokens + TIMED_STEPS) for _ in range(count)]
                for slot in taken:
                    batch.join(slot, tokens, 0)
                # Sequences of one length seal a page in the same step, as they do not in a run: hence the median.
                out.append(Step("decode", count, tokens, median(timed(batch, taken) for _ in range(TIMED_STEPS))))
                for slot in taken:
                    batch.leave(slot)
        return out + time_seal(batch, cell.prompts[0])

    # -- arriving, in the links' threads -----------------------------------------------------------------------

    def _sequence(self, request: int, layer: int) -> Sequence:
        with self._lock:
            sequence = self._sequences.get(request)
        if sequence is None or layer >= self.shape.num_layers:
            raise TransferError(f"expected a granted request and a layer of the model, found {request} and {layer}")
        return sequence

    def _place(self, request: int, layer: int) -> Tensor:
        """Where the bytes of a layer gather."""
        sequence = self._sequence(request, layer)
        with self._lock:
            if layer not in sequence.payloads:
                size = self.current.form.payload_bytes(sequence.ask.prompt_tokens)
                sequence.payloads[layer] = torch.empty(size, dtype=torch.uint8, device=self.device)
                sequence.missing[layer] = size
            return sequence.payloads[layer]

    def _count(self, request: int, layer: int, num_bytes: int) -> None:
        """So many more bytes of a layer are in their place, and verified."""
        sequence = self._sequence(request, layer)
        with self._lock:
            sequence.missing[layer] -= num_bytes
            sequence.layers_left -= sequence.missing[layer] == 0
        self._check_complete(sequence)

    def _take_whole(self, request: int, layer: int, message: Tensor) -> None:
        """A layer that came in one piece, with its trailer."""
        sequence = self._sequence(request, layer)
        with self._lock:
            sequence.payloads[layer] = message
            sequence.layers_left -= 1
        self._check_complete(sequence)

    def _finish(self, request: int, first_token: int) -> None:
        sequence = self._sequence(request, 0)
        with self._lock:
            sequence.first_token = first_token
        self._check_complete(sequence)

    def _check_complete(self, sequence: Sequence) -> None:
        with self._lock:
            is_complete = sequence.layers_left == 0 and sequence.first_token is not None and not sequence.arrived_s
            if is_complete:
                sequence.arrived_s = time.monotonic()
        if is_complete:
            self.mailbox.put(Arrived(sequence.ask.request))

    # -- decoding, in the main thread --------------------------------------------------------------------------

    def turn(self) -> None:
        """Grant what fits, take one step, and grant what then fits."""
        self._grant_waiting()
        if self._running:
            self._step()
            self._grant_waiting()

    def _grant_waiting(self) -> None:
        while self._waiting and self._grant(self._waiting[0]):
            self._waiting.popleft()

    def _step(self) -> None:
        start_s = time.monotonic()
        tokens = self.batch.step([s.slot for s in self._running])
        held = sum(s.ask.prompt_tokens + len(s.tokens) for s in self._running)
        self._log.append((len(self._running), held, time.monotonic() - start_s))
        for sequence, token in zip(list(self._running), tokens, strict=True):
            self._take_token(sequence, token)

    def _grant(self, ask: Reserve) -> bool:
        slots, total = self.batch.slots, ask.prompt_tokens + ask.output_tokens
        if not slots.has_room(total):
            if not self._sequences:
                raise CapacityError(f"expected room for {total} tokens in an empty cache, found too little; use more")
            return False
        sequence = Sequence(ask, slots.take(total), layers_left=self.shape.num_layers)
        with self._lock:
            self._sequences[ask.request] = sequence
        self.say(Granted(ask.request))
        return True

    def _start(self, sequence: Sequence) -> None:
        """Put a prompt in its place, give out its first token, and decode from the next step on.

        Here and not where the layers arrive: kernels of another stream would each wait for the step that runs.
        """
        assert sequence.first_token is not None
        size = self.current.form.payload_bytes(sequence.ask.prompt_tokens)
        self._verify(sequence, size)
        for layer, message in sequence.payloads.items():
            if self.device.type == "cuda":  # a link's stream made it, and must not reuse it before it was read here
                message.record_stream(torch.cuda.current_stream())
            self.batch.slots.load(sequence.slot, layer, sequence.ask.prompt_tokens, message[:size])
        sequence.payloads.clear()
        self.batch.join(sequence.slot, sequence.ask.prompt_tokens, sequence.first_token)
        sequence.first_token_s = time.monotonic()
        self._running.append(sequence)
        self._take_token(sequence, sequence.first_token)

    def _verify(self, sequence: Sequence, size: int) -> None:
        """Compare the trailers of layers that came from device to device. Raises TransferError."""
        sealed = [message for message in sequence.payloads.values() if len(message) > size]
        if not sealed:
            return
        start_s = time.perf_counter()
        if not bool(torch.stack([self._digest.is_intact(message, size) for message in sealed]).all()):
            raise TransferError(f"expected the bytes of request {sequence.ask.request} unchanged, found others")
        self._digest_s += time.perf_counter() - start_s
        self._digest_bytes += size * len(sealed)

    def _take_token(self, sequence: Sequence, token: int) -> None:
        sequence.tokens.append(token)
        if len(sequence.tokens) < sequence.ask.output_tokens:
            return
        self._running.remove(sequence)
        self.batch.leave(sequence.slot)
        with self._lock:
            del self._sequences[sequence.ask.request]
        times = (sequence.arrived_s, sequence.first_token_s, time.monotonic())
        self.say(Finished(sequence.ask.request, *times, sequence.tokens))

    def _close(self) -> None:
        self.batch.slots.check()
        costs = [(x.digests.seconds, x.digests.num_bytes) for x in self._incoming]
        costs.append((self._digest_s, self._digest_bytes))
        seconds, size = sum(s for s, _ in costs), sum(n for _, n in costs)
        self.say(Closed(self.batch.slots.peak_bytes, self.peak_bytes(), seconds, size, self._log))


def time_seal(batch: Batch, prompt_tokens: int) -> list[Step]:
    """A page that is sealed between steps: what one step in a page's worth takes more than the others."""
    slots, page = batch.slots, batch.slots.sealed_tokens
    count = TIMED_PAGES * page
    if not page or not slots.fits(1, prompt_tokens + count):
        return []
    slot = slots.take(prompt_tokens + count)
    batch.join(slot, prompt_tokens, 0)
    seconds = [timed(batch, [slot]) for _ in range(count)]
    batch.leave(slot)
    slowest = median(max(seconds[at : at + page]) for at in range(0, count, page))
    return [Step("seal", 1, page, slowest - median(seconds))]


def timed(batch: Batch, slots: list[int]) -> float:
    """Seconds of one step."""
    start_s = time.monotonic()
    batch.step(slots)
    return time.monotonic() - start_s
