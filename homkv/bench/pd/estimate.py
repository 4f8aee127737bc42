"""What a run will take: every cell simulated from a GPU's tables (homkv.sim), before anything is measured."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table

from homkv.bench.generate import MODELS
from homkv.bench.jct.summary import Tail
from homkv.bench.pd.capacity import capacity_rps
from homkv.bench.pd.forms import Form, PagesForm, make_form
from homkv.bench.pd.options import PdOptions
from homkv.bench.pd.points import Point, budget_bytes, walk
from homkv.bench.pd.probe import sample
from homkv.formats.rows import RowsCodec
from homkv.sim.costs import Costs
from homkv.sim.engine import System, simulate
from homkv.sim.formats import make_format
from homkv.sim.hardware import find_gpu, find_model
from homkv.sim.record import StepSample
from homkv.sim.roofline import RooflineCosts
from homkv.sim.summary import summarize

SHARED = (1.6, 2.1)  # prompts, steps: times longer beside the other on one H100 (benchmarks/results/pd-h100x1.jsonl)
SEAL_LAYER_S = 1.8e-4  # one sequence's page between steps, per layer; median of benchmarks/results/pd-h100x2-64k.jsonl
PREPARE_S = 2.0  # slots, graphs, steps of decoding, for each format and workload
SETTLE_S = 0.5  # between the last token of a cell and the first arrival of the next


@dataclass(frozen=True)
class Estimate:
    """One cell: its mean and its longest job completion times, its seconds on the machine."""

    point: Point
    jct_s: float
    p99_s: float
    seconds: float

    @property
    def tail(self) -> Tail:
        """To compare rates at equal P99."""
        point = self.point
        return Tail(point.place, point.name, f"{point.load:g}", point.rate_rps, self.p99_s)


def estimates(legs: Sequence[PdOptions], gpu: str) -> Iterator[Estimate]:
    """All cells of a run in their order. Raises UnsupportedError for a GPU or model without tables."""
    done: set[str] = set()
    prepared: set[object] = set()
    for leg, point in walk(legs, lambda leg, base: capacity_rps(leg, base, steps_of(leg, base, gpu)), done):
        yield estimate(leg, point, costs_of(leg, point.cell.format, gpu), point.key in prepared)
        done.add(point.run_id)
        prepared.add(point.key)


def costs_of(leg: PdOptions, name: str, gpu: str) -> Costs:
    """A format's times and bytes by the tables."""
    machine, shape = find_gpu(gpu), find_model(leg.model)
    return RooflineCosts(shape, make_format(name, shape.head_dim), machine, machine)


def steps_of(leg: PdOptions, base: Point, gpu: str) -> list[StepSample]:
    """The tables' steps instead of timed ones: prompts of both lengths, and what decodes behind them."""
    costs, slots = costs_of(leg, base.cell.format, gpu), base.cell.slots
    out = []
    for tokens in base.cell.prompts:
        step_s = costs.step_s(slots) + costs.per_token_s * slots * tokens
        out += [
            sample("prefill", tokens, costs.prefill_s(tokens, 0)),
            sample("decode", tokens, step_s, batch=slots),
        ]
    return out


def estimate(leg: PdOptions, point: Point, costs: Costs, is_prepared: bool) -> Estimate:
    """One cell. What a new one takes besides: prompts of each length, timed thrice over, and graphs."""
    cell = point.cell
    prefill_beside, decode_beside = SHARED if leg.shares_a_gpu else (1.0, 1.0)
    system = System(
        costs=costs,
        num_prefill=len(leg.prefill_devices),
        num_decode=len(leg.decode_devices),
        egress_gbps=cell.link_gbps,
        overlap=cell.overlap,
        reserves_early=True,
        capacity_bytes=budget_bytes(cell, leg.model),
        max_batch=cell.slots,
        seal_per_token_s=seal_per_token_s(make_form(MODELS[leg.model], cell.format)),
        prefill_beside=prefill_beside,
        decode_beside=decode_beside,
    )
    outcome = simulate(system, point.requests)
    prompts = 3 * len(set(cell.prompts))
    prepare_s = 0.0 if is_prepared else PREPARE_S + prompts * costs.prefill_s(cell.prompts[1], 0)
    found = summarize(outcome)
    return Estimate(point, found.jct_s, found.jct_p99_s, outcome.end_s + prepare_s + SETTLE_S)


def seal_per_token_s(form: Form) -> float:
    """What a GPU's loop takes besides its steps where these do not seal pages themselves, by the token."""
    if not isinstance(form, PagesForm) or isinstance(form.codec, RowsCodec):
        return 0.0
    return SEAL_LAYER_S * form.shape.num_layers / form.codec.page_tokens


def estimates_table(rows: Sequence[Estimate]) -> Table:
    """Cells with the seconds so far."""
    table = Table(title="Expected, by simulation", box=box.SIMPLE_HEAD)
    table.add_column("cell", no_wrap=True)
    for heading in ("req/s", "JCT s", "P99 s", "cell s", "so far s"):
        table.add_column(heading, justify="right", no_wrap=True)
    total_s = 0.0
    for row in rows:
        total_s += row.seconds
        numbers = (row.point.rate_rps, row.jct_s, row.p99_s)
        table.add_row(row.point.run_id, *(f"{x:.2f}" for x in numbers), f"{row.seconds:.0f}", f"{total_s:.0f}")
    return table
