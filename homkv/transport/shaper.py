"""Make a fast link behave like a slower one."""

import threading

from homkv.errors import ShapeError


class LinkShaper:
    """Paces frames as a link of ``gbps`` (10^9 bits per second) would. Thread-safe: share one per emulated link.

    A frame is released when its last byte would have crossed the link: the receiver cannot use a frame
    earlier, because it verifies whole frames. There is no burst allowance, and time runs on the ideal
    schedule, so n bytes take ``8 n / rate`` in total however late the sleeps end. Real transfer time comes on
    top: a shaper slows a link down, it never speeds one up. ``gbps=None`` counts bytes and delays nothing.
    """

    def __init__(self, gbps: float | None = None) -> None:
        if gbps is not None and not gbps > 0:
            raise ShapeError(f"expected a positive rate in Gb/s or None, found {gbps}; None means unshaped")
        self.gbps = gbps
        self.sent_bytes = 0
        self.busy_s = 0.0  # time the emulated link was occupied
        self._free_at_s = float("-inf")
        self._lock = threading.Lock()

    def seconds(self, num_bytes: int) -> float:
        """Time that this many bytes occupy the link; 0 if it is not shaped."""
        return 0.0 if self.gbps is None else num_bytes * 8 / (self.gbps * 1e9)

    def reserve(self, num_bytes: int, ready_at_s: float) -> float:
        """Occupy the link for one frame that is ready at ``ready_at_s``; returns when its last byte has crossed.

        Times are seconds of one clock, chosen by the caller; the shaper itself never looks at a clock.
        """
        with self._lock:
            took_s = self.seconds(num_bytes)
            self.sent_bytes += num_bytes
            self.busy_s += took_s
            if self.gbps is None:
                return ready_at_s
            self._free_at_s = max(self._free_at_s, ready_at_s) + took_s
            return self._free_at_s
