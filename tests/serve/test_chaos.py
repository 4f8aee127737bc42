"""A few faults of a seeded plan against a service in threads; the whole plan is `homkv.eval.chaos`."""

import pytest

from homkv.errors import UnsupportedError
from homkv.eval.chaos.run import run_plan
from homkv.testing.faults import Fault, combinations, random_plan


def test_a_plan_follows_from_its_seed_and_covers_everything() -> None:
    everything = combinations()
    plan = random_plan(3, len(everything))
    assert plan == random_plan(3, len(everything))
    assert plan != random_plan(4, len(everything))
    assert {(f.kind, f.where, f.message) for f in plan} == set(everything)


def test_faults_that_do_not_exist_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="prefill:Token"):
        Fault("drop", "prefill", "Token")


def test_damage_changes_what_it_says() -> None:
    data = bytes(range(64))
    flipped = Fault("flip", "decode", "frame", seed=5).damage(data)
    assert sum((a ^ b).bit_count() for a, b in zip(data, flipped, strict=True)) == 1
    assert data.startswith(Fault("truncate", "decode", "frame", seed=5).damage(data))


def test_what_is_lost_damaged_or_killed_is_told_and_never_believed() -> None:
    plan = [
        Fault("drop", "decode", "Token", nth=11),  # the last one that is told: Done must not hide it
        Fault("flip", "decode", "Token", seed=7),
        Fault("flip", "decode", "frame", seed=8),
        Fault("restart", "decode", "frame", nth=1),
        Fault("cut", "decode", "Finish"),
    ]
    outcomes = list(run_plan(plan, num_cells=1))
    assert [o.broken for o in outcomes] == [[]] * len(plan)
    assert all(o.was_hit for o in outcomes)
    assert all("failed" in o.states for o in outcomes)
