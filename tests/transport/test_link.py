import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest
from transport_cases import Finish, Hello, Messages, layer_bytes, plan, secured

from homkv.errors import ShapeError, TransferError
from homkv.transport.assemble import encode_layer
from homkv.transport.endpoint import FRAME, LinkError, LinkOptions, Receipt
from homkv.transport.keys import KeyPair, Security, TrustStore
from homkv.transport.link import Arrival, Event, Listener, Message, Peer, PeerLost
from homkv.transport.wire import FrameError

SERVER, CLIENT, SERVER_KEY = secured()
ANY_PORT = "tcp://127.0.0.1:0"
FAST = LinkOptions(peer_timeout_s=2.0, ack_timeout_s=2.0, linger_s=0.1)
PATIENCE_S = 10.0  # how long a test waits for what must happen; it never waits this long when it does


@pytest.fixture
def listener() -> Iterator[Listener]:
    with Listener(ANY_PORT, Messages, SERVER, FAST) as made:
        yield made


@pytest.fixture
def peer(listener: Listener) -> Iterator[Peer]:
    with Peer(listener.endpoint, Messages, CLIENT, SERVER_KEY, FAST) as made:
        yield made


def poll_until(listener: Listener, done: Callable[[list[Event]], bool]) -> list[Event]:
    events: list[Event] = []
    deadline = time.monotonic() + PATIENCE_S
    while not done(events):
        assert time.monotonic() < deadline, f"only {events} came"
        events += listener.poll(0.05)
    return events


def next_receipt(peer: Peer) -> Receipt:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        for received in peer.poll(0.05):
            assert isinstance(received, Receipt)
            return received
    raise AssertionError("no receipt came")


def arrivals(events: list[Event]) -> list[Arrival]:
    return [e for e in events if isinstance(e, Arrival)]


def test_messages_go_both_ways_in_order(listener: Listener, peer: Peer) -> None:
    for i in range(100):
        peer.send(Finish(i))
    events = poll_until(listener, lambda e: len(e) == 100)
    assert [e.body for e in events if isinstance(e, Message)] == [Finish(i) for i in range(100)]
    for i in range(100):
        listener.send(events[0].peer, Hello(str(i)))
    listener.poll(0)
    assert [peer.recv(PATIENCE_S) for _ in range(100)] == [Hello(str(i)) for i in range(100)]


def test_a_frame_arrives_exact_and_its_receipt_carries_the_verify_time(listener: Listener, peer: Peer) -> None:
    p = plan(2000, 100)  # 0.8 MB: beyond what pyzmq copies
    exact, pages = layer_bytes(p, 1)
    (buffers,) = encode_layer(p, 1, exact, pages)
    number, tracker = peer.submit(FRAME, buffers)
    (arrival,) = arrivals(poll_until(listener, bool))
    assert bytes(arrival.frame.payload) == exact[0] + exact[1] + pages
    assert (arrival.number, arrival.verify_s > 0) == (number, True)
    listener.ack(arrival)
    listener.poll(0)
    receipt = next_receipt(peer)
    assert (receipt.number, receipt.reason, receipt.verify_s) == (number, "", arrival.verify_s)
    tracker.wait(PATIENCE_S)


def test_a_damaged_frame_is_refused_by_number_and_counted(listener: Listener, peer: Peer) -> None:
    exact, pages = layer_bytes(plan(), 0)
    (buffers,) = encode_layer(plan(), 0, exact, pages)
    number, _ = peer.submit(FRAME, [buffers[0], *exact, pages[:-1] + b"\0" if pages[-1] else pages[:-1] + b"\1"])
    poll_until(listener, lambda _: bool(listener.refused))
    listener.poll(0)
    receipt = next_receipt(peer)
    assert (receipt.number, receipt.reason) == (number, "digest")
    assert listener.refused == {"digest": 1}


GARBAGE = [
    [b""],
    [b"M"],
    [b"X", bytes(8), b""],
    [b"M", b"1", b""],
    [b"M", bytes(8), b"\xc1"],
    [b"F", bytes(8), b"x"],
]


def test_garbage_is_refused_and_others_go_on(listener: Listener, peer: Peer) -> None:
    with Peer(listener.endpoint, Messages, CLIENT, SERVER_KEY, FAST) as stranger:
        for parts in GARBAGE:
            stranger._socket.send_multipart(parts)
        stranger.send(Finish("no number"))  # type: ignore[arg-type]
        peer.send(Hello("still here"))
        events = poll_until(listener, lambda e: bool(e) and listener.refused.total() == 7)
        assert [e.body for e in events if isinstance(e, Message)] == [Hello("still here")]
        listener.poll(0)
        with pytest.raises(TransferError, match="expected a message"):
            stranger.recv(PATIENCE_S)
    assert listener.refused == {"malformed": 6, "truncated": 1}


def test_a_message_above_the_cap_never_reaches_the_listener(listener: Listener, peer: Peer) -> None:
    peer._socket.send_multipart([b"M", bytes(8), bytes(FAST.max_message_bytes + 1)])
    poll_until(listener, lambda _: listener.refused["malformed"] == 1)
    peer._socket.send_multipart([b"F", bytes(8), bytes(2 * FAST.max_frame_bytes)])
    with pytest.raises(LinkError, match="vanished"):  # the library drops the connection before it allocates
        peer.recv(PATIENCE_S)
    (lost,) = poll_until(listener, bool)
    assert isinstance(lost, PeerLost)


def test_an_unknown_key_is_refused_and_counted(listener: Listener) -> None:
    with pytest.raises(LinkError, match="add our public key") as caught:
        Peer(listener.endpoint, Messages, Security(KeyPair.generate()), SERVER_KEY, FAST)
    assert caught.value.reason == "refused"
    poll_until(listener, lambda _: bool(listener.refused))
    assert listener.refused == {"untrusted_key": 1}


def test_a_plaintext_client_is_refused_and_counted(listener: Listener) -> None:
    with pytest.raises(LinkError) as caught:
        Peer(listener.endpoint, Messages, Security(insecure=True), options=FAST)
    assert caught.value.reason == "refused"
    poll_until(listener, lambda _: bool(listener.refused))
    assert set(listener.refused) == {"handshake"}


def test_a_listener_with_another_key_is_not_trusted(listener: Listener) -> None:
    with pytest.raises(LinkError, match="refused"):
        Peer(listener.endpoint, Messages, CLIENT, KeyPair.generate().public, FAST)


def test_trust_can_be_given_and_taken_while_listening() -> None:
    trust, client = TrustStore(), KeyPair.generate()
    server = KeyPair.generate()
    with Listener(ANY_PORT, Messages, Security(server, trust), FAST) as made:
        trust.add(client.public)
        Peer(made.endpoint, Messages, Security(client), server.public, FAST).close()
        trust.remove(client.public)
        with pytest.raises(LinkError):
            Peer(made.endpoint, Messages, Security(client), server.public, FAST)


def test_insecure_links_work_when_both_sides_say_so() -> None:
    insecure = Security(insecure=True)
    made = Listener(ANY_PORT, Messages, insecure, FAST)
    with made, Peer(made.endpoint, Messages, insecure, options=FAST) as p:
        p.send(Hello("plain"))
        assert isinstance(poll_until(made, bool)[0], Message)
    with pytest.raises(LinkError, match="public key"):
        Peer(made.endpoint, Messages, insecure, SERVER_KEY, FAST)


def test_no_listener_is_an_error_in_bounded_time() -> None:
    quick = LinkOptions(peer_timeout_s=0.3)
    with pytest.raises(LinkError, match="found none") as caught:
        Peer("tcp://127.0.0.1:9", Messages, CLIENT, SERVER_KEY, quick)
    assert caught.value.reason == "timeout"


def test_a_taken_port_is_named(listener: Listener) -> None:
    with pytest.raises(TransferError, match="free port"):
        Listener(listener.endpoint, Messages, SERVER, FAST)


def test_no_answer_is_an_error_in_bounded_time(peer: Peer) -> None:
    with pytest.raises(LinkError, match="is it busy"):
        peer.recv(0.05)


CHILD = """
import sys, time
sys.path.insert(0, sys.argv[1])
from transport_cases import Hello, Messages
from homkv.transport.endpoint import LinkOptions
from homkv.transport.keys import Security
from homkv.transport.link import Listener, Peer
fast = LinkOptions(peer_timeout_s=1.0)
if sys.argv[2] == "listen":
    end = Listener("tcp://127.0.0.1:0", Messages, Security(insecure=True), fast)
    print(end.endpoint, flush=True)
    while True:
        end.poll(1)
peer = Peer(sys.argv[2], Messages, Security(insecure=True), options=fast)
peer.send(Hello("child"))
print("sent", flush=True)
time.sleep(60)
"""


@pytest.fixture
def start_child() -> Iterator[Callable[[str], "subprocess.Popen[str]"]]:
    children = []

    def start(argument: str) -> "subprocess.Popen[str]":
        command = [sys.executable, "-c", CHILD, __file__.rpartition("/")[0], argument]
        children.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        return children[-1]

    yield start
    for child in children:
        child.kill()
        child.communicate()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_vanished_peer_is_reported_and_others_are_unharmed(
    start_child: Callable[[str], "subprocess.Popen[str]"], how: signal.Signals
) -> None:
    insecure = Security(insecure=True)
    made = Listener(ANY_PORT, Messages, insecure, FAST)
    with made, Peer(made.endpoint, Messages, insecure, options=FAST) as p:
        child = start_child(made.endpoint)
        (hello,) = poll_until(made, bool)
        child.send_signal(how)
        lost = poll_until(made, bool)
        assert lost == [PeerLost(hello.peer)]
        p.send(Hello("alive"))
        (alive,) = poll_until(made, bool)
        made.send(hello.peer, Finish(1))  # into the void: no error, no second report
        made.send(alive.peer, Finish(2))
        assert made.poll(0) == []
        assert p.recv(PATIENCE_S) == Finish(2)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_vanished_listener_is_an_error_of_the_peer(
    start_child: Callable[[str], "subprocess.Popen[str]"], how: signal.Signals
) -> None:
    child = start_child("listen")
    assert child.stdout is not None
    with Peer(child.stdout.readline().strip(), Messages, Security(insecure=True), options=FAST) as p:
        child.send_signal(how)
        with pytest.raises(LinkError, match="peer vanished") as caught:
            p.recv(PATIENCE_S)
        assert caught.value.reason == "vanished"


def test_a_peer_that_does_not_read_is_given_up(start_child: Callable[[str], "subprocess.Popen[str]"]) -> None:
    """By the number of messages that wait for it; heartbeats would take a minute."""
    patient = LinkOptions(peer_timeout_s=120.0, max_messages=10)
    with Listener(ANY_PORT, Messages, Security(insecure=True), patient) as made:
        child = start_child(made.endpoint)
        (hello,) = poll_until(made, bool)
        child.send_signal(signal.SIGSTOP)
        events: list[Event] = []
        for _ in range(2000):
            made.send(hello.peer, Hello("x" * 100_000))
            events += made.poll(0)
            if events:
                break
        assert events == [PeerLost(hello.peer)]


def test_a_stranger_is_logged_and_counted_once_and_a_lost_peer_is_not_one(
    listener: Listener, caplog: pytest.LogCaptureFixture
) -> None:
    """A refusal is told by libzmq, or by a connection that ends before it was made."""
    with pytest.raises(LinkError, match="handshake"):
        Peer(listener.endpoint, Messages, Security(insecure=True), options=FAST)
    poll_until(listener, lambda _: bool(listener.refused))
    with Peer(listener.endpoint, Messages, CLIENT, SERVER_KEY, FAST) as p:
        p.send(Hello("known"))
        poll_until(listener, bool)
    for _ in range(20):
        listener.poll(0.05)
    assert listener.refused == {"handshake": 1}
    assert [r.getMessage() for r in caplog.records if "refused" in r.getMessage()] == ["refused a peer: handshake"]


def test_limits_are_checked() -> None:
    frames = ({"max_frame_bytes": n} for n in (65 << 20, 100))
    for options in (*frames, {"peer_timeout_s": 0}, {"window_bytes": -1}):
        with pytest.raises(ShapeError, match="expected"):
            LinkOptions(**options)


@pytest.mark.parametrize(
    ("endpoint", "key"),
    [("nonsense", SERVER_KEY), (ANY_PORT, "short"), ("tcp://[:1", SERVER_KEY)],
    ids=["no address", "short key", "broken host"],  # the key is random: it must not name the test
)
def test_a_wrong_address_is_a_typed_error(endpoint: str, key: str) -> None:
    with pytest.raises(LinkError, match="expected"):
        Peer(endpoint, Messages, CLIENT, key, FAST)


def test_a_message_above_the_cap_is_not_sent(listener: Listener, peer: Peer) -> None:
    with pytest.raises(TransferError, match="shorten it"):
        peer.send(Hello("x" * FAST.max_message_bytes))
    with pytest.raises(TransferError, match="shorten it"):
        listener.send(b"any", Hello("x" * FAST.max_message_bytes))


def test_nack_carries_reason_and_text(listener: Listener, peer: Peer) -> None:
    exact, pages = layer_bytes(plan(), 0)
    (buffers,) = encode_layer(plan(), 0, exact, pages)
    peer.submit(FRAME, buffers)
    (arrival,) = arrivals(poll_until(listener, bool))
    listener.nack(arrival, FrameError("epoch", "expected epoch 8, found 7; reserve again"))
    listener.poll(0)
    receipt = next_receipt(peer)
    assert (receipt.reason, receipt.detail) == ("epoch", "expected epoch 8, found 7; reserve again")
    assert listener.refused == {"epoch": 1}
