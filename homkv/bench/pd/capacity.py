"""What the 16-bit baseline can serve: the rate of its slowest stage by steps at rest. Loads are shares of it."""

from collections.abc import Sequence
from statistics import fmean

from homkv.bench.pd.forms import Form
from homkv.bench.pd.messages import Cell
from homkv.bench.pd.workload import Lengths
from homkv.sim.record import StepSample


def capacity_rps(
    steps: Sequence[StepSample], lengths: Lengths, cell: Cell, form: Form, workers: tuple[int, int], is_shared: bool
) -> float:
    """Requests of mean lengths per second with ``workers`` (prefill, decode), the slowest of

        prefill p    link l = 8 bytes / rate    decode d = (answer - 1) step(B) / B    room (max(p, l) + B d) / B

    with B sequences per step, as many as have room; room is held from before prefill. ``is_shared``: on one GPU prefill
    and decode take turns, so that p and d add up.
    """
    prompt, answer = lengths.mean
    steps = [s for s in steps if not s.beside]
    prefill_s = fmean(s.seconds for s in steps if s.stage == "prefill")
    batch = max(s.batch for s in steps if s.stage == "decode")
    step_s = fmean(s.seconds for s in steps if s.stage == "decode" and s.batch == batch)
    link_s = seconds_on_link(cell, form, prompt)
    answer_s = (answer - 1) * step_s
    num_prefill, num_decode = workers
    stages = [
        prefill_s / num_prefill,
        link_s / min(workers),
        answer_s / batch / num_decode,
        (max(prefill_s, link_s) + answer_s) / batch / num_decode,
    ]
    return 1 / max(*stages, stages[0] + stages[2] if is_shared else 0.0)


def seconds_on_link(cell: Cell, form: Form, prompt_tokens: int) -> float:
    """What the KV of a prompt takes on a shaped link; 0 on others."""
    if cell.link_gbps is None:
        return 0.0
    return 8 * form.shape.num_layers * form.payload_bytes(prompt_tokens) / (cell.link_gbps * 1e9)
