"""`homkv bench jct --real`: which replays, in which order, and their record."""

import os
import platform
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from homkv.bench.jct.replay import (
    Clients,
    MemoryWatch,
    Prompt,
    cut_prompts,
    peak_kv_bytes,
    replay,
)
from homkv.bench.jct.steps import StepPlan, time_steps
from homkv.bench.rows import command_line
from homkv.cores import num_cores
from homkv.errors import HomkvError, ShapeError
from homkv.models import load_tokenizer
from homkv.serve.engine import serving_codec
from homkv.serve.spawn import InstanceOptions, LocalCluster
from homkv.sim.record import LeftOut, Run, RunInfo, StepSample, read_record, write_record
from homkv.sim.trace import Request, poisson_arrivals, read_trace, scaled
from homkv.texts import essays, token_ids

FORMATS = ("fp16", "fp8", "cachegen", "kvquant", "kivi", "hack", "hack-2026", "small", "balanced")
FAR = 2.0  # times longer: a prompt's time is a line between closer lengths
ABLATIONS = ("hack:se=0", "hack:rqe=0", "hack:pi=32", "hack:pi=128")


@dataclass(frozen=True)
class JctOptions:
    """What to replay. ``requests``: their lengths and times. Raises ShapeError, FormatError for what cannot be run."""

    requests: tuple[Request, ...]
    record: Path
    model: str = "smollm2"
    formats: tuple[str, ...] = FORMATS
    links: tuple[float, ...] = (0.1, 1.0, 10.0)
    overlaps: tuple[bool, ...] = (True,)  # layers travel while the next are computed
    repetitions: int = 2
    num_threads: int = 1
    steps: bool = True  # time steps as well, as `homkv sim validate` needs them
    budget_s: float = 3600.0
    request_timeout_s: float = 300.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.requests:
            raise ShapeError("expected requests to replay, found none")
        if not self.formats or not self.links or any(not 0 < link < float("inf") for link in self.links):
            raise ShapeError(f"expected formats and positive link rates, found {self.formats} and {self.links}")
        for name in ("repetitions", "num_threads", "budget_s", "request_timeout_s"):
            if not getattr(self, name) > 0:
                raise ShapeError(f"expected a positive {name}, found {getattr(self, name)}")
        for name in self.formats:
            serving_codec(name, head_dim=128)  # every format covers it; the model's own is not known yet

    @property
    def longest(self) -> int:
        """Tokens of all requests together: room for all of them at once."""
        return sum(r.prompt_tokens + r.output_tokens for r in self.requests)


def uniform_requests(
    count: int, prompt: tuple[int, int], output: tuple[int, int], requests_per_s: float, seed: int
) -> list[Request]:
    """Requests of lengths drawn from ranges, Poisson arrivals. Raises ShapeError, TraceError."""
    if count < 1 or not 1 <= prompt[0] <= prompt[1] or not 2 <= output[0] <= output[1]:
        raise ShapeError(
            f"expected a request or more, prompts of one token or more and answers of two or more, found {count}, "
            f"{prompt} and {output}"
        )
    draw = random.Random(seed)
    sizes = [(draw.randint(*prompt), draw.randint(*output)) for _ in range(count)]
    return poisson_arrivals((Request(str(i), 0.0, *size) for i, size in enumerate(sizes)), requests_per_s, seed + 1)


def trace_requests(
    path: Path, count: int, requests_per_s: float, tokens: float, seed: int, answers: float | None = None
) -> list[Request]:
    """The first requests of a trace, prompts times ``tokens``, answers times ``answers`` (None: ``tokens``).

    They arrive as a Poisson process. Raises TraceError.

    Answers get at least two tokens: the first is prefill's.
    """
    requests = scaled(
        read_trace(path, requests_per_s=requests_per_s, seed=seed), tokens=tokens, answers=answers, limit=count
    )
    return [msgspec.structs.replace(r, output_tokens=max(r.output_tokens, 2)) for r in requests]


class JctBench:
    """Link by link a new pair of instances; on each pair the formats take turns, so that noise meets them alike."""

    def __init__(self, options: JctOptions, console: Console) -> None:
        self.options, self.console = options, console
        self.end_s = time.monotonic() + options.budget_s
        self.skipped: list[str] = []
        self._ids: list[int] = []
        self._num_layers = 1

    def run(self) -> list[Run]:
        """Everything that fits into the budget, appended to the record as it ends. Raises HomkvError if none did."""
        options = self.options
        options.record.parent.mkdir(parents=True, exist_ok=True)
        options.record.unlink(missing_ok=True)
        self._ids = token_ids(load_tokenizer(options.model), essays())
        prompts = cut_prompts(self._ids, options.requests)
        total = len(options.links) * len(options.overlaps) * options.repetitions * len(options.formats)
        with self._progress(total) as advance:
            for link in options.links:
                for overlap in options.overlaps:
                    self._on_link(link, overlap, prompts, advance)
        return self.recorded()

    def recorded(self) -> list[Run]:
        """What the record holds."""
        record = self.options.record
        return list(read_record(record).values()) if record.exists() else []

    @contextmanager
    def _progress(self, total: int) -> Iterator[Progress]:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self.console, transient=True) as progress:
            progress.add_task("starting instances", total=total)
            yield progress

    def _on_link(self, link: float, overlap: bool, prompts: Sequence[Prompt], progress: Progress) -> None:
        options, task = self.options, progress.task_ids[0]
        settings = InstanceOptions(
            options.model,
            options.formats,
            link_gbps=link,
            num_threads=options.num_threads,
            max_tokens=options.longest + 1024,
            # Every prompt is another text and is computed in one piece, so that its layers leave while it is.
            prefill={"prefix_bytes": 0, "chunk_tokens": options.longest, "overlap": overlap},
            decode={"share_prefixes": False},
        )
        with LocalCluster(settings) as cluster:
            clients = Clients(cluster, max(len(options.requests), 2))  # steps are timed of two at once
            try:
                for name in options.formats:
                    progress.update(task, description=f"{name}, {link:g} Gb/s: warming up")
                    self._warm_up(clients, name)
                for repetition in range(options.repetitions):
                    for name in options.formats:
                        progress.update(task, description=f"{name}, {link:g} Gb/s")
                        self._measure(cluster, clients, prompts, (name, link, overlap, repetition))
                        progress.advance(task)
            finally:
                clients.close()

    def _warm_up(self, clients: Clients, name: str) -> None:
        """One short request."""
        if time.monotonic() >= self.end_s:
            return
        sizes = sorted(r.prompt_tokens for r in self.options.requests)
        query = cut_prompts(self._ids, [Request("0", 0.0, sizes[len(sizes) // 2], 4)])[0].query(name)
        with clients.one() as client:
            client.generate(query, on_layer=self._count_layers, timeout_s=self.options.request_timeout_s)

    def _time_steps(self, clients: Clients, name: str) -> list[StepSample]:
        """A format's steps, before each of its turns: a machine's speed drifts."""
        plan = StepPlan(step_lengths([r.prompt_tokens for r in self.options.requests]))
        return time_steps(clients, self._ids, name, plan, self.options.request_timeout_s)

    def _count_layers(self, count: int) -> None:
        self._num_layers = max(self._num_layers, count)

    def _measure(
        self, cluster: LocalCluster, clients: Clients, prompts: Sequence[Prompt], what: tuple[str, float, bool, int]
    ) -> None:
        """One run of one format: ``what`` is format, link, overlap and repetition."""
        name, link, overlap, repetition = what
        options, how = self.options, "" if overlap else "no-overlap/"
        run_id = f"{link:g}gbps/{how}{name}/{repetition}"
        if time.monotonic() >= self.end_s:
            self._skip(run_id, "the time was used up")
            return
        try:
            steps = self._time_steps(clients, name) if options.steps else []
            with MemoryWatch(cluster.processes["decode-0"].pid) as memory:
                finished = replay(clients, options.requests, prompts, name, timeout_s=options.request_timeout_s)
        except HomkvError as error:
            self._skip(run_id, f"{type(error).__name__}: {error}")
            return
        info = msgspec.structs.replace(
            self._described(name, link, overlap),
            run_id=run_id,
            peak_kv_bytes=peak_kv_bytes(finished),
            peak_memory_bytes=memory.peak_bytes or None,
        )
        steps = [msgspec.structs.replace(step, run_id=run_id) for step in steps]
        write_record(options.record, [info, *steps, *(f.record(run_id) for f in finished)], append=True)

    def _skip(self, run_id: str, reason: str) -> None:
        """Name a run that was not measured, in the record too."""
        self.skipped.append(f"{run_id}: {reason}")
        line = LeftOut(run_id=run_id, reason=reason, unix_time=int(time.time()))
        write_record(self.options.record, [line], append=True)

    def _described(self, name: str, link: float, overlap: bool) -> RunInfo:
        """What is said of every run of a format on a link, as of now."""
        options = self.options
        return RunInfo(
            run_id="",
            source="replay",
            model=options.model,
            kv_cache_dtype=name,
            command=command_line(),
            machine=machine(),
            seed=options.seed,
            link_gbps=link,
            overlap=overlap,
            background_pack=True,
            num_layers=self._num_layers,
            reserves_early=True,
            unix_time=int(time.time()),
            options={
                "case": f"{link:g} Gb/s",
                "variant": "" if overlap else "(no overlap)",
                "threads": str(options.num_threads),
                "cores": str(num_cores()),
                "load_average": " ".join(f"{x:.1f}" for x in os.getloadavg()),
            },
        )


def step_lengths(prompts: Sequence[int]) -> tuple[int, ...]:
    """Where to time steps: the ends of a range, and its middle where the ends are far apart."""
    low, high = min(prompts), max(prompts)
    return tuple(sorted({low, high} | ({(low + high) // 2} if high > FAR * low else set())))


def machine() -> str:
    """Processor, as the kernel names it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{platform.machine()}, {names[0] if names else platform.processor() or 'unknown processor'}"
