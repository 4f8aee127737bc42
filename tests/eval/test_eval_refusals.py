"""What cannot be measured is refused before anything is."""

from pathlib import Path
from typing import Any

import pytest
from eval_cases import ids, text, tiny

from homkv.errors import FormatError, ShapeError, UnsupportedError
from homkv.eval.exact import run_exact
from homkv.eval.items import Item, Options, make_items
from homkv.eval.record import read_records
from homkv.eval.run import Conditions, measure_cases
from homkv.models import LoadedModel


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return tiny()


@pytest.mark.parametrize(("count", "prefix"), [(100, 0), (100, 100), (600, 500)])
def test_impossible_splits_are_refused(loaded: LoadedModel, count: int, prefix: int) -> None:
    with pytest.raises(ShapeError, match="expected 0 < prefix"):
        run_exact(loaded, ids(count), prefix)


def test_a_text_that_is_too_long_is_refused_before_anything_is_measured(loaded: LoadedModel, tmp_path: Path) -> None:
    items = [text("fits", 40, 20, 1), Item("greedy", "long", tuple(range(100)), 99, to_write=500)]
    with pytest.raises(ShapeError, match="choose shorter ones"):
        measure_cases(loaded, items, Conditions(("fp16",)), tmp_path / "r.jsonl")
    assert not (tmp_path / "r.jsonl").exists()


@pytest.mark.parametrize("none", [{"texts": 0}, {"scored": -1}, {"tasks": ("passkey",), "passkeys": 0}])
def test_a_task_of_nothing_is_refused(none: dict[str, Any]) -> None:
    with pytest.raises(ShapeError, match="leave the task out"):
        Options(**none)
    Options(tasks=("greedy",), texts=0)


def test_unknown_tasks_and_broken_files_are_refused(tmp_path: Path, loaded: LoadedModel) -> None:
    with pytest.raises(UnsupportedError, match="expected tasks out of"):
        Options(tasks=("text", "dance"))
    with pytest.raises(FormatError, match="expected a prefill"):
        Conditions(("small",), prefill="none")
    with pytest.raises(ShapeError, match="or a longer --text"):
        make_items(loaded.tokenizer, Options(tasks=("text",), text="w1 w2"))
    path = tmp_path / "x.jsonl"
    path.write_text('{"kind": "nothing"}\n')
    with pytest.raises(FormatError, match="line 1"):
        read_records(path)
