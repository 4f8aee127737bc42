"""Timing on a GPU: CUDA graphs that run a call on several caches in turn, replayed round-robin."""

from collections.abc import Callable, Mapping, Sequence

import torch

Call = Callable[[], object]
WARM_UP_CALLS = 2  # compile, and fill what wrappers keep between calls


class Replay:
    """A CUDA graph of ``calls`` one after another; calling it gives microseconds per call.

    Every call should read its own cache, and all of them together more than the L2 cache holds. One sample lasts
    ``sample_ms`` or one replay, whichever is longer.
    """

    def __init__(self, calls: Sequence[Call], sample_ms: float = 2.0) -> None:
        self._num_calls = len(calls)
        self._graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP_CALLS):
                calls[0]()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        with torch.cuda.graph(self._graph):
            for call in calls:
                call()
        self._replays = 1
        self()
        self._replays = max(1, min(100, round(sample_ms * 1e3 / (self() * self._num_calls))))

    def __call__(self) -> float:
        """Replay and return microseconds per call."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(self._replays):
            self._graph.replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e3 / (self._replays * self._num_calls)


def measure(
    samplers: Mapping[str, Callable[[], float]], rounds: int, advance: Callable[[], None] = lambda: None
) -> dict[str, list[float]]:
    """Times of every sampler in every round, each sampler once per round; one unmeasured round first.

    What changes slowly (clocks, temperature) meets all samplers of a round alike, so ratios are taken inside rounds.
    """
    for sample in samplers.values():
        sample()
    times: dict[str, list[float]] = {name: [] for name in samplers}
    for _ in range(rounds):
        for name, sample in samplers.items():
            times[name].append(sample())
        advance()
    return times
