"""Whoever carries out the faults of processes."""

import threading
import time

from homkv.eval.chaos.judge import Watched
from homkv.eval.chaos.service import Cell
from homkv.testing.faults import Fault
from homkv.transport.link import Peer

GONE_S = 0.5  # behind a kill, nobody is there for a while
BEGIN_TIMEOUT_S = 3.0


class Operator:
    """Carries out one fault on a cell; it is over at the latest when :meth:`restore` returns."""

    def __init__(self, cell: Cell, fault: Fault) -> None:
        self._cell, self._fault = cell, fault
        self._work = threading.Thread(target=lambda: None)
        self._is_working = threading.Event()
        self.error: BaseException | None = None
        self.victim: Watched | None = None

    def hit(self) -> None:
        """The message passes: begin. Called in the link's thread, which goes on when the fault is in force."""
        cell, fault, begun = self._cell, self._fault, threading.Event()
        match fault.kind:
            case "kill":
                cell.kill(fault.where)
            case "restart":
                cell.terminate(fault.where)
            case "stop":
                cell.pause(fault.where)
            case "clock_jump":
                cell.jump(fault.duration_s)
            case "slow_client" if self.victim is not None:
                self.victim.pause_s = fault.duration_s
        if fault.kind != "full_pool":  # that one is in force when its reservation was answered
            begun.set()
        self._work = threading.Thread(target=self._guarded, args=(begun,), name="operator")
        self._work.start()
        self._is_working.set()
        begun.wait(BEGIN_TIMEOUT_S)

    def _guarded(self, begun: threading.Event) -> None:
        try:
            self._go_on(begun)
        except BaseException as error:  # kept for the judge
            self.error = error
        finally:
            begun.set()

    def _go_on(self, begun: threading.Event) -> None:
        cell, fault = self._cell, self._fault
        match fault.kind:
            case "kill":
                time.sleep(fault.duration_s + GONE_S)
                cell.revive(fault.where)
            case "restart":
                cell.revive(fault.where)
            case "stop":
                time.sleep(fault.duration_s)
                cell.resume(fault.where)
            case "full_pool":
                hog: Peer = cell.fill_pool()
                begun.set()
                time.sleep(fault.duration_s)
                cell.empty_pool(hog)

    def restore(self, timeout_s: float) -> None:
        """The fault was hit: wait until it is over, even if its message has just passed. Raises what went wrong."""
        if not self._fault.is_of_link and self._is_working.wait(timeout_s):
            self._work.join()
        if self.error is not None:
            raise self.error
