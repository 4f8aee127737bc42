"""Measure formats on a model: item by item, each computed exactly once, then on every format. Resumable."""

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import msgspec
import torch
import xxhash
from torch import Tensor
from transformers import PreTrainedModel

from homkv.errors import CapacityError, FormatError
from homkv.eval import code
from homkv.eval.exact import ExactRun, continue_greedily, run_exact
from homkv.eval.forced import bind, score, write
from homkv.eval.items import Item
from homkv.eval.jsonl import append_jsonl
from homkv.eval.metrics import TokenScores, edit_similarity, first_miss, token_scores
from homkv.eval.record import EXACT, MODEL_BF16, Case, Record, newest, read_records, rounded
from homkv.models import LoadedModel

Step = Callable[[str], None]  # told which case comes next
FAILURES = (FormatError, CapacityError, torch.OutOfMemoryError)  # of one case: the others go on


@dataclass(frozen=True)
class Conditions:
    """What holds for all cases. ``bf16``: measure the whole model in bfloat16 as well, as a yardstick."""

    formats: tuple[str, ...]
    prefill: str = "exact"
    impl: str | None = None
    run_code: bool = False
    bf16: bool = True

    @property
    def rows(self) -> tuple[str, ...]:
        """All rows, the exact model first."""
        return (EXACT, *((MODEL_BF16,) if self.bf16 else ()), *self.formats)


def case_key(loaded: LoadedModel, conditions: Conditions, item: Item, name: str) -> str:
    """Digest of everything that decides a case's result."""
    layout = name if name in (EXACT, MODEL_BF16) else bind(loaded, name).layout_id
    ran = conditions.run_code and item.problem is not None
    parts = (loaded.fingerprint, name, layout, conditions.prefill, conditions.impl, ran, item.task, item.name)
    return xxhash.xxh3_64(repr((*parts, item.prefix, item.to_write, item.ids)).encode()).hexdigest()


def measure_cases(
    loaded: LoadedModel, items: Sequence[Item], conditions: Conditions, path: Path, step: Step = lambda _: None
) -> list[Case]:
    """Measure every item on every row and append each result to ``path``; what is there already is not repeated.

    ``step`` is called before each case, measured or not. Returns the cases of this selection, old and new. A case whose
    numbers the format cannot hold, or for which memory is too small, is recorded with its error.
    """
    for name in conditions.formats:
        bind(loaded, name)  # before hours of work: unknown names, head_dims not covered
    known, runner, cases = newest(read_records(path)), Runner(loaded, conditions), []
    for item in items:
        for case in runner.cases(item, known, step):
            if case.key not in known:
                append_jsonl(path, case)
            cases.append(case)
    return cases


class Runner:
    """Measures the cases of one item after another."""

    def __init__(self, loaded: LoadedModel, conditions: Conditions) -> None:
        self.loaded, self.conditions = loaded, conditions
        self._in_bf16 = cache(lambda: copy.deepcopy(loaded.model).to(torch.bfloat16))  # half as large again

    def cases(self, item: Item, known: dict[str, Record], step: Step) -> Iterator[Case]:
        """Yield one item's cases, row by row. The exact run is shared, and left out if nothing needs it."""
        exact: ExactRun | None = None
        for name in self.conditions.rows:
            step(f"{item.task}: {item.name}: {name}")
            key = case_key(self.loaded, self.conditions, item, name)
            if isinstance(found := known.get(key), Case):
                yield found
                continue
            if exact is None:
                exact = _exact_run(self.loaded, item)
            yield self._measured(item, exact, name, key)

    def _measured(self, item: Item, exact: ExactRun, name: str, key: str) -> Case:
        start = time.perf_counter()
        case = Case(key, self.loaded.name, name, item.task, item.name, self.conditions.prefill, item.prefix)
        try:
            case = self._scored(item, exact, case)
        except FAILURES as error:
            case = msgspec.structs.replace(case, error=f"{type(error).__name__}: {error}")
        return msgspec.structs.replace(case, seconds=round(time.perf_counter() - start, 2))

    def _scored(self, item: Item, exact: ExactRun, case: Case) -> Case:
        name, conditions, errors = case.format, self.conditions, list[list[float]]()
        if name in (EXACT, MODEL_BF16):
            logits = exact.logits if name == EXACT else _logits(self._in_bf16(), exact)
            scores = token_scores(exact.logits[:-1], logits[:-1], exact.ids[exact.prefix + 1 :])
        else:
            scores, errors = score(self.loaded, exact, name, impl=conditions.impl, prefill=conditions.prefill)
        case = msgspec.structs.replace(
            case,
            kl=rounded(scores.kl),
            nll=rounded(scores.nll),
            top1="".join(map(str, scores.top1)),
            hit="".join(map(str, scores.hit)),
            head_error=[rounded(row) for row in errors],
        )
        if item.problem is not None and name != MODEL_BF16:
            case = _with_code(self.loaded, item.problem, conditions, exact, scores, case)
        return case


def _exact_run(loaded: LoadedModel, item: Item) -> ExactRun:
    ids = torch.tensor(item.ids)
    if item.to_write:
        ids = torch.cat((ids, torch.tensor(continue_greedily(loaded, ids, item.to_write))))
    return run_exact(loaded, ids, item.prefix, record=item.task == "text")


def _with_code(
    loaded: LoadedModel,
    problem: code.Problem,
    conditions: Conditions,
    exact: ExactRun,
    scores: TokenScores,
    case: Case,
) -> Case:
    """Let the format write the completion by itself; compare it with the exact model's, and run it if wanted."""

    def text_of(tokens: list[int]) -> str:
        return code.cut(str(loaded.tokenizer.decode(tokens)))

    text = exact_text = text_of(exact.ids[exact.prefix + 1 :].tolist())
    if case.format != EXACT:
        text = text_of(write(loaded, exact, case.format, first_miss(scores.hit), impl=conditions.impl))
    passed = code.passes_tests(problem, text) if conditions.run_code else None
    return msgspec.structs.replace(
        case, text=text, similarity=round(edit_similarity(text, exact_text), 4), passed=passed
    )


@torch.no_grad()
def _logits(model: PreTrainedModel, exact: ExactRun) -> Tensor:
    """Logits ``[T, V]`` of the tail by another copy of the model, which computes all of it by itself."""
    kept = len(exact.ids) - exact.prefix
    logits: Tensor = model(exact.ids[None], use_cache=False, logits_to_keep=kept).logits[0]
    return logits.float()
