"""What the live tests measured, shown with pytest's summary."""

from typing import Any


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """One line for each number that a test recorded as ``measured``."""
    for report in terminalreporter.getreports("passed"):
        for name, text in report.user_properties:
            if name == "measured":
                terminalreporter.write_line(f"{report.nodeid.rpartition('::')[2]}: {text}")
