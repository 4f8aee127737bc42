"""Exit codes and messages of the command line."""

import importlib.metadata
import subprocess
import sys

import pytest
import typer

from homkv import cli
from homkv.errors import CapacityError


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Run ``homkv args`` in this process, with one more command that raises; return the exit code."""

    def call(error: BaseException, *args: str) -> int:
        app = typer.Typer(pretty_exceptions_enable=False)
        app.callback()(cli.options)

        @app.command("boom")
        def boom() -> None:
            raise error

        monkeypatch.setattr(cli, "app", app)
        monkeypatch.setattr(sys, "argv", ["homkv", *args])
        with pytest.raises(SystemExit) as exit_info:
            cli.main()
        return int(exit_info.value.code or 0)

    return call


def test_an_error_is_one_message_without_traceback(run, capsys: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    assert run(CapacityError("expected 4 pages, found 3; free [one]"), "boom") == 2
    said = capsys.readouterr().err
    assert "CapacityError: expected 4 pages, found 3; free [one]" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("args", [("--debug", "boom"), ("boom", "--debug")])
def test_debug_shows_the_traceback(run, args: tuple[str, ...]) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(CapacityError, match="found 3"):
        run(CapacityError("found 3"), *args)


def test_an_interrupt_exits_130(run) -> None:  # type: ignore[no-untyped-def]
    assert run(KeyboardInterrupt(), "boom") == 130


def test_the_version_is_the_installed_one(run, capsys: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    assert run(CapacityError(""), "--version") == 0
    assert capsys.readouterr().out == f"homkv {importlib.metadata.version('homkv')}\n"


def test_a_wrong_option_exits_2(run) -> None:  # type: ignore[no-untyped-def]
    assert run(CapacityError(""), "boom", "--nonsense") == 2


def test_help_is_quick_because_it_imports_no_torch() -> None:
    code = "import sys, homkv.cli; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_module_runs_as_a_program() -> None:
    done = subprocess.run([sys.executable, "-m", "homkv.cli", "--help"], check=True, capture_output=True, text=True)
    assert "formats" in done.stdout
    assert "doctor" in done.stdout
