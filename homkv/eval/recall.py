"""Exact-copy tests: a line of digits, identifiers or JSON far back in a text, to be repeated to the letter."""

import json
import random
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from transformers import PreTrainedTokenizerBase

from homkv.errors import UnsupportedError
from homkv.texts import essays, token_ids

KINDS = ("digits", "identifiers", "json")
ALPHABET = string.ascii_letters + string.digits


@dataclass(frozen=True)
class CopyPrompt:
    """``prompt`` ends where the line is to be repeated; ``answer`` is the line. Token ids."""

    kind: str
    line: str
    prompt: tuple[int, ...]
    answer: tuple[int, ...]


def _digits(rng: random.Random) -> str:
    return " ".join("".join(rng.choices(string.digits, k=4)) for _ in range(6))


def _identifier(rng: random.Random) -> str:
    return rng.choice(string.ascii_lowercase) + "".join(rng.choices(ALPHABET, k=7))


def _identifiers(rng: random.Random) -> str:
    return ", ".join(f"{_identifier(rng)}_{rng.randrange(100)}" for _ in range(3))


def _json(rng: random.Random) -> str:
    record = {
        "user": _identifier(rng),
        "port": rng.randrange(1024, 65536),
        "keys": [_identifier(rng), _digits(rng)[:9]],
    }
    return json.dumps(record)


MAKERS: dict[str, Callable[[random.Random], str]] = {"digits": _digits, "identifiers": _identifiers, "json": _json}


def copy_prompts(
    tokenizer: PreTrainedTokenizerBase, num_tokens: int, num_prompts: int, kinds: Sequence[str] = KINDS, seed: int = 1
) -> list[CopyPrompt]:
    """``num_prompts`` prompts of each kind, with the line at depths (i + 0.5) / num_prompts of ``num_tokens`` tokens.

    Raises UnsupportedError for an unknown kind or a length that the essays cannot fill.
    """
    if unknown := set(kinds) - set(MAKERS):
        raise UnsupportedError(f"expected copy tests out of {', '.join(MAKERS)}, found {', '.join(sorted(unknown))}")
    rng = random.Random(seed)

    encode = partial(token_ids, tokenizer)
    filler_ids = encode(essays())
    prompts = []
    for kind in kinds:
        for i in range(num_prompts):
            name, line = f"{kind} {rng.randrange(100, 1000)}", MAKERS[kind](rng)
            planted = encode(f"\n\nRecord {name} is: {line}\n\n")
            cue, answer = encode(f"\n\nTo repeat it exactly, record {name} is:"), encode(f" {line}")
            room = num_tokens - len(planted) - len(cue)
            if not 0 < room < len(filler_ids):
                raise UnsupportedError(
                    f"expected a length between {num_tokens - room + 1} and {num_tokens - room + len(filler_ids) - 1} "
                    f"tokens, found {num_tokens}"
                )
            start, at = rng.randrange(len(filler_ids) - room), int(room * (i + 0.5) / num_prompts)
            filler = filler_ids[start : start + room]
            prompts.append(CopyPrompt(kind, line, (*filler[:at], *planted, *filler[at:], *cue), tuple(answer)))
    return prompts
