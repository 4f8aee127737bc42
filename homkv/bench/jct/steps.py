"""Steps of a replay's system, timed outside of it, at rest and beside the other stage: for simulations."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median

from homkv.bench.jct.replay import Clients, cut_prompts, replay
from homkv.serve.messages import PrefillTimes
from homkv.sim.record import RequestRecord, Stage, StepSample
from homkv.sim.trace import Request

SLOWER = 1.6  # a prompt takes at most so many times longer beside a sequence that decodes


@dataclass(frozen=True)
class StepPlan:
    """Lengths at which steps are timed, one request alone; ``batch``: sequences that decode together at the longest."""

    prompts: tuple[int, ...]
    batch: int = 2
    answer: int = 8
    min_steps: int = 4
    max_tokens: int = 160


def time_steps(
    clients: Clients, ids: Sequence[int], kv_cache_dtype: str, plan: StepPlan, timeout_s: float
) -> list[StepSample]:
    """Steps at rest (single requests; decode also by several), and of two requests beside each other."""
    out: list[StepSample] = []

    def sample(stage: Stage, batch: int, tokens: int, seconds: float) -> None:
        out.append(StepSample(run_id="", stage=stage, batch=batch, tokens=tokens, seconds=seconds))

    for tokens in plan.prompts:
        request = Request("0", 0.0, tokens, plan.answer)
        single = replay(clients, [request], cut_prompts(ids, [request]), kv_cache_dtype, timeout_s=timeout_s)[0]
        record, prefill = single.record(""), single.answer.prefill
        assert prefill is not None
        sample("prefill", 1, tokens, record.prefill_s)
        sample("pack", 1, tokens, prefill.times.pack_busy_s)
        sample("unpack", 1, tokens, record.unpack_s)
        sample("handoff", 1, tokens, record.queue_s + record.wait_s)
        sample("decode", 1, tokens, median_gap(single.answer.arrived_s))
    step_s = together(clients, ids, kv_cache_dtype, plan, record, timeout_s)
    if step_s is not None:
        sample("decode", plan.batch, plan.prompts[-1], step_s)
    return out + beside(clients, ids, kv_cache_dtype, plan, out, timeout_s)


def beside(
    clients: Clients, ids: Sequence[int], kv_cache_dtype: str, plan: StepPlan, steps: Sequence[StepSample],
    timeout_s: float,
) -> list[StepSample]:  # fmt: skip
    """One sequence decodes while the longest prompt is computed: its mean step meanwhile, and the prompt's time.

    ``steps``: those at rest, which say for how long it must decode. Nothing if the two were not together.
    """
    low, high = min(plan.prompts), max(plan.prompts)
    prefill_s = {s.tokens: s.seconds for s in steps if s.stage == "prefill"}
    step_s = min(s.seconds for s in steps if s.stage == "decode")
    answer = min(plan.max_tokens, plan.min_steps + round(SLOWER * prefill_s[high] / step_s))
    requests = [Request("0", 0.0, low, answer), Request("1", 1.2 * prefill_s[low], high, 2)]
    decoding, computed = replay(clients, requests, cut_prompts(ids, requests), kv_cache_dtype, timeout_s=timeout_s)
    assert computed.answer.prefill is not None
    return overlapping(decoding.answer.arrived_s, low, computed.answer.prefill.times, high, plan.min_steps)


def overlapping(
    moments: Sequence[float], behind: int, times: PrefillTimes, prompt_tokens: int, min_steps: int
) -> list[StepSample]:
    """Samples of tokens at ``moments``, behind a prompt of ``behind`` tokens, and of a prompt computed meanwhile."""
    start_s, end_s = times.start_s, times.computed_s
    inside = [(i, b - a) for i, (a, b) in enumerate(itertools.pairwise(moments)) if start_s <= a and b <= end_s]
    if len(inside) < min_steps or moments[-1] < end_s:
        return []
    held, step_s = behind + round(fmean(i for i, _ in inside)), fmean(s for _, s in inside)
    return [
        StepSample(run_id="", stage="decode", batch=1, tokens=held, seconds=step_s, beside=True),
        StepSample(run_id="", stage="prefill", batch=1, tokens=prompt_tokens, seconds=end_s - start_s, beside=True),
    ]


def together(
    clients: Clients, ids: Sequence[int], kv_cache_dtype: str, plan: StepPlan, single: RequestRecord, timeout_s: float
) -> float | None:
    """Seconds per step while ``plan.batch`` sequences decode; None if they were not together for long enough."""
    wait_s = (plan.batch - 1) * (single.prefill_s + single.transfer_s)
    count = min(plan.max_tokens, plan.min_steps + 4 + round(1.5 * wait_s / max(single.tpot_s, 1e-3)))
    requests = [Request(str(i), 0.0, single.prompt_tokens, count) for i in range(plan.batch)]
    finished = replay(clients, requests, cut_prompts(ids, requests), kv_cache_dtype, timeout_s=timeout_s)
    start_s, end_s = max(f.answer.arrived_s[0] for f in finished), min(f.answer.arrived_s[-1] for f in finished)
    inside = [t for t in finished[0].answer.arrived_s if start_s <= t <= end_s]
    if len(inside) <= plan.min_steps:
        return None
    return median_gap(inside)


def median_gap(moments: Sequence[float]) -> float:
    """Median time between neighbours: one disturbed step does not move it."""
    return median(b - a for a, b in itertools.pairwise(moments))
