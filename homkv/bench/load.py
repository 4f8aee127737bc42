"""Load on a running service: streams over the OpenAI API, and what it costs the service meanwhile."""

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

import httpx
import numpy as np

from homkv.bench.arrivals import Ask, LoadOptions, asks
from homkv.bench.soak import Growth, Sample, growth, left_behind, take_sample
from homkv.errors import TransferError

PERCENTILES = (50, 90, 99)
SETTLE_S = 3.0  # after the last stream: instances report once a second


@dataclass
class Stream:
    """One answer. Times in seconds; ``error`` is None for a whole one."""

    ttft_s: float = 0.0
    e2el_s: float = 0.0
    num_tokens: int = 0
    num_prompt_tokens: int = 0
    error: str | None = None

    @property
    def tpot_s(self) -> float:
        """Mean time per token behind the first."""
        return (self.e2el_s - self.ttft_s) / max(self.num_tokens - 1, 1)


@dataclass
class LoadResult:
    """What a run measured. ``samples``: the service's resources, before, between and after."""

    options: LoadOptions
    wall_s: float
    streams: list[Stream]
    max_open: int  # streams at a time
    samples: list[Sample] = field(default_factory=list)
    late_s: float = 0.0  # most that a request was sent behind its time

    @property
    def done(self) -> list[Stream]:
        """Answers that came whole."""
        return [s for s in self.streams if s.error is None]

    @property
    def errors(self) -> Counter[str]:
        """Why the others did not."""
        return Counter(s.error for s in self.streams if s.error is not None)

    def latencies(self) -> dict[str, dict[str, float]]:
        """Mean and percentiles in seconds of TTFT, TPOT and E2EL."""
        values = {
            "ttft_s": [s.ttft_s for s in self.done],
            "tpot_s": [s.tpot_s for s in self.done],
            "e2el_s": [s.e2el_s for s in self.done],
        }
        return {name: _summary(seconds) for name, seconds in values.items()}

    @property
    def tokens_per_s(self) -> float:
        """New tokens of whole answers per second of the run."""
        return sum(s.num_tokens for s in self.done) / self.wall_s

    def growth(self) -> list[Growth]:
        """Of memory and open files, over the second half; of runs with a duration, since others fill what is empty."""
        return [] if self.options.duration_s is None else growth(self.samples)

    def left_behind(self) -> dict[str, float]:
        """What the service still holds although nothing runs."""
        return left_behind(self.samples)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, without the key, and of the samples only the first and the last."""
        options = asdict(self.options)
        del options["api_key"]
        options["trace"] = None if self.options.trace is None else self.options.trace.name
        return {
            "kind": "serve-load",
            "options": options,
            "wall_s": self.wall_s,
            "num_done": len(self.done),
            "errors": dict(self.errors),
            "max_open": self.max_open,
            "late_s": self.late_s,
            "prompt_tokens": sum(s.num_prompt_tokens for s in self.done),
            "new_tokens": sum(s.num_tokens for s in self.done),
            "tokens_per_s": self.tokens_per_s,
            "latencies": self.latencies(),
            "before": self.samples[0].values if self.samples else {},
            "after": self.samples[-1].values if self.samples else {},
            "growth": [asdict(g) for g in self.growth()],
            "left_behind": self.left_behind(),
        }


def _summary(seconds: Sequence[float]) -> dict[str, float]:
    if not seconds:
        return {}
    percentiles = np.percentile(seconds, PERCENTILES).tolist()
    return {"mean": float(np.mean(seconds))} | {f"p{p}": v for p, v in zip(PERCENTILES, percentiles, strict=True)}


class Load:
    """One run against a service. ``on_end`` is called for every stream that ended, ``on_sample`` for every sample."""

    def __init__(
        self,
        options: LoadOptions,
        on_end: Callable[[Stream], None] = lambda stream: None,
        on_sample: Callable[[Sample], None] = lambda sample: None,
    ) -> None:
        self._options, self._on_end, self._on_sample = options, on_end, on_sample
        self._streams: list[Stream] = []
        self._samples: list[Sample] = []
        self._num_open = self._max_open = 0
        self._late_s = 0.0

    def run(self) -> LoadResult:
        """Send everything and wait for every end.

        Raises TransferError if the service cannot be reached at all, TraceError for a trace that cannot be read.
        """
        return asyncio.run(self._run(asks(self._options)))

    async def _run(self, todo: Iterator[Ask]) -> LoadResult:
        o = self._options
        headers = {} if o.api_key is None else {"authorization": f"Bearer {o.api_key}"}
        # Servers close idle connections, vLLM's after 5 s: a request sent at that moment would count as an error.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=1)
        async with httpx.AsyncClient(base_url=o.url, timeout=o.timeout_s, limits=limits, headers=headers) as client:
            try:
                self._model = (await client.get("/v1/models")).raise_for_status().json()["data"][0]["id"]
            except (httpx.HTTPError, KeyError, ValueError) as error:
                raise TransferError(f"expected a service at {o.url}, found {error!r}; start `homkv serve`") from error
            self._start_s = time.monotonic()
            await self._sample(client)
            watching = asyncio.create_task(self._watch(client))
            await (self._open(client, todo) if o.is_open else self._closed(client, todo))
            wall_s = time.monotonic() - self._start_s
            watching.cancel()
            with suppress(asyncio.CancelledError):
                await watching
            await asyncio.sleep(SETTLE_S)
            await self._sample(client)
        return LoadResult(o, wall_s, self._streams, self._max_open, self._samples, self._late_s)

    async def _watch(self, client: httpx.AsyncClient) -> None:
        while self._options.sample_s is not None:
            await asyncio.sleep(self._options.sample_s)
            await self._sample(client)

    async def _sample(self, client: httpx.AsyncClient) -> None:
        ended = {"streams_done": len(self._streams), "streams_failed": sum(s.error is not None for s in self._streams)}
        sample = await take_sample(client, time.monotonic() - self._start_s, ended)
        self._samples.append(sample)
        self._on_sample(sample)

    @property
    def _is_over(self) -> bool:
        limit_s = self._options.duration_s
        return limit_s is not None and time.monotonic() - self._start_s >= limit_s

    async def _closed(self, client: httpx.AsyncClient, todo: Iterator[Ask]) -> None:
        async def worker() -> None:
            while not self._is_over and (ask := next(todo, None)) is not None:
                await self._stream(client, ask)

        await asyncio.gather(*(worker() for _ in range(self._options.concurrency)))

    async def _open(self, client: httpx.AsyncClient, todo: Iterator[Ask]) -> None:
        async with asyncio.TaskGroup() as group:
            for ask in todo:
                late_s = time.monotonic() - self._start_s - ask.at_s
                await asyncio.sleep(max(-late_s, 0.0))
                if self._is_over:
                    return
                self._late_s = max(self._late_s, late_s)
                group.create_task(self._stream(client, ask))

    async def _stream(self, client: httpx.AsyncClient, ask: Ask) -> None:
        """One request from its sending to its end, whatever that is."""
        stream, start_s = Stream(), time.monotonic()
        self._num_open += 1
        self._max_open = max(self._max_open, self._num_open)
        try:
            await self._read(client, ask, stream, start_s)
        except httpx.HTTPError as error:
            stream.error = type(error).__name__
        self._num_open -= 1
        stream.e2el_s = time.monotonic() - start_s
        self._streams.append(stream)
        self._on_end(stream)

    async def _read(self, client: httpx.AsyncClient, ask: Ask, stream: Stream, start_s: float) -> None:
        async with client.stream("POST", "/v1/completions", json=self._body(ask)) as response:
            if response.status_code != 200:
                stream.error = f"HTTP {response.status_code}"
                return
            finish = None
            async for line in response.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    stream.error = str(event["error"]["type"])
                    return
                stream.ttft_s = stream.ttft_s or time.monotonic() - start_s
                for choice in event["choices"]:
                    finish = choice["finish_reason"] or finish
                if event.get("usage"):
                    stream.num_tokens = event["usage"]["completion_tokens"]
                    stream.num_prompt_tokens = event["usage"]["prompt_tokens"]
            if finish is None or stream.num_tokens != ask.max_tokens:
                stream.error = "cut short"

    def _body(self, ask: Ask) -> dict[str, Any]:
        return {
            "model": self._model,
            "prompt": ask.prompt,
            "max_tokens": ask.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
