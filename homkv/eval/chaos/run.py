"""One fault after another, each against two requests in flight, and a clean request behind each."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace

from homkv.errors import HomkvError
from homkv.eval.chaos.cases import Case
from homkv.eval.chaos.judge import WRONG, References, Watched, broken_promises, make_query
from homkv.eval.chaos.operator import Operator
from homkv.eval.chaos.processes import ProcessCell
from homkv.eval.chaos.record import Outcome
from homkv.eval.chaos.service import Cell, Service, Subject
from homkv.eval.chaos.threads import ThreadCell
from homkv.serve.query import Policy

FREE_TIMEOUT_S = 10.0  # after its end, everything it held is free
RECOVERY_TIMEOUT_S = 40.0  # and by then, a clean request is served
HIT_TIMEOUT_S = 1.5  # for messages that come by the clock
ERROR_LENGTH = 60  # what is kept of an error's text
LONGEST_PROMPT = 300
MORE_PATIENT = 1.5  # than the clean request that took longer than expected
UNHURRIED = 40  # times the patience of what is harmed: nothing may end an undisturbed request
NEIGHBOURS = (11, 22, 33)  # prompts that come again and again: their pages are shared
PROMPT_TOKENS = (150, 200, LONGEST_PROMPT)
POLICIES: tuple[Policy, Policy] = ("fail", "recompute")
Asked = list[tuple[Watched, int, int]]  # requests with their seeds and prompt lengths


def run_case(cell: Cell, references: References, case: Case, policy: Policy) -> Outcome:
    """Inject one fault and judge what happens."""
    fault, number, outcome = case.fault, case.number, Outcome(case.number, case.service, case.fault, policy)
    outcome.patience = cell.subject.patience
    link, operator = cell.links[fault.where], Operator(cell, fault)
    lengths = [PROMPT_TOKENS[number % 3], PROMPT_TOKENS[(number + 1) % 3]]
    seeds = [1000 + 10 * number, NEIGHBOURS[number % 3]]
    for seed, length in zip(seeds, lengths, strict=True):
        references.answer(seed, length)
    before, end_timeout_s = cell.noticed(), 2 * cell.request_timeout_s
    link.arm(fault, None if fault.is_of_link else operator.hit)
    victim = operator.victim = Watched(cell.dispatcher, make_query(seeds[0], lengths[0]))
    neighbour = Watched(cell.dispatcher, make_query(seeds[1], lengths[1]))
    requests = [victim, neighbour]
    if fault.message in ("Cancel", "Failed"):
        _cancel_midway(cell, victim, case, end_timeout_s)
    in_time = all(request.wait(end_timeout_s) for request in requests)
    if in_time and "Status" in fault.message:
        _wait(lambda: not link.is_armed, HIT_TIMEOUT_S * cell.subject.patience)
    outcome.passed_by = link.disarm()
    if not outcome.passed_by:
        operator.restore(end_timeout_s)
    _judge_end(cell, references, outcome, [*zip(requests, seeds, lengths, strict=True)])
    outcome.noticed = sorted(name for name, count in (cell.noticed() - before).items() if count)
    _judge_recovery(cell, references, outcome)
    return outcome


def _cancel_midway(cell: Cell, victim: Watched, case: Case, timeout_s: float) -> None:
    """Messages of a cancellation pass the prefill instance while it has the prompt, decode instances at any time."""
    early = case.fault.where == "prefill" or case.fault.seed % 2 == 0
    with victim.changed:
        victim.changed.wait_for(lambda: victim.ends or (victim.num_layers if early else victim.told), timeout_s)
    cell.dispatcher.cancel(victim.request_id)


def _judge_end(cell: Cell, references: References, outcome: Outcome, requests: Asked) -> None:
    start_s = time.monotonic()
    for request, seed, length in requests:
        broken = broken_promises(request, references, seed, length)
        outcome.broken += broken
        outcome.states.append(request.state)
        outcome.num_wrong += bool(set(broken) & set(WRONG))
        outcome.num_tokens += len(request.told)
        told = (
            str(ended.error).removeprefix("expected ")[:ERROR_LENGTH]
            for ended in request.ends
            if ended.error is not None
        )
        outcome.errors += [text for text in told if text not in outcome.errors]
    if not _wait(lambda: not cell.held(), FREE_TIMEOUT_S * cell.subject.patience):
        held = cell.held()
        outcome.broken.append(f"everything freed, not {held}")
        outcome.leaked_blocks = int(held.get("blocks", 0))
    outcome.free_s = round(time.monotonic() - start_s, 3)
    try:
        cell.check()
    except HomkvError as error:
        outcome.broken.append(f"books: {error}")


def _judge_recovery(cell: Cell, references: References, outcome: Outcome) -> None:
    """A connection may still be found broken by the first request that uses it; one must be served in time."""
    start_s, timeout_s = time.monotonic(), RECOVERY_TIMEOUT_S * cell.subject.patience
    seed, length = NEIGHBOURS[0], PROMPT_TOKENS[0]
    state = "none"
    while state != "done" and time.monotonic() - start_s < timeout_s:
        if not _wait(lambda: cell.is_connected, timeout_s / 2):
            continue
        asked_s = time.monotonic()
        request = Watched(cell.dispatcher, make_query(seed, length))
        request.wait(2 * cell.request_timeout_s)
        outcome.clean_s = round(time.monotonic() - asked_s, 3)
        broken = broken_promises(request, references, seed, length)
        outcome.broken += broken
        outcome.num_wrong += bool(set(broken) & set(WRONG))
        state = request.state
    if state != "done":
        outcome.broken.append("serves again")
    outcome.recovery_s = round(time.monotonic() - start_s, 3)


def measure_clean_s(subject: Subject) -> float:
    """How long an undisturbed request takes on this machine as it is now."""
    unhurried = replace(subject, patience=UNHURRIED * subject.patience)
    with ThreadCell(unhurried, with_keys=True) as cell:
        for _ in range(2):  # the first one warms up
            start_s = time.monotonic()
            watched = Watched(cell.dispatcher, make_query(NEIGHBOURS[0], LONGEST_PROMPT))
            assert watched.wait(2 * cell.request_timeout_s), "expected an answer, found none"
        return time.monotonic() - start_s


def _wait(condition: Callable[[], bool], timeout_s: float) -> bool:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.02)
    return True


def make_cell(service: Service, subject: Subject, policy: Policy) -> Cell:
    """Start a service to be harmed."""
    if service == "processes":
        return ProcessCell(subject, policy)
    return ThreadCell(subject, policy, with_keys=service == "keys")


class Workers:
    """One worker for each service and policy, each with a service of its own. Iterate over the outcomes.

    A service that broke a promise is replaced, so that the next fault meets a sound one, and one that the machine has
    become too slow for by a more patient one. Whoever stops to iterate ends the run behind the faults under way.
    """

    def __init__(self, cases: Iterable[Case], subject: Subject) -> None:
        self._subject = subject
        self._todo: dict[Service, list[Case]] = {}
        for case in cases:
            self._todo.setdefault(case.service, []).append(case)
        self._done: list[Outcome] = []
        self._news, self._stop = threading.Condition(), threading.Event()

    def __iter__(self) -> Iterator[Outcome]:
        with ExitStack() as stack:
            self._subject = self._subject.patient(measure_clean_s(self._subject))
            # Nothing harms this service, and a machine that is busy with the others must not either.
            unhurried = replace(self._subject, patience=UNHURRIED * self._subject.patience)
            references = References(stack.enter_context(ThreadCell(unhurried, is_slow=False)))
            kinds = [(service, policy) for service in self._todo for policy in POLICIES]
            pool = stack.enter_context(ThreadPoolExecutor(len(kinds) or 1, thread_name_prefix="chaos"))
            stack.callback(self._stop.set)
            futures = [pool.submit(self._work, references, *kind) for kind in kinds]
            while not all(future.done() for future in futures) or self._done:
                with self._news:
                    self._news.wait_for(lambda: bool(self._done), 0.5)
                    done, self._done = self._done, []
                yield from done
                for future in futures:
                    if future.done():
                        future.result()

    def _next(self, service: Service) -> Case | None:
        with self._news:
            left = self._todo[service]
            return left.pop(0) if left and not self._stop.is_set() else None

    def _work(self, references: References, service: Service, policy: Policy) -> None:
        cell: Cell | None = None
        subject = self._subject
        try:
            while (case := self._next(service)) is not None:
                cell = cell or make_cell(service, subject, policy)
                outcome = run_case(cell, references, case, policy)
                with self._news:
                    self._done.append(outcome)
                    self._news.notify_all()
                if outcome.broken or outcome.clean_s > subject.patience:
                    subject = subject.patient(MORE_PATIENT * outcome.clean_s)
                    cell.close()
                    cell = None
        finally:
            if cell is not None:
                cell.close()
