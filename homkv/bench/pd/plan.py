"""Plans: several measurements on the same running workers, one after another."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from homkv.bench.pd.options import PdOptions, PrefillName
from homkv.bench.pd.points import check_distinct
from homkv.errors import HomkvError, UnsupportedError

Unset = msgspec.UnsetType
UNSET = msgspec.UNSET


class Leg(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a leg measures otherwise than the command line says. Names are those of PdOptions."""

    workloads: tuple[str, ...] | Unset = UNSET
    formats: tuple[str, ...] | Unset = UNSET
    links: tuple[str, ...] | Unset = UNSET
    loads: tuple[float, ...] | Unset = UNSET
    overlaps: tuple[bool, ...] | Unset = UNSET
    prefill: PrefillName | Unset = UNSET
    requests: int | Unset = UNSET
    turns: int | Unset = UNSET
    slots: int | Unset = UNSET
    kv_budget_gib: float | Unset = UNSET
    rate_rps: float | Unset = UNSET

    def changes(self) -> Iterator[tuple[str, Any]]:
        """Fields that were given."""
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if value is not UNSET:
                yield name, value


class Plan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A TOML file of ``[[leg]]`` tables, the most telling first: time may end before the last."""

    leg: list[Leg]


def read_plan(path: Path, base: PdOptions) -> list[PdOptions]:
    """The plan's legs over ``base``.

    Raises UnsupportedError for a file that is no plan, ShapeError as PdOptions and check_distinct.
    """
    try:
        plan = msgspec.toml.decode(path.read_bytes(), type=Plan)
    except (OSError, ValueError) as error:
        raise UnsupportedError(f"expected a plan of [[leg]] tables in {path}, found: {error}") from error
    if not plan.leg:
        raise UnsupportedError(f"expected at least one [[leg]] in {path}, found none")
    out = []
    for number, leg in enumerate(plan.leg, 1):
        try:
            out.append(replace(base, **dict(leg.changes())))
        except HomkvError as error:
            raise type(error)(f"{path}, leg {number}: {error}") from error
    check_distinct(out)
    return out
