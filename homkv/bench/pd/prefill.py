"""The prefill worker: computes prompts one after another, packs every layer, sends it while the next computes."""

import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from homkv.attention.prefill import causal
from homkv.bench.pd import direct, nixl
from homkv.bench.pd.digest import TRAILER_BYTES, DeviceDigest, padded
from homkv.bench.pd.forms import Form, make_form
from homkv.bench.pd.messages import (
    DEVICE_LINKS,
    Cell,
    Close,
    Closed,
    Compute,
    Connect,
    Connected,
    Hello,
    Join,
    Joined,
    Open,
    Opened,
    Prefilled,
    Start,
    Step,
)
from homkv.bench.pd.sockets import LastWord, Layer, Outgoing, connect
from homkv.bench.pd.worker import Worker, lane_of, num_lanes
from homkv.hf import AttendingCache
from homkv.models.forward import forward_with_cache
from homkv.seal import check_status
from homkv.transport.shaper import LinkShaper

Attention = Callable[[Tensor, Tensor, Tensor, float], Tensor]
Link = Outgoing | direct.DirectOutgoing | nixl.NixlOutgoing


class PromptCache(AttendingCache):
    """transformers' view of a prompt whose layers are handed on as they come."""

    def __init__(self, num_layers: int, attention: Attention, on_layer: Callable[[int, Tensor, Tensor], None]) -> None:
        super().__init__(num_layers, None)
        self._attention, self._on_layer = attention, on_layer

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, real: Tensor | None) -> Tensor:
        """See AttendingCache."""
        out = self._attention(q, k, v, softmax_scale)
        self._on_layer(layer, k[0], v[0])
        return out


def attention_by(name: str, device: torch.device) -> Attention:
    """How prompts attend: exactly, or with both products in int8."""
    if device.type == "cpu":
        return causal
    from homkv.attention.triton import prefill

    return prefill.causal_int8 if name == "int8" else prefill.exact


class Unsent:
    """Bytes that wait to leave: :meth:`add` waits while there are too many."""

    def __init__(self, limit: int) -> None:
        self._limit, self._held = limit, 0
        self._changed = threading.Condition()

    def add(self, num_bytes: int) -> None:
        """Count bytes that wait."""
        with self._changed:
            self._changed.wait_for(lambda: self._held == 0 or self._held + num_bytes <= self._limit)
            self._held += num_bytes

    def remove(self, num_bytes: int) -> None:
        """Count bytes that left."""
        with self._changed:
            self._held -= num_bytes
            self._changed.notify_all()


class Prompt:
    """One prompt on its way: moments, and what has not left."""

    def __init__(self, order: Compute, num_layers: int, done: Callable[["Prompt"], None]) -> None:
        self.order, self._left, self._done = order, num_layers + 1, done  # layers, and the first token
        self.start_s = time.monotonic()
        self.computed_s = self.packed_s = self.sent_s = 0.0
        self.link_bytes = 0
        self.held: list[Layer] = []  # without overlap: layers that wait for the first token
        self._lock = threading.Lock()

    def part_done(self) -> None:
        """A layer left, or the prompt was computed."""
        with self._lock:
            self._left -= 1
            is_done = self._left == 0
        if is_done:
            self._done(self)


class PrefillWorker(Worker):
    """See the module."""

    def __init__(self, start: Start) -> None:
        super().__init__(start)
        self._orders: deque[Compute] = deque()
        self._sockets: list[list[socket.socket]] = []  # of every decode worker
        self._tcp: list[Outgoing] = []
        self._links: dict[str, list[Link]] = {}  # by kind, to every decode worker
        self._cell: Cell | None = None
        self._form: Form | None = None
        self._steps: dict[object, list[Step]] = {}
        self._unsent = Unsent(start.max_unsent_bytes)
        self._status = torch.zeros(1, dtype=torch.int32, device=self.device)
        self._digest = DeviceDigest(self.device)
        self.say(Hello(0))

    @property
    def is_busy(self) -> bool:
        """See Worker."""
        return bool(self._orders)

    def handle(self, event: Any) -> None:
        """See Worker."""
        match event:
            case Connect():
                self._connect(event.ports)
            case Join():
                self._join(event.kind)
            case Open():
                self._open(event.cell)
            case Compute():
                self._orders.append(event)
            case Close():
                costs = [link.digests for link in self._tcp]
                seconds, size = sum(c.seconds for c in costs), sum(c.num_bytes for c in costs)
                self.say(Closed(0, self.peak_bytes(), seconds, size, []))

    def _connect(self, ports: list[int]) -> None:
        start = self.start
        sockets = [[connect(port, start.token, start.rank, i) for i in range(num_lanes(start))] for port in ports]
        self._sockets = sockets
        self._tcp = [Outgoing(s[: start.lanes], start.chunk_bytes, self.device, self.fail) for s in sockets]
        self._links["tcp"] = list(self._tcp)
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
        self.say(Connected(name, self.model.num_parameters()))

    def _join(self, kind: str) -> None:
        """Open a link to every decode worker's device."""
        start, lane = self.start, lane_of(self.start, kind)
        if kind == "direct":
            groups = direct.join(start, self.device)
            self._links[kind] = [
                direct.DirectOutgoing(s[lane], groups[start.rank, rank], rank, self.device, self.fail)
                for rank, s in enumerate(self._sockets, start.num_prefill)
            ]
        else:
            self._links[kind] = [
                nixl.NixlOutgoing(s[lane], f"from-{start.rank}-{i}", self.device, self.fail)
                for i, s in enumerate(self._sockets)
            ]
        self.say(Joined(kind))

    def _open(self, cell: Cell) -> None:
        """Make the cell's settings ours. A new format or length is warmed up and timed first."""
        key = (cell.format, cell.kind, cell.prefill, cell.prompts)  # between devices a digest belongs to packing
        self._cell, self._form = cell, make_form(self.shape, cell.format)
        shaper = LinkShaper(cell.link_gbps)  # of this worker's interface, which all its connections share
        for link in self._tcp:
            link.shaper = shaper
            link.digests.reset()
        if key not in self._steps:
            self._steps[key] = self._time_steps(cell)
        self.reset_peak()
        self.say(Opened(0, self._steps[key]))

    def _time_steps(self, cell: Cell) -> list[Step]:
        """Prompts of three lengths, packing included, and packing alone of the same; the longest first warms up."""
        low, high = cell.prompts
        out = []
        for index, tokens in enumerate([high, *sorted({low, (low + high) // 2, high})]):
            layers: dict[int, tuple[Tensor, Tensor]] = {}

            def on_layer(layer: int, k: Tensor, v: Tensor, keep: dict[int, tuple[Tensor, Tensor]] = layers) -> None:
                self._pack(k, v)
                keep[0] = (k, v)

            start_s = time.monotonic()
            self._forward(tokens, 0, on_layer)
            prefill_s = time.monotonic() - start_s
            pack_s = self._time_packing(*layers[0])
            if index:
                out += [Step("prefill", 1, tokens, prefill_s), Step("pack", 1, tokens, pack_s)]
        check_status(self._status)
        return out

    def _time_packing(self, k: Tensor, v: Tensor) -> float:
        """Seconds to pack as many layers as the model has."""
        self._synchronize()
        start_s = time.monotonic()
        for _ in range(self.shape.num_layers):
            self._pack(k, v)
        self._synchronize()
        return time.monotonic() - start_s

    def _synchronize(self) -> None:
        torch.get_device_module(self.device).synchronize()

    def turn(self) -> None:
        """Compute the oldest prompt."""
        if self._orders:
            self._compute(self._orders.popleft())

    def _compute(self, order: Compute) -> None:
        assert self._cell is not None
        prompt = Prompt(order, self.shape.num_layers, self._report)
        link = self._links[self._cell.kind][order.target]
        token = self._forward(
            order.prompt_tokens, order.request, lambda layer, k, v: self._put(prompt, link, layer, k, v)
        )
        prompt.computed_s = time.monotonic()
        check_status(self._status)
        for layer in prompt.held:
            self._unsent.add(layer.num_bytes)
            link.send(layer)
        prompt.held.clear()
        link.finish(LastWord(order.request, token))
        prompt.part_done()

    def _forward(self, num_tokens: int, seed: int, on_layer: Callable[[int, Tensor, Tensor], None]) -> int:
        """Compute a prompt of random tokens; returns the first new token."""
        assert self._cell is not None
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(self.shape.vocab_size, (1, num_tokens), generator=generator).to(self.device)
        attention = attention_by(self._cell.prefill, self.device)
        cache = PromptCache(self.shape.num_layers, attention, on_layer)
        positions = torch.arange(num_tokens, device=self.device)[None]
        logits = forward_with_cache(self.model, ids, cache, position_ids=positions, logits_to_keep=1).logits
        return int(logits[0, -1].argmax())

    def _pack(self, k: Tensor, v: Tensor) -> tuple[Tensor, int]:
        """A layer's message and how many of its bytes are payload; between devices it also gets a trailer."""
        assert self._cell is not None
        assert self._form is not None
        size = self._form.payload_bytes(k.shape[1])
        is_sealed = self._cell.kind in DEVICE_LINKS
        length = padded(size) + TRAILER_BYTES if is_sealed else size
        message = torch.empty(length, dtype=torch.uint8, device=self.device)
        self._form.pack(k, v, message[:size], self._status)
        if is_sealed:
            self._digest.seal(message, size)
        return message, size

    def _put(self, prompt: Prompt, link: Link, index: int, k: Tensor, v: Tensor) -> None:
        assert self._cell is not None
        message, size = self._pack(k, v)
        ready = None
        if self.device.type == "cuda":
            ready = torch.cuda.Event()
            ready.record()

        def on_sent(layer: Layer) -> None:
            prompt.sent_s = time.monotonic()
            self._unsent.remove(size)
            prompt.part_done()

        layer = Layer(prompt.order.request, index, message, ready, size, on_sent)
        prompt.link_bytes += size
        if self._cell.overlap:
            self._unsent.add(size)
            link.send(layer)
        else:
            prompt.held.append(layer)

    def _report(self, prompt: Prompt) -> None:
        order = prompt.order
        self.say(Prefilled(order.request, prompt.start_s, prompt.computed_s, prompt.sent_s, prompt.link_bytes))
