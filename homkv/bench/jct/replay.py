"""Replays on this machine: two processes, a real model, a shaped link, the same requests for every format."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from homkv.errors import TransferError
from homkv.serve.client import Answer, Client, Query
from homkv.serve.spawn import LocalCluster
from homkv.sim.record import RequestRecord
from homkv.sim.trace import Request

LEAD_S = 0.1  # between the last preparation and the first arrival
SAMPLE_S = 0.05  # between looks at a process's memory
PAGE_BYTES = 4096


@dataclass(frozen=True)
class Prompt:
    """A request in tokens. What it is answered is given, so that every format does the same work."""

    ids: list[int]
    answer_ids: list[int]

    def query(self, kv_cache_dtype: str) -> Query:
        """As an order to the instances."""
        return Query(self.ids, kv_cache_dtype, len(self.answer_ids), forced_ids=self.answer_ids)


def cut_prompts(ids: Sequence[int], requests: Sequence[Request]) -> list[Prompt]:
    """Prompts and answers from one long text, each from another place. Raises TransferError for a text too short."""
    out, at = [], 0
    for request in requests:
        middle, end = at + request.prompt_tokens, at + request.prompt_tokens + request.output_tokens
        if end > len(ids):
            raise TransferError(f"expected a text of at least {end} tokens, found {len(ids)}; ask for fewer requests")
        out.append(Prompt(list(ids[at:middle]), list(ids[middle:end])))
        at = end
    return out


@dataclass(frozen=True)
class Finished:
    """A request and its answer; ``arrival_s`` is of the host's monotonic clock."""

    request: Request
    arrival_s: float
    answer: Answer

    def record(self, run_id: str) -> RequestRecord:
        """As homkv.sim.record has it."""
        request, answer = self.request, self.answer
        assert answer.prefill is not None
        assert answer.decode is not None
        late_s = max(answer.submitted_s - self.arrival_s, 0.0)
        phases, decode_s, overhead_s = (
            answer.phases_s(),
            answer.arrived_s[-1] - answer.arrived_s[0],
            answer.decode.overhead_s,
        )
        return RequestRecord(
            run_id=run_id,
            request_id=request.request_id,
            arrival_s=request.arrival_s,
            prompt_tokens=request.prompt_tokens,
            output_tokens=request.output_tokens,
            queue_s=phases["queue"] + late_s,
            prefill_s=phases["prefill"],
            pack_s=phases["pack"],
            transfer_s=phases["send"],
            unpack_s=phases["verify"],
            wait_s=phases["first_token"],
            decode_s=decode_s,
            dequantize_s=None if overhead_s is None else min(overhead_s, decode_s),
            ttft_s=answer.ttft_s + late_s,
            tpot_s=answer.tpot_s,
            jct_s=answer.arrived_s[-1] - answer.submitted_s + late_s,
            wire_bytes=answer.prefill.wire_bytes,
            kv_bytes=answer.kv_bytes,
        )


class Clients:
    """Connections to a pair of instances, one per request that may be under way."""

    def __init__(self, cluster: LocalCluster, count: int) -> None:
        self._free: list[Client] = []
        self._lock = threading.Lock()
        self._all = []
        try:
            for _ in range(count):
                self._all.append(
                    Client(cluster.addresses("prefill")[0], cluster.addresses("decode")[0], cluster.security)
                )
        except BaseException:
            self.close()
            raise
        self._free = list(self._all)

    @contextmanager
    def one(self) -> Iterator[Client]:
        """A client that nobody else uses. There are as many as requests."""
        with self._lock:
            client = self._free.pop()
        try:
            yield client
        finally:
            with self._lock:
                self._free.append(client)

    def close(self) -> None:
        """Close all connections."""
        for client in self._all:
            client.close()


def replay(
    clients: Clients,
    requests: Sequence[Request],
    prompts: Sequence[Prompt],
    kv_cache_dtype: str,
    *,
    timeout_s: float,
    on_done: Callable[[], None] = lambda: None,
) -> list[Finished]:
    """Send every request at its time and wait for all. Raises what the first failed request raised."""
    start_s = time.monotonic() + LEAD_S - min(r.arrival_s for r in requests)  # the first one comes at once

    def run(request: Request, prompt: Prompt) -> Finished:
        arrival_s = start_s + request.arrival_s
        time.sleep(max(arrival_s - time.monotonic(), 0.0))
        with clients.one() as client:
            answer = client.generate(prompt.query(kv_cache_dtype), timeout_s=timeout_s)
        on_done()
        return Finished(request, arrival_s, answer)

    with ThreadPoolExecutor(len(requests), thread_name_prefix="request") as pool:
        jobs = [pool.submit(run, request, prompt) for request, prompt in zip(requests, prompts, strict=True)]
        return [job.result() for job in jobs]


def peak_kv_bytes(finished: Sequence[Finished]) -> int:
    """The most KV that the decode instance held at once, each request counted with all its tokens."""
    events: list[tuple[float, int]] = []
    for f in finished:
        events += [(f.answer.arrived_s[0], f.answer.kv_bytes), (f.answer.arrived_s[-1], -f.answer.kv_bytes)]
    held = peak = 0
    for _, change in sorted(events):
        held += change
        peak = max(peak, held)
    return peak


class MemoryWatch:
    """Resident memory of a process of this machine, sampled; use as a context manager. 0 where /proc is not there."""

    def __init__(self, pid: int) -> None:
        self._statm, self.peak_bytes = Path(f"/proc/{pid}/statm"), 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while not self._stop.wait(SAMPLE_S) and self._statm.exists():
            self.peak_bytes = max(self.peak_bytes, int(self._statm.read_text().split()[1]) * PAGE_BYTES)

    def __enter__(self) -> "MemoryWatch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
