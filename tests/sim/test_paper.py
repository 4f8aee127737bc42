"""The paper's setting: directions that any honest model must show, and the authors' own runs."""

import pytest

from homkv.sim.paper import PaperRow, reductions, run_ablations, run_artifact, run_paper
from homkv.sim.report import ablation_table, artifact_table, claims_table, paper_tables

BALANCED, FP16, HACK = ("balanced", True), ("fp16", False), ("hack", False)


@pytest.fixture(scope="module")
def rows() -> list[PaperRow]:
    return list(run_paper(("v100", "a100"), ("cocktail", "long"), (0.5, 1.2), num_requests=150))


def test_gains_grow_with_load_and_are_largest_behind_the_slowest_link(rows: list[PaperRow]) -> None:
    gain = reductions(rows, BALANCED, FP16)
    for gpu in ("v100", "a100"):
        assert gain[gpu, "long", 1.2] > gain[gpu, "long", 0.5] > 0
    assert gain["v100", "cocktail", 0.5] > gain["a100", "cocktail", 0.5]


def test_overlap_is_told_apart_from_compression(rows: list[PaperRow]) -> None:
    """Part of the gain over the paper's baseline is sending layers early, which 16 bits can do as well."""
    with_overlap, without = reductions(rows, BALANCED, ("fp16", True)), reductions(rows, BALANCED, FP16)
    assert with_overlap["v100", "cocktail", 0.5] < without["v100", "cocktail", 0.5]


def test_dequantizing_first_costs_decode_time(rows: list[PaperRow]) -> None:
    for row in rows:
        if row.format in ("kvquant", "cachegen") and row.profile == "long":
            assert row.summary.dequantize_s > 0.1 * row.summary.phases_s["decode_s"]
    assert min(reductions(rows, HACK, ("kvquant", False)).values()) > -0.1


def test_the_same_requests_for_all(rows: list[PaperRow]) -> None:
    for row in rows:
        assert row.summary.requests == 150
        assert sum(row.summary.phases_s.values()) == pytest.approx(row.summary.jct_s)


def test_authors_runs_come_out_near_what_they_published() -> None:
    """Nothing was fitted to these: mean JCT within 35 %, mostly within 20 %."""
    found = list(run_artifact(seeds=10))
    errors = [abs(row.simulated.jct_s / row.claim["jct_s"] - 1) for row in found]
    assert len(errors) == 10
    assert max(errors) < 0.35
    assert sorted(errors)[5] < 0.2
    for exact, hack in zip(found[::2], found[1::2], strict=True):
        assert hack.simulated.jct_s < exact.simulated.jct_s
    artifact_table(found)


def test_tables_hold_every_row(rows: list[PaperRow]) -> None:
    tables = paper_tables(rows)
    assert [table.row_count for table in tables] == [4, 4]
    assert claims_table(rows).row_count == 10
    ablations = list(run_ablations(num_requests=50))
    assert ablation_table(ablations).row_count == len(ablations) == 9
    jct = {row.name: row.summary.jct_s for row in ablations}
    assert jct["hack:pi=32"] > jct["hack"] > jct["hack:pi=128"]
    assert jct["hack:rqe=0"] > jct["hack"]
