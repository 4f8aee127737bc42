"""Texts of one length that are computed side by side: what each scores does not depend on the others."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from eval_cases import ids, text, tiny

from homkv.errors import FormatError, ShapeError
from homkv.eval.exact import continue_greedily, run_exact
from homkv.eval.forced import score
from homkv.eval.run import Conditions, batches, measure_cases
from homkv.formats.rows import RowsCodec
from homkv.models import LoadedModel


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return tiny()


@pytest.mark.parametrize("name", ["small", "fp8", "kivi", "kivi:bits=4", "hack", "hack:rqe=0", "hack-2026", "cachegen"])
@pytest.mark.parametrize("prefill", ["exact", "quantized"])
def test_texts_side_by_side_score_as_they_do_alone(loaded: LoadedModel, name: str, prefill: str) -> None:
    runs = [run_exact(loaded, ids(321, seed), 280, record=True) for seed in (1, 2, 3)]
    together = score(loaded, runs, name, impl="reference", prefill=prefill)
    for exact, (scores, errors) in zip(runs, together, strict=True):
        alone, alone_errors = score(loaded, [exact], name, impl="reference", prefill=prefill)[0]
        assert sum(scores.kl) == pytest.approx(sum(alone.kl), rel=0.02, abs=1e-3)  # a code in a thousand is another
        assert torch.allclose(torch.tensor(errors), torch.tensor(alone_errors), rtol=1e-4)


def test_continuations_side_by_side_are_those_of_each_text(loaded: LoadedModel) -> None:
    starts = torch.stack([ids(200, seed) for seed in (1, 2, 3)])
    together = continue_greedily(loaded, starts, 12)
    assert together.shape == (3, 12)
    assert torch.equal(together, torch.cat([continue_greedily(loaded, row[None], 12) for row in starts]))


def test_batches_hold_what_is_alike() -> None:
    texts, longer = [text(f"t{i}", 30, 20, i) for i in range(3)], text("long", 40, 20, 9)
    found = batches([*texts, longer, replace(texts[0], task="greedy", to_write=4)], 2)
    assert [[item.name for item in some] for some in found] == [["t0", "t1"], ["t2"], ["long"], ["t0"]]
    with pytest.raises(ShapeError, match="at least one text"):
        Conditions(("small",), batch=0)


def test_one_text_that_fails_does_not_take_the_others_with_it(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, calls = RowsCodec.encode, []

    def fails_on_the_second(self: RowsCodec, k: torch.Tensor, v: torch.Tensor, first_position: int = 0) -> torch.Tensor:
        calls.append(k)
        if torch.equal(k, bad[0]):
            raise FormatError("expected less")
        return whole(self, k, v, first_position)

    items, bad = [text(f"t{i}", 260, 240, i) for i in range(3)], list[torch.Tensor]()
    conditions = Conditions(("small",), bf16=False, impl="reference", batch=3)
    monkeypatch.setattr(RowsCodec, "encode", fails_on_the_second)
    bad.append(torch.empty(0))
    measure_cases(loaded, items[1:2], conditions, tmp_path / "of one.jsonl")
    bad[0] = calls[0]
    found = measure_cases(loaded, items, conditions, tmp_path / "of all.jsonl")
    assert [c.error for c in found if c.format == "small"] == [None, "FormatError: expected less", None]
