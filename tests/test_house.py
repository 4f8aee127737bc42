"""Rules of the house that no linter checks: sizes, layering, and what may not appear."""

import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PYTHON = sorted([*ROOT.glob("homkv/**/*.py"), *ROOT.glob("tests/**/*.py")])
SOURCES = [*PYTHON, *sorted(path for end in ("cpp", "h", "hpp", "inc") for path in ROOT.glob(f"homkv/**/*.{end}"))]
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 40  # of code: the docstring is not counted
MAX_KERNEL_LINES = 100

files = pytest.mark.parametrize("path", PYTHON, ids=lambda path: str(path.relative_to(ROOT)))


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    lines = (function.end_lineno or function.lineno) - function.lineno + 1
    if ast.get_docstring(function) is not None:
        docstring = function.body[0]
        lines -= (docstring.end_lineno or docstring.lineno) - docstring.lineno + 1
    return lines


def walk(path: Path) -> Iterator[ast.AST]:
    return ast.walk(ast.parse(path.read_text(encoding="utf-8")))


def test_layers_hold() -> None:
    """In its own process: import-linter reconfigures logging, which would silence the loggers of later tests."""
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as main; main(['--no-cache'])"]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_stay_readable(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_FILE_LINES


def line_limit(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    is_kernel = any("triton.jit" in ast.unparse(decorator) for decorator in function.decorator_list)
    return MAX_KERNEL_LINES if is_kernel else MAX_FUNCTION_LINES


@files
def test_functions_stay_readable(path: Path) -> None:
    functions = [node for node in walk(path) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    long = {node.name: code_lines(node) for node in functions if code_lines(node) > line_limit(node)}
    assert not long


@files
def test_no_error_is_swallowed(path: Path) -> None:
    for node in walk(path):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"bare except in line {node.lineno}"
            assert not all(isinstance(statement, ast.Pass) for statement in node.body), f"line {node.lineno}"


@files
def test_nothing_runs_code_from_data(path: Path) -> None:
    """Neither the pickle family, by any way of importing it, nor torch.load, eval or exec."""
    forbidden = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
    for node in walk(path):
        if isinstance(node, ast.Import):
            assert forbidden.isdisjoint(alias.name.split(".")[0] for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] not in forbidden
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in {"eval", "exec", "torch.load", "__import__"}, f"line {node.lineno}"


def test_test_modules_have_names_of_their_own() -> None:
    """Tests are no packages: of two modules with one name pytest would collect only the first."""
    names = Counter(path.name for path in Path(__file__).parent.rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []
