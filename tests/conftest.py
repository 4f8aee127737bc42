"""Fixtures that several test folders share: threads, seeds and the real model."""

import logging
import os
from collections.abc import Iterator

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():  # before anything imports Triton: kernels are then interpreted on the CPU
    os.environ.setdefault("TRITON_INTERPRET", "1")

from homkv.attention.triton.runtime import is_interpreting
from homkv.errors import UnsupportedError
from homkv.models import LoadedModel, load_model

if is_interpreting():
    import fast_interpreter

    fast_interpreter.install()

IN_CI = bool(os.environ.get("CI"))


# Elsewhere every run tries other examples; what CI says must follow from the code alone.
hypothesis.settings.register_profile("ci", derandomize=True, deadline=None)
if IN_CI:
    hypothesis.settings.load_profile("ci")


def pytest_configure() -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _logging() -> Iterator[None]:
    """A command sets up the logging of its whole process; the next test must find it as it was."""
    loggers = [logging.getLogger(name) for name in (None, "httpx", "uvicorn.access")]
    before = [(logger, logger.level, list(logger.handlers)) for logger in loggers]
    yield
    for logger, level, handlers in before:
        logger.setLevel(level)
        logger.handlers = handlers


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where Triton kernels run: the GPU if there is one, else the CPU, interpreted."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def smollm2() -> LoadedModel:
    """SmolLM2-135M-Instruct. Without its package a local run skips and says so; CI fails."""
    try:
        return load_model("smollm2")
    except UnsupportedError as error:
        if IN_CI:
            raise
        pytest.skip(str(error))
