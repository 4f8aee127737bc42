"""Decode without an event per token equals decode with one, step by step."""

import random
from typing import Any

import pytest
import simpy

from homkv.sim.decode import DecodeInstance
from homkv.sim.job import Job
from homkv.sim.trace import Request


def step_by_step(costs: Any, requests: list[Request], max_batch: int) -> dict[str, tuple[float, float]]:
    """Admission and end of every request, one loop turn per step."""
    waiting = sorted(requests, key=lambda r: r.arrival_s)
    running: list[list[Any]] = []  # request, context, steps left
    times: dict[str, tuple[float, float]] = {}
    now = 0.0
    while waiting or running:
        if not running:
            now = max(now, waiting[0].arrival_s)
        while waiting and waiting[0].arrival_s <= now + 1e-12 and len(running) < max_batch:
            request = waiting.pop(0)
            times[request.request_id] = (now, now)
            if request.output_tokens > 1:
                running.append([request, request.prompt_tokens + 1, request.output_tokens - 1])
        if not running:
            continue
        now += costs.step_s(len(running)) + costs.per_token_s * sum(context for _, context, _ in running)
        for entry in running:
            entry[1] += 1
            entry[2] -= 1
            if entry[2] == 0:
                times[entry[0].request_id] = (times[entry[0].request_id][0], now)
        running = [entry for entry in running if entry[2]]
    return times


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("max_batch", [1, 3, 1000])
def test_equals_stepping(round_costs: Any, seed: int, max_batch: int) -> None:
    rng = random.Random(seed)
    costs = round_costs(per_token_s=rng.choice((0.0, 1e-6, 1e-4)))
    at, requests = 0.0, []
    for i in range(40):
        at += rng.expovariate(rng.choice((2.0, 50.0)))
        requests.append(Request(str(i), at, rng.randint(1, 300), rng.choice((1, 2, rng.randint(1, 80)))))
    env = simpy.Environment()
    got: dict[str, tuple[float, float]] = {}
    instance = DecodeInstance(
        env, costs, max_batch, lambda job: got.update({job.request.request_id: (job.admitted, env.now)})
    )

    def feed() -> Any:
        for request in requests:
            yield env.timeout(request.arrival_s - env.now)
            instance.admit(Job(request, 0, 0))

    env.process(feed())
    env.run()
    expected = step_by_step(costs, requests, max_batch)
    assert got.keys() == expected.keys()
    for key, times in expected.items():
        assert got[key] == pytest.approx(times, abs=1e-9)
    assert instance.decoded_tokens == sum(r.output_tokens - 1 for r in requests)
