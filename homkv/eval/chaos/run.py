"""One fault after another, each against two requests in flight, and a clean request behind each."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

from homkv.errors import HomkvError
from homkv.eval.chaos.judge import References, Watched, broken_promises, make_query
from homkv.eval.chaos.service import REQUEST_TIMEOUT_S, Cell
from homkv.serve.query import Policy
from homkv.testing.faults import Fault
from homkv.testing.models import tiny_model
from homkv.transport.link import Peer

END_TIMEOUT_S = 2 * REQUEST_TIMEOUT_S  # every request has ended by then
FREE_TIMEOUT_S = 10.0  # after its end, everything it held is free
RECOVERY_TIMEOUT_S = 20.0  # and by then, a clean request is served
HIT_TIMEOUT_S = 1.5  # for messages that come by the clock
NEIGHBOURS = (11, 22, 33)  # prompts that come again and again: their pages are shared
PROMPT_TOKENS = (150, 200, 300)


@dataclass
class Outcome:
    """What one fault did."""

    fault: Fault
    policy: str
    was_hit: bool = False
    states: list[str] = field(default_factory=list)  # of the victim and of its neighbour
    broken: list[str] = field(default_factory=list)  # invariants
    errors: list[str] = field(default_factory=list)  # that the clients were told
    free_s: float = 0.0  # from the last end until nothing was held
    recovery_s: float = 0.0  # from then until a clean request was answered
    num_prompts: int = 0  # whose KV was compared

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


class Operator:
    """Carries out the faults of processes on a cell; undone at the latest by :meth:`restore`."""

    def __init__(self, cell: Cell, fault: Fault) -> None:
        self._cell, self._fault = cell, fault
        self._work = threading.Thread(target=lambda: None)
        self._is_working = threading.Event()
        self.error: BaseException | None = None
        self.victim: Watched | None = None

    def hit(self) -> None:
        """The message passes: begin. Called in the link's thread, which goes on when the fault is in force."""
        cell, where, begun = self._cell, self._fault.where, threading.Event()
        match self._fault.kind:
            case "kill" | "restart":
                cell.kill(where)
                begun.set()
            case "stop":
                cell.hosted[where].pause()
                begun.set()
            case "clock_jump":
                cell.clock.offset_s += self._fault.duration_s
                begun.set()
            case "slow_client":
                if self.victim is not None:
                    self.victim.pause_s = self._fault.duration_s
                begun.set()
        self._work = threading.Thread(target=self._guarded, args=(begun,), name="operator")
        self._work.start()
        self._is_working.set()
        begun.wait(3.0)

    def _guarded(self, begun: threading.Event) -> None:
        try:
            self._go_on(begun)
        except BaseException as error:  # kept for the judge
            self.error = error
        finally:
            begun.set()

    def _go_on(self, begun: threading.Event) -> None:
        match self._fault.kind:
            case "kill":
                time.sleep(self._fault.duration_s + 0.5)  # nobody is there for a while
                self._cell.revive(self._fault.where)
            case "restart":
                self._cell.revive(self._fault.where)
            case "stop":
                time.sleep(self._fault.duration_s)
                self._cell.hosted[self._fault.where].resume()
            case "full_pool":
                hog: Peer = self._cell.fill_pool()
                begun.set()
                time.sleep(self._fault.duration_s)
                self._cell.empty_pool(hog)

    def restore(self) -> None:
        """The fault was hit: wait until it is over, even if its message has just passed. Raises what went wrong."""
        if not self._fault.is_of_link and self._is_working.wait(END_TIMEOUT_S):
            self._work.join()
        if self.error is not None:
            raise self.error


def run_case(cell: Cell, references: References, fault: Fault, number: int, policy: str) -> Outcome:
    """Inject one fault and judge what happens."""
    outcome = Outcome(fault, policy)
    link, operator = cell.links[fault.where], Operator(cell, fault)
    lengths = [PROMPT_TOKENS[number % 3], PROMPT_TOKENS[(number + 1) % 3]]
    seeds = [1000 + 10 * number, NEIGHBOURS[number % 3]]
    for seed, length in zip(seeds, lengths, strict=True):
        references.answer(seed, length)
    link.arm(fault, None if fault.is_of_link else operator.hit)
    victim = operator.victim = Watched(cell.dispatcher, make_query(seeds[0], lengths[0]))
    neighbour = Watched(cell.dispatcher, make_query(seeds[1], lengths[1]))
    requests = [victim, neighbour]
    if fault.message in ("Cancel", "Failed"):
        _cancel_midway(cell, victim, fault)
    in_time = all(request.wait(END_TIMEOUT_S) for request in requests)
    if in_time and "Status" in fault.message:
        _wait(lambda: not link.is_armed, HIT_TIMEOUT_S)
    outcome.was_hit = not link.disarm()
    if outcome.was_hit:
        operator.restore()
    _judge_end(cell, references, outcome, [*zip(requests, seeds, lengths, strict=True)])
    _judge_recovery(cell, references, outcome)
    return outcome


def _cancel_midway(cell: Cell, victim: Watched, fault: Fault) -> None:
    """Messages of a cancellation pass the prefill instance while it has the prompt, decode instances at any time."""
    early = fault.where == "prefill" or fault.seed % 2 == 0
    with victim.changed:
        victim.changed.wait_for(lambda: victim.ends or (victim.num_layers if early else victim.told), END_TIMEOUT_S)
    cell.dispatcher.cancel(victim.request_id)


def _judge_end(cell: Cell, references: References, outcome: Outcome, requests: list[tuple[Watched, int, int]]) -> None:
    start_s = time.monotonic()
    for request, seed, length in requests:
        outcome.states.append(request.state)
        outcome.errors += [str(ended.error)[:200] for ended in request.ends if ended.error is not None]
        outcome.broken += broken_promises(request, references, seed, length)
    if not _wait(lambda: cell.is_empty, FREE_TIMEOUT_S):
        outcome.broken.append("everything freed")
    outcome.free_s = round(time.monotonic() - start_s, 3)
    seen, cell.digests.seen = cell.digests.seen, []
    outcome.num_prompts = len(seen)
    if not all(references.is_right(key, digest) for key, digest in seen):
        outcome.broken.append("KV bytes")
    try:
        cell.check()
    except HomkvError as error:
        outcome.broken.append(f"books: {error}")


def _judge_recovery(cell: Cell, references: References, outcome: Outcome) -> None:
    """A connection may still be found broken by the first request that uses it; one must be served in time."""
    start_s = time.monotonic()
    seed, length = NEIGHBOURS[0], PROMPT_TOKENS[0]
    state = "none"
    while state != "done" and time.monotonic() - start_s < RECOVERY_TIMEOUT_S:
        if not _wait(lambda: cell.is_connected, RECOVERY_TIMEOUT_S / 2):
            continue
        request = Watched(cell.dispatcher, make_query(seed, length))
        request.wait(END_TIMEOUT_S)
        outcome.broken += broken_promises(request, references, seed, length)
        state = request.state
    if state != "done":
        outcome.broken.append("serves again")
    outcome.recovery_s = round(time.monotonic() - start_s, 3)


def _wait(condition: Callable[[], bool], timeout_s: float) -> bool:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.01)
    return True


def run_plan(plan: list[Fault], num_cells: int = 4) -> Iterator[Outcome]:
    """Inject every fault of a plan, ``num_cells`` at a time, each into a service of its own; outcomes as they come.

    Half of the services fail requests whose instance failed, half recompute them. A service that broke a promise is
    replaced, so that the next fault meets a sound one.
    """
    loaded = tiny_model()
    references = References.of(loaded)
    todo, done = list(enumerate(plan)), list[Outcome]()
    lock, news = threading.Lock(), threading.Condition()

    def work(policy: Policy) -> None:
        cell = Cell(loaded, policy)
        try:
            while True:
                with lock:
                    if not todo:
                        return
                    number, fault = todo.pop(0)
                outcome = run_case(cell, references, fault, number, policy)
                with news:
                    done.append(outcome)
                    news.notify_all()
                if outcome.broken:
                    cell.close()
                    cell = Cell(loaded, policy)
        finally:
            cell.close()

    with references.cell, ThreadPoolExecutor(num_cells, thread_name_prefix="chaos") as pool:
        futures = [pool.submit(work, "recompute" if i % 2 else "fail") for i in range(num_cells)]
        for count in range(len(plan)):
            with news:
                while len(done) <= count and not all(future.done() for future in futures):
                    news.wait(0.5)
            for future in futures:
                if future.done():
                    future.result()
            if len(done) > count:
                yield done[count]
