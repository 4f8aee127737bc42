"""What is injected into which service."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from homkv.errors import UnsupportedError
from homkv.eval.chaos.service import Service
from homkv.testing.faults import Fault, Kind, combinations, random_plan

SERVICES: tuple[Service, ...] = get_args(Service)
OF_PROCESSES: tuple[Kind, ...] = ("kill", "stop", "restart", "clock_jump")  # real ones suffer them where there are any


@dataclass(frozen=True)
class Case:
    """A fault with its number in the plan, and the service that suffers it."""

    number: int
    fault: Fault
    service: Service


def make_cases(seed: int, count: int, kinds: Sequence[Kind] = (), services: Sequence[Service] = SERVICES) -> list[Case]:
    """``count`` faults that follow from ``seed``: every kind (of ``kinds``, if given) at every message, then again.

    Kills, stops, restarts and clock jumps go to processes, if these are among the ``services``; the other kinds to the
    others, in turns: every combination meets the first service before any meets the second. Raises UnsupportedError
    for words that do not exist.
    """
    unknown = [name for name in services if name not in SERVICES]
    if unknown or not services:
        raise UnsupportedError(f"expected services of {', '.join(SERVICES)}, found {', '.join(unknown) or 'none'}")
    others = [service for service in services if service != "processes"]
    plan, per_round = random_plan(seed, count, kinds), len(combinations(kinds))
    cases = []
    for number, fault in enumerate(plan):
        to_processes = "processes" in services and (fault.kind in OF_PROCESSES or not others)
        service: Service = "processes" if to_processes else others[number // per_round % len(others)]
        cases.append(Case(number, fault, service))
    return cases
