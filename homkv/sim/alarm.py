"""One pending call in simulated time; setting it again replaces it."""

from collections.abc import Callable

import simpy


class Alarm:
    """Calls ``action`` once at the time last set. Costs one event per setting and no process."""

    def __init__(self, env: simpy.Environment, action: Callable[[], None]) -> None:
        self.env = env
        self.action = action
        self._pending: simpy.Event | None = None

    def set(self, delay_s: float) -> None:
        """Ring in ``delay_s`` seconds instead of at any time set before."""
        self._pending = call_in(self.env, delay_s, self._ring)

    def _ring(self, event: simpy.Event) -> None:
        if event is self._pending:
            self._pending = None
            self.action()


def call_in(env: simpy.Environment, delay_s: float, action: Callable[[simpy.Event], None]) -> simpy.Event:
    """Call ``action`` with the event in ``delay_s`` seconds. A delay below zero by rounding counts as zero."""
    event = simpy.Timeout(env, delay_s if delay_s > 0 else 0)
    event.callbacks.append(action)
    return event
