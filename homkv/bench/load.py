"""Load on a running service: streams over the OpenAI API, at a fixed concurrency or at random times."""

import asyncio
import json
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import httpx
import numpy as np

from homkv.errors import ShapeError, TransferError

PERCENTILES = (50, 90, 99)
RESOURCES = ("blocks_free", "peak_rss_bytes", "prefix_pages_held")
_GAUGE = re.compile(r'^homkv_instance\{instance="([^"]+)",name="([^"]+)"\} (\S+)$', re.MULTILINE)


@dataclass(frozen=True)
class LoadOptions:
    """What is sent. ``rate``: requests per second, Poisson; None: ``concurrency`` streams, each followed by the next.

    ``minutes``: go on for so long instead of ``num_requests``. Every prompt has its own words, unless ``shared_words``
    of its beginning are the same for all.
    """

    url: str
    num_requests: int = 200
    concurrency: int = 200
    rate: float | None = None
    minutes: float | None = None
    prompt_words: int = 60
    shared_words: int = 0
    max_tokens: int = 64
    api_key: str | None = None
    seed: int = 0
    timeout_s: float = 1800.0

    def __post_init__(self) -> None:
        for name in ("num_requests", "concurrency", "prompt_words", "max_tokens", "timeout_s"):
            if not getattr(self, name) > 0:
                raise ShapeError(f"expected a positive {name}, found {getattr(self, name)}")
        if self.rate is not None and not self.rate > 0:
            raise ShapeError(f"expected a positive rate, found {self.rate}; leave it out for a fixed concurrency")
        if not 0 <= self.shared_words <= self.prompt_words:
            raise ShapeError(f"expected 0 to {self.prompt_words} shared words, found {self.shared_words}")


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
    """What a run measured; ``before`` and ``after``: what instances said of their resources."""

    options: LoadOptions
    wall_s: float
    streams: list[Stream]
    max_open: int  # streams at a time
    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)

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

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, without the key."""
        options = asdict(self.options)
        del options["api_key"]
        return {
            "kind": "serve-load",
            "options": options,
            "wall_s": self.wall_s,
            "num_done": len(self.done),
            "errors": dict(self.errors),
            "max_open": self.max_open,
            "prompt_tokens": sum(s.num_prompt_tokens for s in self.done),
            "new_tokens": sum(s.num_tokens for s in self.done),
            "tokens_per_s": self.tokens_per_s,
            "latencies": self.latencies(),
            "before": self.before,
            "after": self.after,
        }


def _summary(seconds: Sequence[float]) -> dict[str, float]:
    if not seconds:
        return {}
    percentiles = np.percentile(seconds, PERCENTILES).tolist()
    return {"mean": float(np.mean(seconds))} | {f"p{p}": v for p, v in zip(PERCENTILES, percentiles, strict=True)}


class Load:
    """One run against a service. ``on_end`` is called for every stream that ended."""

    def __init__(self, options: LoadOptions, on_end: Callable[[Stream], None] = lambda stream: None) -> None:
        self._options, self._on_end = options, on_end
        self._streams: list[Stream] = []
        self._num_begun = self._num_open = self._max_open = 0

    def run(self) -> LoadResult:
        """Send everything and wait for every end. Raises TransferError if the service cannot be reached at all."""
        return asyncio.run(self._run())

    async def _run(self) -> LoadResult:
        o = self._options
        headers = {} if o.api_key is None else {"authorization": f"Bearer {o.api_key}"}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        async with httpx.AsyncClient(base_url=o.url, timeout=o.timeout_s, limits=limits, headers=headers) as client:
            try:
                self._model = (await client.get("/v1/models")).raise_for_status().json()["data"][0]["id"]
            except (httpx.HTTPError, KeyError, ValueError) as error:
                raise TransferError(f"expected a service at {o.url}, found {error!r}; start `homkv serve`") from error
            before, start_s = await _resources(client), time.monotonic()
            await (self._closed(client, start_s) if o.rate is None else self._poisson(client, start_s))
            wall_s = time.monotonic() - start_s
            return LoadResult(o, wall_s, self._streams, self._max_open, before, await _resources(client))

    def _goes_on(self, start_s: float) -> bool:
        o = self._options
        if o.minutes is not None:
            return time.monotonic() - start_s < 60 * o.minutes
        return self._num_begun < o.num_requests

    async def _closed(self, client: httpx.AsyncClient, start_s: float) -> None:
        async def worker() -> None:
            while self._goes_on(start_s):
                await self._stream(client)

        await asyncio.gather(*(worker() for _ in range(self._options.concurrency)))

    async def _poisson(self, client: httpx.AsyncClient, start_s: float) -> None:
        gaps, rate = random.Random(self._options.seed), self._options.rate
        assert rate is not None
        async with asyncio.TaskGroup() as group:
            while self._goes_on(start_s):
                group.create_task(self._stream(client))
                await asyncio.sleep(gaps.expovariate(rate))

    async def _stream(self, client: httpx.AsyncClient) -> None:
        """One request from its sending to its end, whatever that is."""
        stream, number, start_s = Stream(), self._num_begun, time.monotonic()
        self._num_begun += 1
        self._num_open += 1
        self._max_open = max(self._max_open, self._num_open)
        try:
            await self._read(client, self._body(number), stream, start_s)
        except httpx.HTTPError as error:
            stream.error = type(error).__name__
        self._num_open -= 1
        stream.e2el_s = time.monotonic() - start_s
        self._streams.append(stream)
        self._on_end(stream)

    async def _read(self, client: httpx.AsyncClient, body: dict[str, Any], stream: Stream, start_s: float) -> None:
        async with client.stream("POST", "/v1/completions", json=body) as response:
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
            if finish is None or stream.num_tokens != self._options.max_tokens:
                stream.error = "cut short"

    def _body(self, number: int) -> dict[str, Any]:
        o = self._options
        common, own = random.Random(o.seed), random.Random(f"{o.seed}/{number}")
        words = [common.choice(WORDS) for _ in range(o.shared_words)]
        words += [own.choice(WORDS) for _ in range(o.prompt_words - o.shared_words)]
        return {
            "model": self._model,
            "prompt": " ".join(words),
            "max_tokens": o.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }


async def _resources(client: httpx.AsyncClient) -> dict[str, float]:
    """What instances hold, as ``INSTANCE NAME``; empty for a service that is not ours."""
    response = await client.get("/metrics")
    found = _GAUGE.findall(response.text) if response.status_code == 200 else []
    return {f"{instance} {name}": float(value) for instance, name, value in found if name in RESOURCES}


_WORDS = (
    "time person year way day thing man world life hand part child eye woman place work week case point government "
    "company number group problem fact light river stone winter letter music window garden engine market story"
)
WORDS = _WORDS.split()
