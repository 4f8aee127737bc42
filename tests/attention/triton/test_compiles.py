"""Kernels that the interpreter accepts must also compile: launches of other tests, made for a GPU that is not there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.parametrize(
    "launches",
    ["test_decode.py", "test_encode.py", "test_hack_encode.py", "test_blocks.py", "test_warp.py", "test_window.py"],
)
def test_launches_compile(launches: str) -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "only_compile",
        "-p",
        "no:cacheprovider",
        "-n",
        "0",
        launches,
    ]
    path = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": path, "PYTEST_ADDOPTS": ""}
    done = subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert " passed" in done.stdout
