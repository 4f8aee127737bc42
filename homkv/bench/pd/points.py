"""What is measured, cell by cell and in which order: the same walk for a run and for an estimate of it."""

import itertools
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass

from homkv.bench.generate import MODELS
from homkv.bench.pd.forms import make_form
from homkv.bench.pd.messages import Cell
from homkv.bench.pd.options import BASE, PdOptions
from homkv.bench.pd.workload import poisson
from homkv.errors import ShapeError
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
        return f"{self.place}, {self.rate_rps:.2f} req/s" + (f" (load {self.load:g})" if self.load else "")

    @property
    def place(self) -> str:
        """The same for all rates: workload, memory and link."""
        link = LINK_NAMES.get(self.cell.link, f"{self.cell.link} Gb/s")
        budget = f", {self.cell.kv_budget_bytes / GIB:.3g} GiB of KV" if self.cell.kv_budget_bytes else ""
        return f"{self.workload}{budget}, {link}"

    @property
    def name(self) -> str:
        """The format, and what else sets it apart in the same case."""
        return f"{self.cell.format} {self.variant}".strip()

    @property
    def variant(self) -> str:
        """What sets it apart from others of its format in the same case."""
        parts = ["" if self.cell.overlap else "no overlap", "" if self.cell.prefill == "exact" else "int8 prompts"]
        said = ", ".join(filter(None, parts))
        return said and f"({said})"

    @property
    def run_id(self) -> str:
        """Unique in a record."""
        how = "overlap" if self.cell.overlap else "after"
        prefill = "" if self.cell.prefill == "exact" else f"/{self.cell.prefill}"
        at = f"{self.load}" if self.load else f"{self.rate_rps:g}rps"
        room = f"/{self.cell.kv_budget_bytes / GIB:.3g}GiB" if self.cell.kv_budget_bytes else ""
        return f"{self.workload}/{self.cell.link}/{self.cell.format}{prefill}/{how}/{at}{room}/{self.turn}"

    @property
    def key(self) -> object:
        """What workers prepare for, and time at rest."""
        cell = self.cell
        return (self.workload, cell.format, cell.kind, cell.prefill, cell.slots, cell.kv_budget_bytes)


CapacityOf = Callable[[PdOptions, Point], float | None]


def walk(legs: Sequence[PdOptions], capacity_of: CapacityOf, done: Container[str]) -> Iterator[tuple[PdOptions, Point]]:
    """All cells in their order, formats taking turns, without those whose ``run_id`` is in ``done`` when they come up.

    ``capacity_of``: requests per second that the baseline can serve; it gets the baseline in a cell of its own. None:
    not to be found, what depends on it is left out.
    """
    for leg in legs:
        for workload, link in itertools.product(leg.workloads, leg.links):
            for load, rate_rps in _rates(leg, workload, link, capacity_of):
                for point in _points_at(leg, workload, link, load, rate_rps):
                    if point.run_id not in done:
                        yield leg, point


def check_distinct(legs: Sequence[PdOptions]) -> None:
    """Raise ShapeError if two legs would measure different cells under one name, of which only the first would run."""
    seen: dict[str, Point] = {}
    for _, point in walk(legs, lambda leg, base: 1.0, ()):
        if seen.setdefault(point.run_id, point) != point:
            raise ShapeError(
                f"expected every cell once, found {point.run_id} with other slots or requests in another leg; give it "
                "a plan, or a load, of its own"
            )


def _rates(leg: PdOptions, workload: str, link: str, capacity_of: CapacityOf) -> list[tuple[float, float]]:
    """Loads and requests per second."""
    if leg.rate_rps is not None:
        return [(0.0, leg.rate_rps)]
    base = Point(workload, cell_of(leg, workload, BASE, link, True), 0.0, [], 0.0)
    capacity = capacity_of(leg, base)
    return [] if capacity is None else [(load, load * capacity) for load in leg.loads]


def _points_at(leg: PdOptions, workload: str, link: str, load: float, rate_rps: float) -> Iterator[Point]:
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
