"""Closing a connection whose other side is in trouble, which has ended whole processes inside libzmq."""

import subprocess
import sys

# The other side shakes hands, reads nothing, and after our close says something and breaks the connection, all between
# two heartbeats: libzmq 4.3.5 fails an assertion at the next one if the socket still lingers (zeromq/libzmq#4364).
SCRIPT = """
import socket, struct, threading, time
from homkv.transport.endpoint import FRAME, LinkOptions, Receipt
from homkv.transport.keys import Security
from homkv.transport.link import Peer

GREETING = b"\\xff" + bytes(8) + b"\\x7f\\x03\\x01" + b"NULL".ljust(20, b"\\0") + bytes(32)
READY = b"\\x05READY\\x0bSocket-Type" + struct.pack("!I", 6) + b"ROUTER"
closed = threading.Event()

def other_side():
    end, _ = server.accept()
    end.sendall(GREETING + bytes([4, len(READY)]) + READY)
    closed.wait()
    for _ in range(3):
        end.sendall(b"\\x00\\x01P")
        time.sleep(0.05)
    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    end.close()

server = socket.create_server(("127.0.0.1", 0))
other = threading.Thread(target=other_side)
other.start()
options = LinkOptions(peer_timeout_s=2.0, linger_s=3.0)
peer = Peer(f"tcp://127.0.0.1:{server.getsockname()[1]}", Receipt, Security(insecure=True), None, options)
for _ in range(8):
    peer.submit(FRAME, [bytes(8 << 20)])  # more than the sockets' buffers take
time.sleep(0.1)
peer.close()
closed.set()
other.join()
time.sleep(1.0)  # two heartbeats
print("alive")
"""


def test_a_peer_that_breaks_while_we_close_does_not_end_the_process() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr
