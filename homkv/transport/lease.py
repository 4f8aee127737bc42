"""A promise that expires by itself."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Lease:
    """Room kept until an absolute time on the holder's own monotonic clock.

    The receiver owns the clock: nothing that a peer sends, or stops sending, extends a lease by accident. Renewing it
    counts from now, but never beyond ``limit_s`` after the start: a heartbeat cannot keep it for ever.
    ``clock`` returns seconds.
    """

    duration_s: float
    limit_s: float = float("inf")
    clock: Callable[[], float] = time.monotonic
    expires_at_s: float = field(init=False)
    ends_at_s: float = field(init=False)  # whatever renews it

    def __post_init__(self) -> None:
        self.ends_at_s = self.clock() + self.limit_s
        self.renew()

    def renew(self) -> None:
        """Start the full duration again, within the limit."""
        self.expires_at_s = min(self.clock() + self.duration_s, self.ends_at_s)

    @property
    def remaining_s(self) -> float:
        """Seconds left, never negative."""
        return max(0.0, self.expires_at_s - self.clock())

    @property
    def expired(self) -> bool:
        """Whether the time is over. What the lease kept must then be freed and late frames refused."""
        return self.remaining_s == 0.0
