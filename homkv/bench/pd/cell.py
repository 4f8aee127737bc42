"""One cell: send its requests at their times, follow them through the workers, account for every second."""

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from homkv.bench.pd.messages import Cell, Close, Closed, Compute, Finished, Granted, Open, Opened, Prefilled, Reserve
from homkv.bench.pd.pool import CellError, Pool
from homkv.sim.record import RequestRecord
from homkv.sim.trace import Request

LEAD_S = 0.05  # between the last preparation and the first arrival


@dataclass
class Life:
    """A request and what was said about it; moments of the host's monotonic clock."""

    request: Request
    arrival_s: float
    decode_rank: int = -1
    prefill_rank: int = -1
    prefilled: Prefilled | None = None
    finished: Finished | None = None


@dataclass(frozen=True)
class Outcome:
    """A cell's requests in the order of their arrival, and its workers' last words by rank."""

    lives: list[Life]
    opened: dict[int, Opened]
    closed: dict[int, Closed]
    seconds: float

    def records(self, run_id: str, kv_bytes: Callable[[int], int]) -> list[RequestRecord]:
        """As homkv.sim.record has them."""
        return [record(run_id, life, kv_bytes) for life in self.lives]


def record(run_id: str, life: Life, kv_bytes: Callable[[int], int]) -> RequestRecord:
    """One finished request, its phases in order; what overlaps with prefill belongs to prefill."""
    assert life.prefilled is not None
    assert life.finished is not None
    p, f, request = life.prefilled, life.finished, life.request
    moments = [life.arrival_s, p.start_s, p.computed_s, p.computed_s, p.sent_s, f.arrived_s, f.first_token_s, f.done_s]
    for i in range(1, len(moments)):
        moments[i] = max(moments[i], moments[i - 1])
    queue, prefill, pack, transfer, unpack, wait, decode = (
        after - before for before, after in itertools.pairwise(moments)
    )
    return RequestRecord(
        run_id=run_id,
        request_id=request.request_id,
        arrival_s=request.arrival_s,
        prompt_tokens=request.prompt_tokens,
        output_tokens=request.output_tokens,
        queue_s=queue,
        prefill_s=prefill,
        pack_s=pack,
        transfer_s=transfer,
        unpack_s=unpack,
        wait_s=wait,
        decode_s=decode,
        ttft_s=f.first_token_s - life.arrival_s,
        tpot_s=decode / max(request.output_tokens - 1, 1),
        jct_s=f.done_s - life.arrival_s,
        wire_bytes=p.link_bytes,
        kv_bytes=kv_bytes(request.prompt_tokens + request.output_tokens - 1),
        prefill_id=life.prefill_rank,
        decode_id=life.decode_rank,
    )


@dataclass
class Router:
    """Who has how much to do: each request goes to the decode worker, then to the prefill worker with least tokens."""

    pool: Pool
    load: dict[int, int] = field(default_factory=dict)

    def pick(self, ranks: Sequence[int], tokens: int) -> int:
        """The least loaded of some workers, which now has so many tokens more."""
        rank = min(ranks, key=lambda r: self.load.get(r, 0))
        self.load[rank] = self.load.get(rank, 0) + tokens
        return rank

    def done(self, rank: int, tokens: int) -> None:
        """Take tokens off a worker."""
        self.load[rank] -= tokens


class CellRun:
    """The coordinator of one cell."""

    def __init__(self, pool: Pool, requests: Sequence[Request], deadline_s: float) -> None:
        self._pool, self._router, self._deadline_s = pool, Router(pool), deadline_s
        start_s = time.monotonic() + LEAD_S
        self.lives = [Life(r, start_s + r.arrival_s) for r in requests]
        self._num_sent = self._num_done = 0

    def run(self, on_done: Callable[[], None]) -> None:
        """Until every request has all its tokens. Raises CellError."""
        while self._num_done < len(self.lives):
            self._send_due()
            waiting = self.lives[self._num_sent :]
            event = self._pool.receive(min([self._deadline_s, *(life.arrival_s for life in waiting[:1])]))
            if event is not None:
                before = self._num_done
                self._take(event[1])
                if self._num_done > before:
                    on_done()
            elif time.monotonic() >= self._deadline_s:
                raise CellError(
                    f"expected {len(self.lives)} requests done in time, found {self._num_done}; allow more time"
                )

    def _send_due(self) -> None:
        while self._num_sent < len(self.lives) and self.lives[self._num_sent].arrival_s <= time.monotonic():
            life, index = self.lives[self._num_sent], self._num_sent
            request = life.request
            life.decode_rank = self._router.pick(self._pool.decode_ranks, request.prompt_tokens)
            order = Reserve(index, request.prompt_tokens, request.output_tokens)
            self._pool.send([life.decode_rank], order)
            self._num_sent += 1

    def _take(self, message: object) -> None:
        match message:
            case Granted():
                life = self.lives[message.request]
                tokens = life.request.prompt_tokens
                life.prefill_rank = self._router.pick(self._pool.prefill_ranks, tokens)
                target = life.decode_rank - self._pool.num_prefill
                self._pool.send([life.prefill_rank], Compute(message.request, tokens, target))
            case Prefilled():
                life = self.lives[message.request]
                life.prefilled = message
                self._router.done(life.prefill_rank, life.request.prompt_tokens)
                self._num_done += life.finished is not None
            case Finished():
                life = self.lives[message.request]
                life.finished = message
                self._router.done(life.decode_rank, life.request.prompt_tokens)
                self._num_done += life.prefilled is not None


def run_cell(
    pool: Pool, cell: Cell, requests: Sequence[Request], deadline_s: float, on_done: Callable[[], None] = lambda: None
) -> Outcome:
    """Measure a cell on running workers. Raises CellError; the pool is of no use then."""
    everyone = [*pool.prefill_ranks, *pool.decode_ranks]
    opened: dict[int, Opened] = {}
    for ranks in pool.apart():  # steps are timed meanwhile: on a shared device one worker after the other
        pool.send(ranks, Open(cell))
        opened |= pool.gather(Opened, ranks, deadline_s)
    run = CellRun(pool, requests, deadline_s)
    start_s = time.monotonic()
    run.run(on_done)
    seconds = time.monotonic() - start_s
    pool.send(everyone, Close())
    return Outcome(run.lives, opened, pool.gather(Closed, everyone, deadline_s), seconds)
