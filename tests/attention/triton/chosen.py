"""Which cases of a test run: all of them on a GPU; in the interpreter, where a case takes seconds, some."""

from collections.abc import Iterable
from typing import TypeVar

import torch

Case = TypeVar("Case")


def cases(every: Iterable[Case], interpreted: Iterable[Case]) -> list[Case]:
    """``every`` on a GPU, else ``interpreted``: as many of them as take every branch of the kernels."""
    every, interpreted = list(every), list(interpreted)
    assert all(case in every for case in interpreted)
    return every if torch.cuda.is_available() else interpreted
