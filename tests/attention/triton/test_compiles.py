"""Kernels that the interpreter accepts must also compile: launches of other tests, made for a GPU that is not there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.parametrize(
    ("launches", "which"),
    [
        ("test_exact_blocks.py", ""),
        ("test_decode.py", "every_format or every_head_dim or number_of_rows or query_dtypes"),
        ("test_encode.py", "every_format or threads or blocks"),
        ("test_hack_encode.py", "every or dtypes"),
        ("test_staging.py", "read_as"),
        ("test_warp.py", ""),
        ("test_window.py", "append_seals or at_once"),
        ("../../bench/test_kivi_steps.py", "codes_as or store_and"),
    ],
)
def test_launches_compile(launches: str, which: str) -> None:
    """``which`` leaves out tests whose kernels others compile."""
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
        "-k",
        which,
    ]
    path = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": path, "PYTEST_ADDOPTS": ""}
    done = subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert " passed" in done.stdout
