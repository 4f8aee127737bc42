"""What is measured on: texts, pass-keys, lines to copy, greedy continuations, code. One item, one exact run."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from homkv.errors import FormatError, ShapeError, UnsupportedError
from homkv.eval.code import Problem, few_shot, problems, prompt_ids
from homkv.eval.recall import copy_prompts
from homkv.texts import essays, passkey_prompts, token_ids

AMOUNTS = {  # by task: the options of which at least one is needed
    "text": ("texts", "prefix", "scored"),
    "passkey": ("passkeys",),
    "copy": ("copies",),
    "greedy": ("greedy", "greedy_tokens", "prefix"),
    "code": ("code", "code_tokens"),
}
TASKS = tuple(AMOUNTS)


@dataclass(frozen=True)
class Options:
    """How much of each task. Lengths are tokens; ``prefix`` is computed exactly, ``scored`` on the stored KV."""

    tasks: tuple[str, ...] = ("text", "passkey", "copy")
    texts: int = 5
    prefix: int = 1792
    scored: int = 256
    passkeys: int = 8  # of each length
    passkey_lengths: tuple[int, ...] = (1900,)
    copies: int = 2  # of each kind
    copy_length: int = 1900
    greedy: int = 4
    greedy_tokens: int = 128
    code: int = 8
    code_tokens: int = 96
    solved: int = 4  # problems before each prompt
    seed: int = 0
    text: str | None = None  # for texts and greedy continuations; None: the essays

    def __post_init__(self) -> None:
        if unknown := set(self.tasks) - set(TASKS):
            raise UnsupportedError(
                f"expected tasks out of {', '.join(TASKS)}, found {', '.join(sorted(unknown))}; see homkv eval --help"
            )
        wanted = dict.fromkeys(name for task in self.tasks for name in AMOUNTS[task])
        if none := [f"{name} {getattr(self, name)}" for name in wanted if getattr(self, name) < 1]:
            raise ShapeError(f"expected at least 1, found {', '.join(none)}; leave the task out instead")


@dataclass(frozen=True)
class Item:
    """Tokens of which ``prefix`` are computed exactly; the exact model writes ``to_write`` more by itself."""

    task: str
    name: str
    ids: tuple[int, ...]
    prefix: int
    to_write: int = 0
    problem: Problem | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens with those still to be written."""
        return len(self.ids) + self.to_write


def read_text(path: Path) -> str:
    """A text to measure on. Raises FormatError if there is none."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(
            f"expected a text in UTF-8 at {path}, found: {error}; without --text there are essays"
        ) from error


def text_items(
    tokenizer: PreTrainedTokenizerBase, count: int, prefix: int, scored: int, text: str | None = None
) -> list[Item]:
    """Consecutive pieces of a text, by default the essays. Raises ShapeError if it is too short."""
    length, text = prefix + scored + 1, essays() if text is None else text  # the last token is only predicted
    wanted = count * length
    ids = token_ids(tokenizer, text[: max(8 * wanted, 1)])
    if len(ids) < wanted or min(count, prefix, scored) < 1:
        raise ShapeError(
            f"expected at least one text, prefix and scored token and at most {len(ids)} tokens in all, found {count} "
            f"texts of {prefix} + {scored} + 1; choose fewer or shorter ones, or a longer --text"
        )
    return [Item("text", f"text-{i}", tuple(ids[i * length : (i + 1) * length]), prefix) for i in range(count)]


def answer_item(task: str, name: str, prompt: Sequence[int], answer: Sequence[int]) -> Item:
    """An item whose answer is predicted: everything before the prompt's last token is prefix."""
    return Item(task, name, (*prompt, *answer), len(prompt) - 1)


def make_items(tokenizer: PreTrainedTokenizerBase, options: Options) -> list[Item]:
    """All items, in the order in which they are run. Raises ShapeError or UnsupportedError for impossible lengths."""
    o, items = options, []
    if "text" in o.tasks:
        items += text_items(tokenizer, o.texts, o.prefix, o.scored, o.text)
    if "passkey" in o.tasks:
        for length in o.passkey_lengths:
            for p in passkey_prompts(tokenizer, length, o.passkeys, o.seed):
                items.append(answer_item("passkey", f"{length} tokens, depth {p.depth:.2f}", p.prompt, p.answer))
    if "copy" in o.tasks:
        for i, c in enumerate(copy_prompts(tokenizer, o.copy_length, o.copies, seed=o.seed + 1)):
            items.append(answer_item("copy", f"{c.kind} {i}", c.prompt, c.answer))
    if "greedy" in o.tasks:
        for start in text_items(tokenizer, o.greedy, o.prefix, 1, o.text):
            items.append(Item("greedy", start.name, start.ids[: o.prefix + 1], o.prefix, o.greedy_tokens))
    if "code" in o.tasks:
        items += code_items(tokenizer, o)
    return items


def code_items(tokenizer: PreTrainedTokenizerBase, options: Options) -> list[Item]:
    """HumanEval problems, evenly spread, each behind solved ones."""
    everything = problems()
    if not 0 < options.code <= len(everything):
        raise ShapeError(f"expected 1 to {len(everything)} problems, found {options.code}")
    items = []
    for index in range(0, len(everything), len(everything) // options.code)[: options.code]:
        ids = prompt_ids(tokenizer, few_shot(everything, index, options.solved))
        problem = everything[index]
        items.append(Item("code", problem.task_id, tuple(ids), len(ids) - 1, options.code_tokens, problem))
    return items
