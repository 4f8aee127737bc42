"""What happens to a socket's connections, told by libzmq and put in our words."""

import itertools
from typing import Literal

import zmq
from zmq.utils.monitor import recv_monitor_message

# A connection was made, ended after it was made, or was refused: because of its key, or before or without one.
Happening = Literal["connected", "lost", "untrusted_key", "handshake"]
BEGUN = zmq.Event.ACCEPTED | zmq.Event.CONNECTED
_SAID: dict[zmq.Event, Happening] = {
    zmq.Event.HANDSHAKE_FAILED_AUTH: "untrusted_key",
    zmq.Event.HANDSHAKE_FAILED_NO_DETAIL: "handshake",
}
# Not HANDSHAKE_FAILED_PROTOCOL. libzmq 4.3.5 tells it for sealed messages that do not open, too, and telling it
# overwrites the error code: the connection then stalls instead of ending, and whoever has heartbeats is ended by an
# assertion when the other side hangs up (docs/decisions/0016-chaos.md). A connection that ends before it was made says
# as much.
WANTED = BEGUN | zmq.Event.HANDSHAKE_SUCCEEDED | zmq.Event.DISCONNECTED | zmq.Event(sum(_SAID))
_names = itertools.count()


class Monitor:
    """Reads what happens to a socket's connections. The socket's thread's."""

    def __init__(self, socket: "zmq.Socket[bytes]") -> None:
        self._watched = socket
        self._num_made = 0
        self._begun: dict[int, int] = {}  # by file: connections made until this one began
        self._num_explained = 0  # refusals whose connections have not ended yet
        # get_monitor_socket() names its endpoint after a file descriptor, which another socket may still hold
        address = f"inproc://homkv-monitor-{next(_names)}"
        socket.monitor(address, WANTED)
        self.socket = socket.context.socket(zmq.PAIR)
        self.socket.linger = 0
        self.socket.connect(address)

    def next(self, timeout_s: float = 0.0) -> Happening | None:
        """What happened next, or None if nothing did within ``timeout_s``, or nothing that matters."""
        while self.socket.poll(int(timeout_s * 1000)):
            message = recv_monitor_message(self.socket)
            happened = self._translate(message["event"], message["value"])
            if happened is not None:
                return happened
        return None

    def _translate(self, event: zmq.Event, file: int) -> Happening | None:
        if event & BEGUN:
            self._begun[file] = self._num_made
            return None
        if event == zmq.Event.HANDSHAKE_SUCCEEDED:
            self._num_made += 1
            return "connected"
        if event in _SAID:
            self._num_explained += 1
            return _SAID[event]
        return self._end(file)

    def _end(self, file: int) -> Happening | None:
        """libzmq does not say which connection was made. One that ended while none was made was not.

        So a refusal beside another connection's success may count as a loss, but no loss as a refusal.
        """
        was_made = self._begun.pop(file, -1) < self._num_made
        was_explained = self._num_explained > 0 and not was_made
        self._num_explained = self._num_explained - was_explained if self._begun else 0
        if was_made:
            return "lost"
        return None if was_explained else "handshake"

    def close(self) -> None:
        """Stop watching; call before the watched socket is closed."""
        self._watched.disable_monitor()
        self.socket.close()
