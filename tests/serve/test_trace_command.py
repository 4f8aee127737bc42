"""``homkv trace``: the waterfall of a request of a running service."""

import json
import sys
from collections.abc import Iterator

import msgspec
import pytest
from gateway_cases import Service, serving, text_of
from rich.console import Console
from serve_cases import prompt
from test_gateway import complete, connect

from homkv import cli
from homkv.cli.trace import COLOURS, printable, render_many, render_one
from homkv.errors import TransferError, UnsupportedError
from homkv.models import LoadedModel
from homkv.serve.lifecycle import PHASES, Record, State
from homkv.serve.lookup import Lookup
from homkv.serve.messages import DecodeTimes, PrefillTimes
from homkv.serve.views import RequestView, view_of


@pytest.fixture(scope="module")
def service(loaded: LoadedModel) -> Iterator[Service]:
    with serving(loaded, num_prefill=2) as made:
        yield made


def run(monkeypatch: pytest.MonkeyPatch, *args: str) -> int:
    monkeypatch.setattr(sys, "argv", ["homkv", "trace", *args])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(stopped.value.code or 0)


def drawn(what: object, width: int) -> list[str]:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(what)
    return console.export_text().splitlines()


def test_a_request_is_drawn_and_told(
    service: Service, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with connect(service) as client:
        answer = complete(client, text_of(prompt(200, seed=5)), max_tokens=5)
    monkeypatch.setenv("COLUMNS", "140")
    assert run(monkeypatch, answer.id, "--url", service.url) == 0
    said = capsys.readouterr().out
    for phase in PHASES:
        assert phase.replace("_", " ") in said
    for word in (answer.id, "done", "200 prompt tokens, 5 new", "on the wire", "prefilling", "instance=prefill@"):
        assert word in said
    assert run(monkeypatch, answer.id, "--url", service.url, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["request_id"] == answer.id
    assert sum(told["phases_s"].values()) == pytest.approx(told["jct_s"], abs=1e-6) == told["elapsed_s"]
    assert told["wire_bytes"] > 0
    assert told["prefill"].startswith("prefill@")
    assert told["decode"].startswith("decode@")


def test_without_an_id_the_newest_are_listed(
    service: Service, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with connect(service) as client:
        ids = [complete(client, text_of(prompt(20 + i)), max_tokens=3).id for i in range(3)]
    monkeypatch.setenv("COLUMNS", "80")
    assert run(monkeypatch, "--limit", "2", "--url", service.url) == 0
    said = capsys.readouterr().out
    assert [i in said for i in ids] == [False, True, True]
    assert said.index(ids[2]) < said.index(ids[1])  # newest first
    assert run(monkeypatch, "--limit", "2", "--json", "--url", service.url) == 0
    assert [told["request_id"] for told in json.loads(capsys.readouterr().out)] == [ids[2], ids[1]]


@pytest.mark.parametrize("request_id", ["nobody", "..", "a/b?c#d", "%2e%2e", "ü" * 50, "<img src=x>"])
def test_unknown_ids_are_named(service: Service, request_id: str) -> None:
    with pytest.raises(UnsupportedError):
        Lookup(service.url).request(request_id)


def test_services_that_are_none(service: Service) -> None:
    with pytest.raises(TransferError, match="homkv serve"):
        Lookup("http://127.0.0.1:9").requests(3)
    with pytest.raises(UnsupportedError, match="found"):
        Lookup(f"{service.url}/v1").overview()


def lived() -> tuple[Record, list[float]]:
    """A request at a clock of its own, which the list holds."""
    now = [100.0]
    return Record("r", 10, clock=lambda: now[0]), now


def test_a_request_under_way_shows_where_it_is() -> None:
    record, now = lived()
    steps = {"queue": State.RESERVING, "wait": State.PREFILLING, "prefill": State.DECODING}
    for phase, state in steps.items():
        now[0] += 1.0
        assert {name: s for name, s in record.phases_s().items() if s} == pytest.approx(
            dict.fromkeys([*steps][: [*steps].index(phase) + 1], 1.0)
        )
        if state is not State.DECODING:
            record.end_phase(phase)
        record.move(state, instance=f"{state}@x")
    record.end_phase("first_token")
    now[0] += 2.0
    assert record.phases_s()["decode"] == pytest.approx(2.0)
    assert record.elapsed_s == pytest.approx(5.0) == sum(record.phases_s().values())
    assert (record.prefill, record.decode) == ("prefilling@x", "reserving@x")


def test_a_failure_is_charged_to_the_phase_it_happened_in() -> None:
    record, now = lived()
    now[0] += 1.0
    record.move(State.RESERVING)
    record.end_phase("queue")
    now[0] += 3.0
    record.move(State.FAILED)
    record.end_phase("decode")  # as the dispatcher does at every end
    now[0] += 50.0
    assert {name: s for name, s in record.phases_s().items() if s} == pytest.approx({"queue": 1.0, "wait": 3.0})
    assert record.elapsed_s == pytest.approx(4.0)


def test_another_attempt_turns_the_first_into_waiting() -> None:
    record, now = lived()
    for state, phase in ((State.RESERVING, "queue"), (State.PREFILLING, "wait")):
        now[0] += 1.0
        record.move(state)
        record.end_phase(phase)
    now[0] += 5.0
    record.move(State.QUEUED)
    assert {name: s for name, s in record.phases_s().items() if s} == pytest.approx({"queue": 7.0})


def finished(request_id: str = "r", error: str | None = None) -> RequestView:
    record, now = lived()
    record.request_id, record.error = request_id, error
    now[0] += 1.0
    record.end_phase("queue")
    now[0] += 1.0
    record.end_phase("wait")
    record.take_prefill(PrefillTimes(101.5, 102.0, 104.0, 104.0, 104.0, 0.5, 0.25, 0.1), 0.0)
    now[0] = 105.0
    record.end_phase("first_token")
    record.take_decode(DecodeTimes(104.5, 105.0, 108.0), 0.0)
    now[0] = 108.0
    record.end_phase("decode")
    return view_of(record)


def test_bars_lie_where_the_phases_were() -> None:
    """8 s on a bar of 48 characters: six for every second."""
    lines = drawn(render_one(finished(), 100), 100)
    bars = {line[2:15].strip(): line for line in lines if "%" in line}
    assert set(bars) == {phase.replace("_", " ") for phase in PHASES}
    start = bars["queue"].index("█")
    spans = {name: (line.find("█") - start, line.count("█")) for name, line in bars.items() if "█" in line}
    assert spans["queue"] == (0, 6)
    assert spans["wait"] == (6, 6)
    assert spans["prefill"] == (12, 12)
    assert spans["decode"] == (30, 18)
    assert "37.5 %" in bars["decode"]
    assert "500.0 ms" in bars["pack"]  # its own time, hidden


def test_lists_fit_the_terminal_and_add_up() -> None:
    short = msgspec.structs.replace(finished("b"), phases_s={"queue": 2.0}, elapsed_s=2.0)
    for width in (80, 120):
        lines = drawn(render_many([finished("a"), short], width), width)
        assert max(map(len, lines)) <= width
        long, brief = (next(line for line in lines if line.startswith(name)).count("█") for name in "ab")
        assert long == pytest.approx(4 * brief, abs=2)
    assert drawn(render_many([], 80), 80)


def test_hostile_text_cannot_steer_the_terminal() -> None:
    hostile = "\x1b]0;owned\x07[bold]x[/bold]\x1b[2J\n\u202e"
    assert printable(hostile) == "\ufffd]0;owned\ufffd[bold]x[/bold]\ufffd[2J\ufffd\ufffd"
    for what in (render_one(finished(hostile, error=hostile), 100), render_many([finished(hostile)], 100)):
        text = "\n".join(drawn(what, 100))
        assert "\x1b" not in text.replace("\x1b[0m", "")
        assert "\x07" not in text
        assert "[bold]x[/bold]" in text  # shown, not obeyed


def test_every_phase_has_a_colour() -> None:
    assert tuple(COLOURS) == PHASES
