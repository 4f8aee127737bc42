"""What must hold for every request, whatever happens beside it."""

import threading
import time
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from homkv.eval.chaos.service import KV_CACHE_DTYPE, Cell
from homkv.serve.dispatch import Dispatcher
from homkv.serve.messages import Evidence, Progress, Token
from homkv.serve.query import Ended, Query
from homkv.testing.models import random_ids

NUM_NEW = 6
WRONG = ("KV bytes", "attention", "logits", "tokens")  # what an answer is compared by, from the finest
# Of the largest logit. Batches of another size round otherwise, and a code of a page sealed meanwhile may flip: up to
# 2.0e-2 was seen without any fault. What is finer than this is seen in the KV bytes, which are compared exactly.
LOGIT_ERROR = 5e-2


@dataclass(frozen=True)
class Told:
    """A token as its owner was told it."""

    index: int
    token: int
    logits: NDArray[np.float32] | None  # [V]; None for the first one of an attempt
    evidence: Evidence | None  # of the prompt's KV, with the first one
    attempt: int


def make_query(seed: int, num_tokens: int, start: int = 0, kv_cache_dtype: str = KV_CACHE_DTYPE) -> Query:
    """A teacher-forced request that follows from ``seed``, with the first ``start`` answers as part of its prompt."""
    ids, forced = random_ids(num_tokens, seed), random_ids(NUM_NEW, seed + 1)
    return Query(
        ids + forced[:start],
        kv_cache_dtype,
        NUM_NEW - start,
        forced_ids=forced[start:],
        return_logits=True,
        return_evidence=True,
        report_progress=True,
    )


class Watched:
    """A request and everything that its owner was told. ``on_event`` is called in the dispatcher's thread."""

    def __init__(self, dispatcher: Dispatcher, query: Query) -> None:
        self._dispatcher = dispatcher
        self.told: list[Told] = []
        self.num_layers = 0  # of progress
        self.ends: list[Ended] = []
        self.num_late = 0  # events behind the end
        self.pause_s = 0.0  # before the next token is taken
        self.changed = threading.Condition()
        self.request_id = dispatcher.submit(query, self._take)

    def _take(self, event: Progress | Token | Ended) -> None:
        pause_s, self.pause_s = self.pause_s, 0.0
        time.sleep(pause_s)
        with self.changed:
            self.num_late += bool(self.ends)
            if isinstance(event, Ended):
                self.ends.append(event)
            elif isinstance(event, Token):
                logits = None if event.logits is None else np.frombuffer(event.logits, np.float32)
                record = self._dispatcher.records.get(self.request_id)
                attempt = record.num_attempts if record is not None else 1
                self.told.append(Told(event.index, event.choice.token, logits, event.evidence, attempt))
            else:
                self.num_layers += 1
            self.changed.notify_all()

    def wait(self, timeout_s: float) -> bool:
        """Whether it ended in time."""
        with self.changed:
            return self.changed.wait_for(lambda: bool(self.ends), timeout_s)

    @property
    def state(self) -> str:
        """How it ended; "open" if it has not."""
        return str(self.ends[0].record.state) if self.ends else "open"


@dataclass
class References:
    """Answers without faults, from a service of their own, made when they are asked for. Any thread."""

    cell: Cell
    _answers: dict[tuple[int, int, int], list[Told]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def answer(self, seed: int, num_tokens: int, start: int = 0) -> list[Told]:
        """What :func:`make_query` of these arguments is told. Raises AssertionError if that fails without a fault."""
        with self._lock:
            key = (seed, num_tokens, start)
            if key not in self._answers:
                watched = Watched(self.cell.dispatcher, make_query(*key))
                assert watched.wait(10 * self.cell.subject.request_timeout_s), "expected an answer, found none"
                assert watched.state == "done", watched.ends[0].error
                self._answers[key] = watched.told
            return self._answers[key]


def broken_promises(watched: Watched, references: References, seed: int, num_tokens: int) -> list[str]:
    """Names of the invariants that a request broke: how it ended, and what it was told."""
    broken = []
    if len(watched.ends) != 1:
        broken.append("ends once" if watched.ends else "ends")
    if watched.num_late:
        broken.append("silent after its end")
    if watched.state in ("failed", "cancelled") and watched.ends[0].error is None:
        broken.append("says why")
    if watched.state == "done" and len(watched.told) != NUM_NEW:
        broken.append("complete")
    if [told.index for told in watched.told] != list(range(len(watched.told))):
        return [*broken, "tokens in order"]
    return broken + sorted(_wrong(watched, references, seed, num_tokens))


def _wrong(watched: Watched, references: References, seed: int, num_tokens: int) -> set[str]:
    """Each attempt against a fault-free run that begins where it began. Tokens of failed requests count as well."""
    wrong: set[str] = set()
    start = attempt = 0
    for told in watched.told:
        if told.attempt != attempt:
            attempt, start = told.attempt, told.index
        wrong |= differences(told, references.answer(seed, num_tokens, start)[told.index - start])
    return wrong


def differences(found: Told, expected: Told) -> set[str]:
    """What differs, by :data:`WRONG`: bytes and attention exactly, logits beyond :data:`LOGIT_ERROR`."""
    ours, theirs = found.evidence, expected.evidence
    if (ours is None) != (theirs is None):
        return {"KV bytes"}
    wrong = set()
    if ours is not None and theirs is not None:
        wrong = {n for n, a, b in zip(WRONG, _parts(ours), _parts(theirs), strict=False) if a != b}
    if not _close(found.logits, expected.logits):
        wrong.add("logits")
    if found.token != expected.token:
        wrong.add("tokens")
    return wrong


def _parts(evidence: Evidence) -> tuple[bytes, bytes]:
    return evidence.kv, evidence.attention


def _close(found: NDArray[np.float32] | None, expected: NDArray[np.float32] | None) -> bool:
    if found is None or expected is None:
        return found is expected
    return bool(np.abs(found - expected).max() <= LOGIT_ERROR * np.abs(expected).max())
