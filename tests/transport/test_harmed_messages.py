"""Sealed messages that do not open. Monitors must not keep their connection from ending: see decision 0016."""

import subprocess
import sys
import time

import pytest
from transport_cases import Hello, Messages, secured

from homkv.testing.faults import Fault
from homkv.testing.names import SealedNames
from homkv.testing.proxy import FaultyLink
from homkv.transport.endpoint import LinkError, LinkOptions
from homkv.transport.link import Listener, Peer

# Its listener's connection is harmed, and a second later the other side hangs up, between two heartbeats.
SCRIPT = """
import sys, time
sys.path.insert(0, sys.argv[1])
from test_harmed_messages import *
with Listener("tcp://127.0.0.1:0", Messages, SERVER, OPTIONS) as made:
    with harmed_link(made.endpoint) as link, Peer(link.endpoint, Messages, CLIENT, SERVER_KEY, OPTIONS) as p:
        p.send(Hello("harmed"))
        for _ in range(5):
            made.poll(0.1)
        link.sever()
        for _ in range(30):
            made.poll(0.1)
print("alive")
"""
SERVER, CLIENT, SERVER_KEY = secured()
OPTIONS = LinkOptions(peer_timeout_s=4.0, linger_s=0.2)  # heartbeats every second, given up after two


def harmed_link(target: str) -> FaultyLink:
    """A link that turns one bit of the first message to the listener at ``target``."""
    link = FaultyLink(target, lambda: SealedNames("prefill"))
    link.arm(Fault("flip", "prefill", "AskStatus", seed=3))
    return link


def test_a_harmed_message_ends_its_connection_at_once() -> None:
    """Not when heartbeats miss it: until then the other side's words would wait."""
    with Listener("tcp://127.0.0.1:0", Messages, SERVER, OPTIONS) as made, harmed_link(made.endpoint) as link:
        with Peer(link.endpoint, Messages, CLIENT, SERVER_KEY, OPTIONS) as p:
            p.send(Hello("x"))
            start_s = time.monotonic()
            with pytest.raises(LinkError, match="vanished"):
                p.recv(OPTIONS.peer_timeout_s)
            assert time.monotonic() - start_s < OPTIONS.peer_timeout_s / 4
        assert not link.is_armed


def test_a_process_lives_when_a_harmed_connection_is_hung_up() -> None:
    command = [sys.executable, "-c", SCRIPT, __file__.rpartition("/")[0]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr
