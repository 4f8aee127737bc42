"""Steps at rest, and beside the other stage where both share a device: what a simulation of the run needs to know."""

import itertools
from collections.abc import Sequence
from statistics import fmean

from homkv.bench.pd.cell import Life, Outcome, run_cell
from homkv.bench.pd.messages import Cell
from homkv.bench.pd.pool import Pool
from homkv.sim.record import Stage, StepSample
from homkv.sim.trace import Request

SLOWER = 3.0  # a prompt takes at most so many times longer beside a sequence that decodes
MIN_STEPS = 4  # that must lie within a prompt


def probe(pool: Pool, cell: Cell, deadline_s: float) -> list[StepSample]:
    """Requests one at a time in a system at rest: what each takes besides its steps, and its workers' own timings."""
    out = []
    for tokens in sorted(set(cell.prompts)):
        outcome = run_cell(pool, cell, [Request("0", 0.0, tokens, 2)], deadline_s)
        record = outcome.records("", lambda _: 0)[0]
        out += [sample("unpack", tokens, record.unpack_s), sample("handoff", tokens, record.queue_s + record.wait_s)]
    for rank in (0, pool.num_prefill):  # one of each kind
        out += [sample(s.stage, s.tokens, s.seconds, batch=s.batch) for s in outcome.opened[rank].steps]
    return out


def sample(stage: Stage, tokens: int, seconds: float, *, batch: int = 1, beside: bool = False) -> StepSample:
    """A step of no run yet."""
    return StepSample(run_id="", stage=stage, batch=batch, tokens=tokens, seconds=seconds, beside=beside)


def probe_beside(
    pool: Pool, cell: Cell, steps: Sequence[StepSample], link_s: float, deadline_s: float
) -> list[StepSample]:
    """One sequence decodes while the longest prompt is computed: a step of the one and the whole of the other.

    ``steps``: those at rest, which say for how long the sequence must decode; ``link_s``: what its prompt takes on the
    link. Nothing if it ended too early.
    """
    low, high = cell.prompts
    prefill_s = {s.tokens: s.seconds for s in steps if s.stage == "prefill"}
    step_s = min(s.seconds for s in steps if s.stage == "decode")
    answer = min(int(SLOWER * prefill_s[high] / step_s) + MIN_STEPS, cell.longest - low)
    requests = [Request("0", 0.0, low, answer), Request("1", 1.2 * max(prefill_s[low], link_s), high, 2)]
    outcome = run_cell(pool, cell, requests, deadline_s)
    decoding, computed = outcome.lives
    return beside(decoding, computed, outcome, pool.num_prefill)


def beside(decoding: Life, computed: Life, outcome: Outcome, decode_rank: int) -> list[StepSample]:
    """Samples of two requests, the second of which was computed while the first one decoded, or nothing."""
    assert decoding.finished is not None
    assert computed.prefilled is not None
    start_s, end_s = computed.prefilled.start_s, computed.prefilled.computed_s
    log = outcome.closed[decode_rank].steps
    ends = list(itertools.accumulate((seconds for *_, seconds in log), initial=decoding.finished.first_token_s))
    inside = [s for s, begin, end in zip(log, ends, ends[1:], strict=False) if start_s <= begin and end <= end_s]
    if len(inside) < MIN_STEPS or decoding.finished.done_s < end_s:
        return []
    held = round(fmean(tokens for _, tokens, _ in inside))
    return [
        sample("decode", held, fmean(seconds for *_, seconds in inside), beside=True),
        sample("prefill", computed.request.prompt_tokens, end_s - start_s, beside=True),
    ]
