"""Measure formats on a model: item by item, each computed exactly once, then on every format. Resumable."""

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
import xxhash
from torch import Tensor

from homkv.eval import code
from homkv.eval.exact import ExactRun, continue_greedily, run_exact
from homkv.eval.forced import bind, score, write
from homkv.eval.items import Item
from homkv.eval.jsonl import append_jsonl
from homkv.eval.metrics import TokenScores, edit_similarity, first_miss, token_scores
from homkv.eval.record import EXACT, MODEL_BF16, Case, Record, newest, read_records, rounded
from homkv.models import LoadedModel

Step = Callable[[str], None]  # told which case comes next


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

    ``step`` is called before each case, measured or not. Returns the cases of this selection, old and new.
    """
    for name in conditions.formats:
        bind(loaded, name)  # before hours of work: unknown names, head_dims not covered
    known = newest(read_records(path))
    cases = []
    for item in items:
        keys = {name: case_key(loaded, conditions, item, name) for name in conditions.rows}
        measured = measure_item(loaded, item, conditions, keys, known, step)
        for case in measured:
            if case.key not in known:
                append_jsonl(path, case)
            cases.append(case)
    return cases


def measure_item(
    loaded: LoadedModel,
    item: Item,
    conditions: Conditions,
    keys: dict[str, str],
    known: dict[str, Record],
    step: Step,
) -> Iterator[Case]:
    """Yield one item's cases, in the order of ``keys``. The exact run is shared, and left out if nothing needs it."""
    exact: ExactRun | None = None
    written = None
    for name, key in keys.items():
        step(f"{item.task}: {item.name}: {name}")
        found = known.get(key)
        if isinstance(found, Case):
            yield found
            continue
        if exact is None:
            exact = _exact_run(loaded, item)
            written = _text(loaded, exact) if item.to_write else None
        yield _measure_case(loaded, item, conditions, exact, name, key, written)


def _exact_run(loaded: LoadedModel, item: Item) -> ExactRun:
    ids = torch.tensor(item.ids)
    if item.to_write:
        ids = torch.cat((ids, torch.tensor(continue_greedily(loaded, ids, item.to_write))))
    return run_exact(loaded, ids, item.prefix, record=item.task == "text")


def _text(loaded: LoadedModel, exact: ExactRun) -> str:
    return str(loaded.tokenizer.decode(exact.ids[exact.prefix + 1 :].tolist()))


def _measure_case(
    loaded: LoadedModel,
    item: Item,
    conditions: Conditions,
    exact: ExactRun,
    name: str,
    key: str,
    exact_text: str | None,
) -> Case:
    start = time.perf_counter()
    errors: list[list[float]] = []
    if name in (EXACT, MODEL_BF16):
        logits = exact.logits if name == EXACT else _bf16_logits(loaded, exact)
        scores = token_scores(exact.logits[:-1], logits[:-1], exact.ids[exact.prefix + 1 :])
    else:
        scores, errors = score(loaded, exact, name, impl=conditions.impl, prefill=conditions.prefill)
    case = Case(
        key=key,
        model=loaded.name,
        format=name,
        task=item.task,
        item=item.name,
        prefill=conditions.prefill,
        prefix=item.prefix,
        kl=rounded(scores.kl),
        nll=rounded(scores.nll),
        top1="".join(map(str, scores.top1)),
        hit="".join(map(str, scores.hit)),
        head_error=[rounded(row) for row in errors],
    )
    if item.problem is not None and exact_text is not None and name != MODEL_BF16:
        case = _with_code(loaded, item, conditions, exact, scores, case, code.cut(exact_text))
    return msgspec.structs.replace(case, seconds=round(time.perf_counter() - start, 2))


def _with_code(
    loaded: LoadedModel,
    item: Item,
    conditions: Conditions,
    exact: ExactRun,
    scores: TokenScores,
    case: Case,
    exact_text: str,
) -> Case:
    """Let the format write the completion by itself; compare it with the exact model's, and run it if wanted."""
    text = exact_text
    if case.format != EXACT:
        tokens = write(loaded, exact, case.format, first_miss(scores.hit), impl=conditions.impl)
        text = code.cut(str(loaded.tokenizer.decode(tokens)))
    assert item.problem is not None
    passed = code.passes_tests(item.problem, text) if conditions.run_code else None
    return msgspec.structs.replace(
        case, text=text, similarity=round(edit_similarity(text, exact_text), 4), passed=passed
    )


@torch.no_grad()
def _bf16_logits(loaded: LoadedModel, exact: ExactRun) -> Tensor:
    """Logits ``[T, V]`` of the tail by the whole model in bfloat16, KV included; a second copy of half the size."""
    model = copy.deepcopy(loaded.model).to(torch.bfloat16)
    kept = len(exact.ids) - exact.prefix
    logits: Tensor = model(exact.ids[None], use_cache=False, logits_to_keep=kept).logits[0]
    return logits.float()
