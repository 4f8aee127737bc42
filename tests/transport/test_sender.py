import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
from transport_cases import Finish, Messages, layer_bytes, plan, secured

from homkv.errors import ShapeError, TransferError
from homkv.transport.assemble import LayerData, SequenceAssembler, SequencePlan
from homkv.transport.endpoint import LinkError, LinkOptions
from homkv.transport.keys import KeyPair
from homkv.transport.link import Arrival, Listener, Message, PeerLost
from homkv.transport.sender import FrameSender
from homkv.transport.shaper import LinkShaper
from homkv.transport.wire import FRAME_OVERHEAD, FrameError

SERVER, CLIENT, SERVER_KEY = secured()
SMALL = FRAME_OVERHEAD + 40_000
FAST = LinkOptions(peer_timeout_s=2.0, ack_timeout_s=5.0, linger_s=0.1, max_frame_bytes=SMALL)
PATIENCE_S = 10.0
PLAN = plan(300, 10)  # 116 KB a layer: four frames of at most 40 KB


class Receiver(threading.Thread):
    """A decode instance in a thread: assembles one sequence, or never acknowledges."""

    def __init__(self, p: SequencePlan, deaf: bool = False) -> None:
        super().__init__()
        self.listener = Listener("tcp://127.0.0.1:0", Messages, SERVER, FAST)
        self.assembler, self.deaf, self.stopping = SequenceAssembler(p), deaf, False
        self.layers: list[LayerData] = []
        self.log: list[str] = []
        self.received_bytes = 0

    def run(self) -> None:
        with self.listener:
            while not self.stopping:
                for event in self.listener.poll(0.05):
                    self.take(event)

    def take(self, event: Message | Arrival | PeerLost) -> None:
        self.log.append(type(event).__name__)
        if not isinstance(event, Arrival):
            return
        self.received_bytes += event.frame.payload.nbytes
        if self.deaf:
            return
        try:
            layer = self.assembler.add(event.frame)
        except FrameError as error:
            self.listener.nack(event, error)
            return
        self.layers += [layer] if layer else []
        self.listener.ack(event)

    def __enter__(self) -> "Receiver":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping = True
        self.join()

    def sender(self, p: SequencePlan = PLAN, options: LinkOptions = FAST, **extra: LinkShaper) -> FrameSender:
        return FrameSender(self.listener.endpoint, p, CLIENT, SERVER_KEY, options=options, **extra)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver(PLAN) as made:
        yield made


def test_layers_arrive_exact_and_the_message_behind_them(receiver: Receiver) -> None:
    with receiver.sender() as sender:
        for layer in (2, 0, 1):
            exact, pages = layer_bytes(PLAN, layer)
            sender.send(layer, exact, pages)
        sender.post(Finish(42))
        timings = sender.finish(PATIENCE_S)
    assert receiver.log[: len(timings) + 1] == ["Arrival"] * len(timings) + ["Message"]
    assert receiver.assembler.complete
    for data in receiver.layers:
        exact, pages = layer_bytes(PLAN, data.layer)
        assert [bytes(data.exact_k), bytes(data.exact_v), bytes(data.pages)] == [*exact, pages]
    assert [(t.layer, t.part) for t in timings] == [(layer, part) for layer in (2, 0, 1) for part in range(3)]
    for t in timings:
        assert t.queued_s <= t.sent_s <= t.acked_s
        assert 0 < t.verify_s < t.acked_s - t.queued_s
        assert t.num_bytes <= SMALL


def test_a_refused_frame_fails_the_next_calls_with_its_reason(receiver: Receiver) -> None:
    stale = plan(300, 10, epoch=6)
    exact, pages = layer_bytes(stale, 0)
    with receiver.sender(stale) as sender:
        sender.send(0, exact, pages)
        with pytest.raises(FrameError, match="reserve again") as caught:
            sender.finish(PATIENCE_S)
        assert caught.value.reason == "epoch"
        with pytest.raises(FrameError):
            sender.send(1, exact, pages)
    assert receiver.layers == []


def test_a_layer_of_the_wrong_size_fails_the_next_call(receiver: Receiver) -> None:
    exact, pages = layer_bytes(PLAN, 0)
    with receiver.sender() as sender:
        sender.send(0, exact, pages[:-1])
        with pytest.raises(ShapeError, match="the ticket names"):
            sender.finish(PATIENCE_S)


def test_an_undecodable_message_fails_the_sender(receiver: Receiver) -> None:
    with receiver.sender() as sender:
        sender.post(Finish("no number"))  # type: ignore[arg-type]
        with pytest.raises(TransferError, match="declared type"):
            sender.finish(PATIENCE_S)


def test_a_receiver_that_never_acknowledges_blocks_the_sender_within_its_window() -> None:
    exact, pages = layer_bytes(PLAN, 0)
    tight = LinkOptions(
        peer_timeout_s=1.0, ack_timeout_s=1.0, linger_s=0.1, max_frame_bytes=SMALL, window_bytes=100_000,
        queue_bytes=2 * PLAN.layer_bytes,
    )  # fmt: skip
    with Receiver(PLAN, deaf=True) as receiver, receiver.sender(options=tight) as sender:
        sender.send(0, exact, pages)
        sender.send(1, exact, pages)
        assert sender._held_bytes == tight.queue_bytes
        with pytest.raises(LinkError, match=r"peer vanished or stuck|too slow or stuck") as caught:
            sender.send(2, exact, pages)
        assert caught.value.reason == "timeout"
        assert sender._held_bytes == tight.queue_bytes
        assert 0 < receiver.received_bytes <= tight.window_bytes


def test_finish_times_out_without_losing_the_transfer() -> None:
    exact, pages = layer_bytes(PLAN, 0)
    with Receiver(PLAN, deaf=True) as receiver, receiver.sender() as sender:
        sender.send(0, exact, pages)
        with pytest.raises(LinkError, match="not acknowledged"):
            sender.finish(0.2)


def test_an_untrusted_sender_learns_it_at_the_next_call(receiver: Receiver) -> None:
    sender = FrameSender(receiver.listener.endpoint, PLAN, CLIENT, KeyPair.generate().public, options=FAST)
    with sender:
        sender._thread.join(PATIENCE_S)
        with pytest.raises(LinkError, match="refused"):
            sender.post(Finish(0))


def test_a_vanished_receiver_fails_the_sender() -> None:
    exact, pages = layer_bytes(PLAN, 0)
    with Receiver(PLAN, deaf=True) as receiver:
        sender = receiver.sender()
        sender.send(0, exact, pages)
        while not receiver.received_bytes:
            time.sleep(0.01)
    with sender, pytest.raises(LinkError, match="vanished"):
        sender.finish(PATIENCE_S)


def test_a_closed_sender_says_so(receiver: Receiver) -> None:
    with receiver.sender() as sender:
        sender.post(Finish(1))
        sender.finish(PATIENCE_S)
    with pytest.raises(LinkError, match="closed"):
        sender.post(Finish(2))


def test_buffers_are_free_after_close_even_if_nothing_was_acknowledged() -> None:
    pages = bytearray(layer_bytes(PLAN, 0)[1])
    exact, _ = layer_bytes(PLAN, 0)
    with Receiver(PLAN, deaf=True) as receiver:
        with receiver.sender() as sender:
            sender.send(0, exact, pages)
            while not receiver.received_bytes:
                time.sleep(0.01)
        assert all(o.tracker is not None and o.tracker.done for o in sender._in_flight.values())


def test_shaped_frames_leave_when_their_last_byte_has_crossed(receiver: Receiver) -> None:
    exact, pages = layer_bytes(PLAN, 0)
    shaper = LinkShaper(0.01)  # 116 KB take 93 ms
    with receiver.sender(shaper=shaper) as sender:
        sender.send(0, exact, pages)
        timings = sender.finish(PATIENCE_S)
    total = sum(t.num_bytes for t in timings)
    assert (shaper.sent_bytes, shaper.busy_s) == (total, pytest.approx(total * 8 / 1e7))
    assert timings[-1].sent_s - timings[0].queued_s >= total * 8 / 1e7  # a lower bound cannot flake


def test_two_sequences_share_a_shaped_link(receiver: Receiver) -> None:
    shaper, exact_pages = LinkShaper(0.02), layer_bytes(PLAN, 0)
    other = plan(300, 10, sequence="r2")
    with Receiver(other) as second, receiver.sender(shaper=shaper) as a, second.sender(other, shaper=shaper) as b:
        start_s = time.monotonic()
        a.send(0, *exact_pages)
        b.send(0, *exact_pages)
        ends = [s.finish(PATIENCE_S)[-1].sent_s for s in (a, b)]
    assert max(ends) - start_s >= shaper.busy_s
    assert shaper.sent_bytes > 2 * PLAN.layer_bytes


class AllZeros:
    """A coder of pages that hold nothing but zeros."""

    def encode(self, pages: memoryview, num_pages: int) -> bytes:
        return bytes([1])

    def decode(self, data: memoryview, num_pages: int, num_heads: int) -> bytes:
        return bytes(num_pages * num_heads * 192)


def test_packed_layers_leave_no_debt_behind() -> None:
    """What a coder saved must not count as waiting: many more layers than the queue holds go through."""
    p = replace(PLAN, coder=AllZeros(), expect=replace(PLAN.expect, num_layers=12))
    options = replace(FAST, queue_bytes=2 * p.layer_bytes)
    with Receiver(p) as receiver, receiver.sender(p, options) as sender:
        for layer in range(12):
            exact, pages = layer_bytes(p, layer)
            sender.send(layer, exact, bytes(len(pages)))
        timings = sender.finish(PATIENCE_S)
    assert receiver.assembler.complete
    assert sum(t.num_bytes for t in timings) < 12 * p.layer_bytes / 10
