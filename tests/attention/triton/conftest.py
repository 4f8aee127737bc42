"""Kernels run on the GPU where there is one, else in Triton's interpreter on the CPU."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault(
        "TRITON_INTERPRET", "1"
    )  # read when triton is first imported, which no test module has done yet


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the kernels of these tests run."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
