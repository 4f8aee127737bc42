"""Layers out in the background: bounded, acknowledged, timed.

One FrameSender carries one sequence, in one thread that owns one connection. The compute thread calls ``send``
after each layer and goes on; encoding, pacing and waiting for the receiver happen here.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Self, get_args

import msgspec
import zmq

from homkv.errors import TransferError
from homkv.transport.assemble import SequencePlan, encode_layer
from homkv.transport.endpoint import DEFAULTS, FRAME, MESSAGE, LinkError, LinkOptions, Receipt, Wake, encode_message
from homkv.transport.keys import Security
from homkv.transport.link import Peer
from homkv.transport.shaper import LinkShaper
from homkv.transport.wire import Buffer, FrameError, Reason

PRECISE_S = 0.002  # zmq polls in whole milliseconds; shorter waits for the shaper are slept


@dataclass(frozen=True)
class FrameTiming:
    """A frame's life in seconds of ``time.monotonic`` of the sender."""

    layer: int
    part: int
    num_bytes: int  # on the wire, head included
    queued_s: float  # send() was called
    sent_s: float  # handed to the link; with a shaper: its last byte crossed
    acked_s: float
    verify_s: float  # duration, measured by the receiver


@dataclass
class _Outgoing:
    """A frame, or a message (layer None), on its way."""

    layer: int | None
    part: int
    body: Sequence[bytes | memoryview]
    queued_s: float
    ready_s: float = 0.0  # queued, and there was credit
    due_s: float | None = None  # set when it occupies the emulated link
    sent_s: float = 0.0
    tracker: zmq.MessageTracker | None = None

    def __post_init__(self) -> None:
        self.ready_s = self.queued_s
        self.num_bytes = sum(len(b) for b in self.body)
        self.payload_bytes = 0 if self.layer is None else self.num_bytes - len(self.body[0])


class FrameSender:
    """Sends the layers of one sequence. Use as a context manager.

    Buffers given to ``send`` are not copied: they must not change until ``finish`` or ``close`` returned.
    A failure of the background thread is raised by the next call.
    """

    def __init__(
        self,
        endpoint: str,
        plan: SequencePlan,
        security: Security,
        server_key: str | None = None,
        shaper: LinkShaper | None = None,
        options: LinkOptions = DEFAULTS,
    ) -> None:
        """Start connecting to the decode instance's listener; returns at once."""
        self._plan, self._options, self._shaper = plan, options, shaper or LinkShaper()
        self._connect = partial(Peer, endpoint, Receipt, security, server_key, options)
        self._wake = Wake()
        self._changed = threading.Condition()  # guards the fields up to the blank line
        self._queue: deque[Iterator[_Outgoing]] = deque()  # one entry per layer or message, until all of it left
        self._held_bytes = 0  # payload bytes accepted and not acknowledged
        self._in_flight: dict[int, _Outgoing] = {}
        self._timings: list[FrameTiming] = []
        self._error: Exception | None = None
        self._stop = False

        self._head: _Outgoing | None = None  # the thread's own
        self._thread = threading.Thread(target=self._run, name=f"send-{plan.sequence}", daemon=True)
        self._thread.start()

    # -- the caller's side -------------------------------------------------------------------------------------

    def send(self, layer: int, exact: Sequence[Buffer], pages: Buffer) -> None:
        """Queue one layer: ``exact`` = keys and values ``[G, E, D]``, ``pages [N, G, P]``.

        Returns at once unless ``queue_bytes`` are waiting; then blocks up to ``ack_timeout_s``. Raises LinkError,
        FrameError or ShapeError, also for layers sent before.
        """
        entry = self._encode(layer, exact, pages, time.monotonic())
        size, limit = self._plan.layer_bytes, self._options.queue_bytes
        self._append(entry, size, lambda: not self._held_bytes or self._held_bytes + size <= limit)

    def post(self, message: msgspec.Struct) -> None:
        """Queue a control message behind the layers sent so far. Raises like ``send``."""
        body = encode_message(message, self._options.max_message_bytes)
        outgoing = _Outgoing(None, 0, [body], time.monotonic())
        self._append(iter([outgoing]), 0, lambda: True)

    def finish(self, timeout_s: float) -> tuple[FrameTiming, ...]:
        """Wait until everything is sent and acknowledged; returns the frames' times. Raises like ``send``."""
        with self._changed:
            self._wait(lambda: not self._queue and not self._in_flight, timeout_s)
            return tuple(self._timings)

    def close(self) -> None:
        """End the thread and the connection; what was not acknowledged may be lost.

        On return the buffers are free. Raises LinkError if the socket library still holds one.
        """
        with self._changed:
            self._stop = True
            self._changed.notify_all()
        self._wake.ring()
        self._thread.join()
        self._wake.close()
        for outgoing in self._in_flight.values():
            self._release(outgoing)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _append(self, entry: Iterator[_Outgoing], size: int, has_room: Callable[[], bool]) -> None:
        with self._changed:
            self._wait(has_room, self._options.ack_timeout_s)
            self._queue.append(entry)
            self._held_bytes += size
        self._wake.ring()

    def _wait(self, done: Callable[[], bool], timeout_s: float) -> None:
        """Wait with the lock held; raises the thread's error, or LinkError when time is over."""
        ready = self._changed.wait_for(lambda: self._error is not None or self._stop or done(), timeout_s)
        if self._error is not None:
            raise self._error
        if self._stop:
            raise LinkError("closed", "expected an open sender, found it closed; make a new one")
        if not ready:
            raise LinkError(
                "timeout",
                f"expected the receiver to take our frames within {timeout_s} s, found {len(self._in_flight)} not "
                "acknowledged; the receiver is too slow or stuck",
            )

    def _release(self, outgoing: _Outgoing) -> None:
        assert outgoing.tracker is not None  # in flight means sent
        try:
            outgoing.tracker.wait(self._options.linger_s + 1)
        except zmq.NotDone as error:
            raise LinkError(
                "timeout", f"expected layer {outgoing.layer} free after close, found it in use; do not reuse its buffer"
            ) from error

    # -- the thread's side -------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            with self._connect() as peer:
                peer.watch(self._wake)
                while not self._stop:
                    self._step(peer)
        except Exception as error:  # whatever it is, the caller must see it: a thread has nobody else to tell
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _step(self, peer: Peer) -> None:
        """Send what may leave now, then wait for receipts or for the next departure."""
        wait_s = self._send_due(peer)
        if wait_s < PRECISE_S:
            time.sleep(wait_s)
            wait_s = 0.0
        received = peer.poll(wait_s)
        self._wake.drain()
        for receipt in received:
            assert isinstance(receipt, Receipt)  # the only type this peer decodes
            self._settle(receipt)
        self._check_acks(time.monotonic())

    def _send_due(self, peer: Peer) -> float:
        """Send all that is due; returns seconds until the next departure, or until acks should be checked."""
        longest_s = min(self._options.peer_timeout_s, self._options.ack_timeout_s) / 4
        while (head := self._next()) is not None:
            if head.due_s is None:
                if not self._has_credit(head):
                    break
                head.due_s = self._shaper.reserve(head.num_bytes, head.ready_s)
            wait_s = head.due_s - time.monotonic()
            if wait_s > 0:
                return min(wait_s, longest_s)
            self._depart(peer, head)
        return longest_s

    def _next(self) -> _Outgoing | None:
        """The frame or message whose turn it is; None if nothing waits."""
        while self._head is None and self._queue:
            self._head = next(self._queue[0], None)
            if self._head is None:
                with self._changed:
                    self._queue.popleft()
                    self._changed.notify_all()
        return self._head

    def _encode(self, layer: int, exact: Sequence[Buffer], pages: Buffer, queued_s: float) -> Iterator[_Outgoing]:
        """Frames of a layer, made one at a time in the thread: digests cost the caller nothing."""
        frames = encode_layer(self._plan, layer, exact, pages, self._options.max_frame_bytes)
        saved_bytes = self._plan.layer_bytes
        for part, body in enumerate(frames):
            outgoing = _Outgoing(layer, part, body, queued_s)
            saved_bytes -= outgoing.payload_bytes
            yield outgoing
        with self._changed:
            self._held_bytes -= saved_bytes  # by the format's coder: accepted, but never sent
            self._changed.notify_all()

    def _has_credit(self, head: _Outgoing) -> bool:
        if not self._in_flight:
            return True
        unacked = sum(o.num_bytes for o in self._in_flight.values()) + head.num_bytes
        if unacked <= self._options.window_bytes and len(self._in_flight) < self._options.max_messages:
            return True
        head.ready_s = time.monotonic()  # the emulated link idles while credit is missing
        return False

    def _depart(self, peer: Peer, head: _Outgoing) -> None:
        head.sent_s = time.monotonic()
        number, head.tracker = peer.submit(MESSAGE if head.layer is None else FRAME, head.body)
        self._head = None
        with self._changed:
            self._in_flight[number] = head

    def _settle(self, receipt: Receipt) -> None:
        now_s = time.monotonic()
        with self._changed:
            done = self._in_flight.pop(-1 if receipt.number is None else receipt.number, None)
            if receipt.reason or done is None:
                raise _refusal(receipt)
            self._held_bytes -= done.payload_bytes
            if done.layer is not None:
                times = (done.queued_s, done.sent_s, now_s, receipt.verify_s)
                self._timings.append(FrameTiming(done.layer, done.part, done.num_bytes, *times))
            self._changed.notify_all()

    def _check_acks(self, now_s: float) -> None:
        oldest_s = min((o.sent_s for o in self._in_flight.values()), default=now_s)
        if now_s - oldest_s > self._options.ack_timeout_s:
            raise LinkError(
                "timeout",
                f"expected every frame acknowledged within {self._options.ack_timeout_s} s, found the peer vanished or "
                "stuck; see the receiver's log",
            )


def _refusal(receipt: Receipt) -> TransferError:
    text = receipt.detail or f"expected receipts of our frames, found one of number {receipt.number}"
    if receipt.reason in get_args(Reason):
        return FrameError(receipt.reason, f"refused by the receiver: {text}")  # type: ignore[arg-type]  # just checked
    return TransferError(f"refused by the receiver ({receipt.reason or 'unknown'}): {text}")
