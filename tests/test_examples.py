"""Every example runs and says what its stored output says, as far as that does not depend on the machine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from homkv.models import LoadedModel

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


@pytest.mark.model
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_examples_run(example: Path, smollm2: LoadedModel) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, example], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    expected = example.with_suffix(".out").read_text().splitlines()
    found = done.stdout.splitlines()
    assert len(found) == len(expected)
    assert found[-1] == expected[-1]  # bytes are arithmetic; greedy text may turn with an instruction set's last bit
