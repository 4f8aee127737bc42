"""A decode instance: continuous batching without an event per token.

Between two admissions or completions the batch is constant: B sequences, which hold S tokens and grow by B per step.
So n steps take, exactly,

    n g(B) + c (n S + B n (n - 1) / 2)          g: a step without contexts, c: per token of context

The instance therefore wakes only at the step boundary at which somebody joins or leaves.
"""

import heapq
import math
from collections import deque
from collections.abc import Callable

import simpy

from homkv.sim.alarm import Alarm
from homkv.sim.costs import Costs
from homkv.sim.job import Job


class DecodeInstance:
    """Sequences that decode together. ``finished`` is called at a sequence's last token.

    ``changed`` hears when the first sequence joins and when the last one has left. ``seal_per_token_s`` adds to a step
    for each of its sequences.
    """

    def __init__(
        self, env: simpy.Environment, costs: Costs, max_batch: float, finished: Callable[[Job], None],
        changed: Callable[[bool], None] = lambda is_busy: None, seal_per_token_s: float = 0.0,
    ) -> None:  # fmt: skip
        self.env = env
        self.costs = costs
        self.max_batch = max_batch
        self.finished = finished
        self.changed = changed
        self.decoded_tokens = 0
        self.busy_s = 0.0
        self._running: list[tuple[int, int, Job]] = []  # heap by the step at which each ends
        self._joining: deque[Job] = deque()
        self._step = 0  # steps done since the start
        self._planned = 0  # steps until the alarm
        self._context = 0  # S: tokens of KV of all running sequences
        self._since = 0.0  # time of the last boundary
        self._count = 0
        self._per_token, self._seal = costs.per_token_s, seal_per_token_s
        self._per_step = 0.0  # g(B)
        self._dequantized = 0.0  # integral of the dequantizing share
        self._slower = 1.0  # times longer that steps take now
        self._slower_next = 1.0  # and from the next boundary on
        self._alarm = Alarm(env, self._boundary)

    def admit(self, job: Job) -> None:
        """Let a sequence join at the next boundary with room in the batch."""
        self._joining.append(job)
        if not self._running:
            self._since = self.env.now
            self._change()
        elif len(self._joining) == 1 and len(self._running) < self.max_batch:
            steps = self._steps_by(self.env.now - self._since)
            if steps < self._planned:
                self._plan(steps)

    def slow(self, times: float) -> None:
        """Let every step from the next boundary on take so many times longer."""
        if times == self._slower_next:
            return
        self._slower_next = times
        if self._running:
            steps = self._steps_by(self.env.now - self._since)
            if steps < self._planned:
                self._plan(steps)

    def duration(self, steps: int) -> float:
        """Seconds of the next ``steps`` steps with the batch as it is."""
        batch = len(self._running)
        tokens = steps * self._context + batch * steps * (steps - 1) / 2
        return self._slower * (steps * self._per_step + self._per_token * tokens)

    def _steps_by(self, elapsed: float) -> int:
        """Fewest steps, at least one, that take ``elapsed`` or more: the quadratic above, solved and rounded up."""
        a = self._per_token * len(self._running) / 2
        b = self._per_step + self._per_token * self._context - a
        elapsed /= self._slower
        root = 2 * elapsed / (b + math.sqrt(b * b + 4 * a * elapsed)) if elapsed > 0 else 0.0
        return max(1, math.ceil(root - 1e-9))

    def _plan(self, steps: int) -> None:
        self._planned = steps
        self._alarm.set(self._since + self.duration(steps) - self.env.now)

    def _boundary(self) -> None:
        steps, batch = self._planned, len(self._running)
        tokens = steps * self._context + batch * steps * (steps - 1) / 2
        self._dequantized += self.costs.dequantize_step_s * steps + self.costs.dequantize_per_token_s * tokens
        self._step += steps
        self._context += batch * steps
        self.decoded_tokens += batch * steps
        self.busy_s += self.env.now - self._since
        self._since = self.env.now
        self._change()

    def _change(self) -> None:
        """Let sequences leave and join, then plan up to the next change."""
        running, ended, was_busy = self._running, [], bool(self._running)
        self._slower = self._slower_next
        while running and running[0][0] <= self._step:
            job = heapq.heappop(running)[2]
            self._context -= job.context + job.request.output_tokens - 1
            job.dequantize_s = self._dequantized - job.dequantize_s
            ended.append(job)
        while self._joining and len(running) < self.max_batch:
            self._join(self._joining.popleft(), ended)
        if running:
            self._per_step = self.costs.step_s(len(running)) + self._seal * len(running)
            self._plan(running[0][0] - self._step)
        if bool(running) != was_busy:
            self.changed(not was_busy)
        for job in ended:
            self.finished(job)

    def _join(self, job: Job, ended: list[Job]) -> None:
        job.admitted = self.env.now
        if job.request.output_tokens == 1:  # prefill's token was the answer
            ended.append(job)
            return
        job.context = job.request.prompt_tokens + 1  # the first token's KV is written before the first step attends
        job.dequantize_s = self._dequantized
        self._context += job.context
        self._count += 1
        heapq.heappush(self._running, (self._step + job.request.output_tokens - 1, self._count, job))
