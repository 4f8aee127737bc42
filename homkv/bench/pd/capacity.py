"""What the 16-bit baseline can serve: the rate of its slowest stage by steps at rest. Loads are shares of it."""

from collections.abc import Sequence
from statistics import fmean

from homkv.bench.generate import MODELS
from homkv.bench.pd.forms import make_form
from homkv.bench.pd.messages import Cell
from homkv.bench.pd.options import PdOptions
from homkv.bench.pd.points import Point
from homkv.sim.record import StepSample


def capacity_rps(leg: PdOptions, base: Point, steps: Sequence[StepSample]) -> float:
    """Requests of mean lengths per second that a cell's instances can serve by its ``steps``, the slowest of

        prefill p    link l = 8 bytes / rate    decode d = (answer - 1) step(B) / B    room (max(p, l) + B d) / B

    with B sequences per step, as many as have room; room is held from before prefill. On one GPU prefill and decode
    take turns, so that p and d add up.
    """
    prompt, answer = leg.lengths[base.workload].mean
    steps = [s for s in steps if not s.beside]
    prefill_s = fmean(s.seconds for s in steps if s.stage == "prefill")
    batch = max(s.batch for s in steps if s.stage == "decode")
    step_s = fmean(s.seconds for s in steps if s.stage == "decode" and s.batch == batch)
    link_s = seconds_on_link(base.cell, leg.model, prompt)
    answer_s = (answer - 1) * step_s
    num_prefill, num_decode = len(leg.prefill_devices), len(leg.decode_devices)
    stages = [
        prefill_s / num_prefill,
        link_s / num_prefill,
        answer_s / batch / num_decode,
        (max(prefill_s, link_s) + answer_s) / batch / num_decode,
    ]
    return 1 / max(*stages, stages[0] + stages[2] if leg.shares_a_gpu else 0.0)


def seconds_on_link(cell: Cell, model: str, prompt_tokens: int) -> float:
    """What the KV of a prompt takes on a shaped link; 0 on others."""
    if cell.link_gbps is None:
        return 0.0
    form = make_form(MODELS[model], cell.format)
    return 8 * form.shape.num_layers * form.payload_bytes(prompt_tokens) / (cell.link_gbps * 1e9)
