"""What a leg measures, cell by cell: the same list for a run and for an estimate of it."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from homkv.bench.generate import MODELS
from homkv.bench.pd.forms import make_form
from homkv.bench.pd.messages import Cell
from homkv.bench.pd.options import BASE, PdOptions
from homkv.bench.pd.workload import poisson
from homkv.sim.trace import Request

GIB = 2**30
LINK_NAMES = {"direct": "device to device", "nixl": "NIXL", "tcp": "TCP, unshaped"}


@dataclass(frozen=True)
class Point:
    """One cell with its requests. ``load``: the rate's share of the baseline's capacity; 0: the rate was given."""

    workload: str
    cell: Cell
    load: float
    requests: list[Request]
    rate_rps: float
    turn: int = 0

    @property
    def case(self) -> str:
        """What is the same for all formats that are compared."""
        link = LINK_NAMES.get(self.cell.link, f"{self.cell.link} Gb/s")
        at = f"{self.rate_rps:.2f} req/s" + (f" (load {self.load:g})" if self.load else "")
        budget = f", {self.cell.kv_budget_bytes / GIB:.3g} GiB of KV" if self.cell.kv_budget_bytes else ""
        return f"{self.workload}{budget}, {link}, {at}"

    @property
    def run_id(self) -> str:
        """Unique in a record."""
        how = "overlap" if self.cell.overlap else "after"
        room = f"/{self.cell.kv_budget_bytes / GIB:.3g}GiB" if self.cell.kv_budget_bytes else ""
        return f"{self.workload}/{self.cell.link}/{self.cell.format}/{how}/{self.load}{room}/{self.turn}"

    @property
    def key(self) -> object:
        """What workers prepare for, and time at rest."""
        return (self.workload, self.cell.format, self.cell.prefill, self.cell.slots, self.cell.kv_budget_bytes)


def base_point(leg: PdOptions, workload: str, link: str) -> Point:
    """The baseline in a cell of its own, to find its capacity."""
    return Point(workload, cell_of(leg, workload, BASE, link, True), 0.0, [], 0.0)


def points_at(leg: PdOptions, workload: str, link: str, load: float, rate_rps: float) -> Iterator[Point]:
    """All cells of one rate; formats take turns."""
    requests = poisson(leg.lengths[workload], leg.requests, rate_rps, leg.seed)
    for turn, overlap, name in itertools.product(range(leg.turns), leg.overlaps, leg.formats):
        yield Point(workload, cell_of(leg, workload, name, link, overlap), load, requests, rate_rps, turn)


def cell_of(leg: PdOptions, workload: str, name: str, link: str, overlap: bool) -> Cell:
    """The cell of a format."""
    lengths, budget = leg.lengths[workload], int(leg.kv_budget_gib * GIB)
    slots = leg.slots
    if budget:  # no more slots than sequences could fit: dense slots take their memory whether used or not
        smallest = make_form(MODELS[leg.model], name).kv_bytes(lengths.shortest)
        slots = max(1, min(slots, budget // smallest))
    return Cell(name, link, overlap, leg.prefill, slots, lengths.prompt, lengths.longest, budget)


def budget_bytes(cell: Cell, model: str) -> int:
    """KV that a decode worker may hold."""
    return cell.kv_budget_bytes or cell.slots * make_form(MODELS[model], cell.format).kv_bytes(cell.longest)
