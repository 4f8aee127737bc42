"""Measure formats on a model: item by item, each computed exactly once, then on every format. Resumable."""

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path

import msgspec
import torch
import xxhash
from torch import Tensor
from transformers import PreTrainedModel

from homkv.errors import CapacityError, FormatError, ShapeError
from homkv.eval import code
from homkv.eval.exact import ExactRun, check_lengths, continue_greedily, run_exact
from homkv.eval.forced import PREFILLS, bind, score, write
from homkv.eval.items import Item
from homkv.eval.jsonl import append_jsonl
from homkv.eval.metrics import TokenScores, edit_similarity, first_miss, token_scores
from homkv.eval.names import shown
from homkv.eval.record import EXACT, MODEL_BF16, Case, Record, newest, read_records, rounded
from homkv.models import LoadedModel

Step = Callable[[str], None]  # told which case comes next
FAILURES = (FormatError, CapacityError, torch.OutOfMemoryError)  # of one case: the others go on


@dataclass(frozen=True)
class Conditions:
    """What holds for all cases.

    ``bf16``: measure the whole model in bfloat16 as well, as a yardstick. ``batch``: texts of one length that are
    computed side by side.
    """

    formats: tuple[str, ...]
    prefill: str = "exact"
    impl: str | None = None
    run_code: bool = False
    bf16: bool = True
    batch: int = 1

    def __post_init__(self) -> None:
        if self.prefill not in PREFILLS:
            raise FormatError(f"expected a prefill out of {', '.join(PREFILLS)}, found {self.prefill!r}")
        if self.batch < 1:
            raise ShapeError(f"expected at least one text at a time, found {self.batch}; choose 1 or more")

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
    for item in items:
        check_lengths(loaded, item.prefix, item.num_tokens)
    known, runner, cases = newest(read_records(path)), Runner(loaded, conditions), []
    for some in batches(items, conditions.batch):
        for case in runner.cases(some, known, step):
            if case.key not in known:
                append_jsonl(path, case)
            cases.append(case)
    return cases


def batches(items: Sequence[Item], most: int) -> Iterator[list[Item]]:
    """Consecutive items that can be computed side by side, at most ``most`` at a time. Code is written by itself."""

    def kind(item: Item) -> tuple[object, ...]:
        return item.task, item.prefix, item.num_tokens, item.to_write, item.problem

    for _, group in groupby(items, kind):
        alike = list(group)
        yield from (alike[i : i + most] for i in range(0, len(alike), most))


class Runner:
    """Measures the cases of one batch of items after another."""

    def __init__(self, loaded: LoadedModel, conditions: Conditions) -> None:
        self.loaded, self.conditions = loaded, conditions
        self._in_bf16 = cache(lambda: copy.deepcopy(loaded.model).to(torch.bfloat16))  # half as large again

    def cases(self, items: Sequence[Item], known: dict[str, Record], step: Step) -> Iterator[Case]:
        """Yield the cases of items alike, row by row. Exact runs are shared, and left out if nothing needs them."""
        runs: dict[Item, ExactRun] = {}
        for name in self.conditions.rows:
            missing: dict[str, Item] = {}
            for item in items:
                step(f"{item.task}: {item.name}: {shown(name)}")
                key = case_key(self.loaded, self.conditions, item, name)
                if isinstance(found := known.get(key), Case):
                    yield found
                else:
                    missing[key] = item
            if new := [item for item in missing.values() if item not in runs]:
                runs |= zip(new, _exact_runs(self.loaded, new), strict=True)
            if missing:
                yield from self._measured(missing, [runs[item] for item in missing.values()], name)

    def _measured(self, items: dict[str, Item], runs: Sequence[ExactRun], name: str) -> list[Case]:
        """The cases of one row, by key. What fails side by side is tried one by one."""
        start = time.perf_counter()
        cases = [
            Case(key, self.loaded.name, name, item.task, item.name, self.conditions.prefill, item.prefix)
            for key, item in items.items()
        ]
        try:
            cases = self._scored(list(items.values()), runs, cases)
        except FAILURES as error:
            if len(cases) > 1:
                alone = zip(items.items(), runs, strict=True)
                return [case for (key, item), exact in alone for case in self._measured({key: item}, [exact], name)]
            cases = [msgspec.structs.replace(cases[0], error=f"{type(error).__name__}: {error}")]
        seconds = round((time.perf_counter() - start) / len(cases), 2)
        return [msgspec.structs.replace(case, seconds=seconds) for case in cases]

    def _scored(self, items: Sequence[Item], runs: Sequence[ExactRun], cases: Sequence[Case]) -> list[Case]:
        name, conditions = cases[0].format, self.conditions
        if name in (EXACT, MODEL_BF16):
            scored = [(self._own_scores(exact, name), list[list[float]]()) for exact in runs]
        else:
            scored = score(self.loaded, runs, name, impl=conditions.impl, prefill=conditions.prefill)
        done = []
        for item, exact, case, (scores, errors) in zip(items, runs, cases, scored, strict=True):
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
            done.append(case)
        return done

    def _own_scores(self, exact: ExactRun, name: str) -> TokenScores:
        """Scores of the model itself, or of its copy in bfloat16."""
        logits = exact.logits if name == EXACT else _logits(self._in_bf16(), exact)
        return token_scores(exact.logits[:-1], logits[:-1], exact.ids[exact.prefix + 1 :])


def _exact_runs(loaded: LoadedModel, items: Sequence[Item]) -> list[ExactRun]:
    """The exact runs of items alike; what the model has to write is written side by side."""
    ids, first = torch.tensor([item.ids for item in items]), items[0]
    if first.to_write:
        ids = torch.cat((ids, continue_greedily(loaded, ids, first.to_write)), 1)
    return [run_exact(loaded, row, first.prefix, record=first.task == "text") for row in ids]


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
