"""A few faults of a seeded plan, in threads, under keys and in real processes; `homkv chaos` injects hundreds."""

import re
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from serve_cases import wait_until
from typer.testing import CliRunner

from homkv.cli import app
from homkv.errors import FormatError, UnsupportedError
from homkv.eval.chaos.cases import Case, make_cases
from homkv.eval.chaos.judge import References, Watched, make_query
from homkv.eval.chaos.processes import ProcessCell
from homkv.eval.chaos.record import Outcome, Plan, Totals, read_lines, read_outcomes
from homkv.eval.chaos.run import measure_clean_s, run_case
from homkv.eval.chaos.service import Cell, Subject, open_subject
from homkv.eval.chaos.threads import ThreadCell
from homkv.serve.decode import DecodeInstance
from homkv.serve.messages import Choice, Token
from homkv.serve.query import Policy
from homkv.serve.status import StatusBoard
from homkv.testing.faults import MESSAGES, Fault, Where, combinations, random_plan
from homkv.testing.models import VOCABULARY
from homkv.testing.names import SEAL_BYTES, SealedNames
from homkv.transport import wire
from homkv.transport.endpoint import encode_message


@pytest.fixture(scope="module")
def subject() -> Iterator[Subject]:
    with open_subject("tiny") as made:
        yield made


@pytest.fixture(scope="module")
def references(subject: Subject) -> Iterator[References]:
    with ThreadCell(subject, is_slow=False) as cell:
        yield References(cell)


def inject(cell: Cell, references: References, faults: list[Fault], policy: Policy = "fail") -> list[Outcome]:
    return [run_case(cell, references, Case(i, fault, "threads"), policy) for i, fault in enumerate(faults)]


def assert_survived(outcomes: list[Outcome]) -> None:
    assert [o.broken for o in outcomes] == [[]] * len(outcomes)
    assert not any(o.passed_by for o in outcomes)
    assert sum(o.leaked_blocks + o.num_wrong for o in outcomes) == 0


# -- plans -------------------------------------------------------------------------------------------------------------


def test_a_plan_follows_from_its_seed_and_covers_everything() -> None:
    everything = combinations()
    plan = random_plan(3, len(everything))
    assert plan == random_plan(3, len(everything))
    assert plan != random_plan(4, len(everything))
    assert {(f.kind, f.where, f.message) for f in plan} == set(everything)


def test_every_service_has_its_faults() -> None:
    cases = make_cases(3, 2 * len(combinations()))
    assert {c.fault.kind for c in cases if c.service == "processes"} == {"kill", "stop", "restart", "clock_jump"}
    others = [{(c.fault.kind, c.fault.message) for c in cases if c.service == s} for s in ("threads", "keys")]
    assert others[0] == others[1]
    assert {c.service for c in make_cases(3, 40, ["drop"], ["processes"])} == {"processes"}


def test_faults_that_do_not_exist_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="prefill:Token"):
        Fault("drop", "prefill", "Token")
    with pytest.raises(UnsupportedError, match="found earthquake"):
        make_cases(0, 1, ["earthquake"])  # type: ignore[list-item]
    with pytest.raises(UnsupportedError, match="found clouds"):
        make_cases(0, 1, services=["clouds"])  # type: ignore[list-item]


def test_damage_changes_what_it_says() -> None:
    data = bytes(range(64))
    flipped = Fault("flip", "decode", "frame", seed=5).damage(data)
    assert sum((a ^ b).bit_count() for a, b in zip(data, flipped, strict=True)) == 1
    assert data.startswith(Fault("truncate", "decode", "frame", seed=5).damage(data))


# -- faults ------------------------------------------------------------------------------------------------------------


def test_what_is_lost_damaged_or_killed_is_told_and_never_believed(subject: Subject, references: References) -> None:
    faults = [
        Fault("drop", "decode", "Token", nth=11),  # the last one that is told: Done must not hide it
        Fault("flip", "decode", "Token", seed=7),
        Fault("flip", "decode", "frame", seed=8),
        Fault("restart", "decode", "frame", nth=1),
        Fault("cut", "decode", "Finish"),
    ]
    with ThreadCell(subject) as cell:
        outcomes = inject(cell, references, faults)
    assert_survived(outcomes)
    assert all("failed" in o.states and o.errors for o in outcomes)


def test_an_answer_is_whole_when_its_last_token_was_told(subject: Subject, references: References) -> None:
    """Done is lost with its instance: nothing is computed again, and nobody is told of an error."""
    patient = subject.patient(3.0)  # the neighbour's second attempt must end in time on a busy machine, too
    with ThreadCell(patient, "recompute") as cell:
        outcomes = inject(cell, references, [Fault("kill", "decode", "Done")], "recompute")
    assert_survived(outcomes)
    assert outcomes[0].states == ["done", "done"]
    assert outcomes[0].errors == []


def test_keys_end_connections_whose_messages_were_harmed(subject: Subject, references: References) -> None:
    faults = [
        Fault("flip", "decode", "Token", seed=7),
        Fault("duplicate", "decode", "frame"),
        Fault("truncate", "prefill", "Prefill", seed=1),
        Fault("reorder", "prefill", "Progress"),
    ]
    with ThreadCell(subject, with_keys=True) as cell:
        outcomes = inject(cell, references, faults)
    assert_survived(outcomes)
    assert all(o.noticed for o in outcomes)


def test_sealed_messages_are_told_apart(subject: Subject) -> None:
    """What passes under keys has the names that it has without."""
    seen: list[dict[Where, set[str]]] = []
    for with_keys in (False, True):
        with ThreadCell(subject, with_keys=with_keys, is_slow=False) as cell:
            for seed, length in ((1, 150), (2, 300)):
                assert Watched(cell.dispatcher, make_query(seed, length)).wait(20)
            late = Watched(cell.dispatcher, make_query(3, 300))
            wait_until(partial(bool, late.told))
            cell.dispatcher.cancel(late.request_id)
            assert late.wait(20)
            time.sleep(1.2)  # one more Status
            seen.append({where: set(link.counts) & {*MESSAGES[where]} for where, link in cell.links.items()})
            # The first tokens of three requests, five more of two, and what came of the third before its Cancel.
            assert 13 <= cell.links["decode"].counts["Token"] <= 18
            assert cell.links["decode"].counts["Reserve"] == cell.links["decode"].counts["Ticket"] == 3
            assert cell.links["decode"].counts["Done"] in (2, 3)
            assert cell.links["prefill"].counts["Prefill"] == 3
            assert cell.links["prefill"].counts["PrefillDone"] in (2, 3)
    optional = {"Renew", "Failed", "Done", "Cancel"}  # by the clock, or if Cancel comes in time
    plain, sealed = ({where: names - optional for where, names in each.items()} for each in seen)
    assert plain == sealed


def test_a_status_that_has_counted_much_is_told_from_a_token() -> None:
    """Under keys by their lengths; what is counted lengthens a Status."""
    board = StatusBoard("decode", "ab" * 16, ["balanced"])
    gauges = dict.fromkeys(("requests_running", "blocks_free", *"abcdefg"), 1.0)
    board.counters.update(dict.fromkeys(("steps", "tokens", "leases_expired", "failed.LinkError"), 1))
    refused = Counter(dict.fromkeys(("untrusted_key", "handshake", "malformed", "digest", "sequence", "epoch"), 1))
    status = board.report(1, refused, gauges)
    token = Token("a" * 26, 3, Choice(150, -1.25, []), logits=bytes(4 * VOCABULARY))
    for message in (status, token):
        names = SealedNames("decode")
        assert names.name(False, [bytes(SEAL_BYTES + 1)]) == "sealed"
        body = encode_message(message, 1 << 20)
        assert names.name(False, [bytes(SEAL_BYTES + len(body))]) == type(message).__name__


def test_a_killed_and_a_stopped_process(subject: Subject, references: References) -> None:
    """SIGKILL in the middle of a transfer, SIGSTOP for longer than a peer is waited for."""
    with ProcessCell(subject) as cell:
        pid = cell.cluster.processes["decode-0"].pid
        outcomes = inject(
            cell,
            references,
            [Fault("stop", "prefill", "Progress", duration_s=2.5), Fault("kill", "decode", "frame", nth=1)],
        )
        assert cell.cluster.processes["decode-0"].pid != pid
    assert_survived(outcomes)
    assert all("failed" in o.states for o in outcomes)
    assert "restarts decode" in outcomes[1].noticed or "lost decode" in outcomes[1].noticed


def test_the_clock_of_a_process_jumps(subject: Subject, references: References) -> None:
    """By an hour in mid-transfer: the lease is over, the request fails, and the next one is served."""
    with ProcessCell(subject) as cell:
        jumps = [Fault("clock_jump", "decode", message, duration_s=3600.0) for message in ("Ticket", "Done")]
        outcomes = inject(cell, references, jumps)
    assert_survived(outcomes)
    assert {"decode failed.TransferError", "decode leases_expired"} <= set(outcomes[0].noticed)
    assert outcomes[1].states == ["done", "done"]


def test_a_slow_machine_is_waited_for(subject: Subject) -> None:
    assert subject.patient(7.0).request_timeout_s == 7.0 * subject.request_timeout_s
    assert subject.patient(7.0).patient(2.0) == subject.patient(7.0)
    assert 0 < measure_clean_s(subject) < 40 * subject.request_timeout_s


# -- the judge ---------------------------------------------------------------------------------------------------------


def test_the_judge_sees_damage_that_texts_hide(
    subject: Subject, references: References, monkeypatch: pytest.MonkeyPatch
) -> None:
    """tpu-inference#3369: comparing texts did not detect a bad hand-off. With digests off, one flipped bit of a page is
    believed; bytes and attention show it, tokens do not."""
    monkeypatch.setattr(wire, "_digest", lambda unsigned, pieces: bytes(16))
    references.answer(11, 150)  # of a service that is not harmed
    with ThreadCell(subject) as cell:
        (outcome,) = inject(cell, references, [Fault("flip", "decode", "frame", seed=2)])
    assert outcome.states == ["done", "done"]
    assert "KV bytes" in outcome.broken
    assert "attention" in outcome.broken
    assert "tokens" not in outcome.broken
    assert outcome.num_wrong > 0


def test_the_judge_sees_a_leak(subject: Subject, references: References, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("homkv.eval.chaos.run.FREE_TIMEOUT_S", 0.5)
    with ThreadCell(subject) as cell:
        decoder = cell.hosted["decode"].instance
        assert isinstance(decoder, DecodeInstance)
        (engine,) = decoder.engines.values()
        monkeypatch.setattr(engine, "free", lambda seq: None)
        (outcome,) = inject(cell, references, [Fault("delay", "decode", "Done", duration_s=0.05)])
    assert outcome.leaked_blocks > 0
    assert any("everything freed" in name for name in outcome.broken)


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command_records_and_goes_on(tmp_path: Path) -> None:
    record = tmp_path / "chaos.jsonl"
    command = ["chaos", "--kind", "duplicate", "--service", "threads", "--seed", "5", "--json", str(record)]
    done = CliRunner().invoke(app, [*command, "--faults", "3"])
    assert done.exit_code == 0, done.output
    assert "3 faults injected" in done.output
    lines = read_lines(record)
    plan = Plan("tiny", 5, 3, ["duplicate"], ["threads"])
    assert len(read_outcomes(record, plan)) == 3
    assert [line.injected for line in lines if isinstance(line, Totals)][-1] == 3

    text = record.read_text().splitlines(keepends=True)
    kept = [line for line in text if not re.search(r'"record":"totals"|"number":2', line)]
    record.write_text("".join(kept) + '{"record":"fault","numb')  # interrupted while the third was written
    again = CliRunner().invoke(app, [*command, "--faults", "3"])
    assert again.exit_code == 0, again.output
    assert len(read_outcomes(record, plan)) == 3
    more = CliRunner().invoke(app, [*command, "--faults", "4"])
    assert more.exit_code == 0, more.output
    longer = read_outcomes(record, Plan("tiny", 5, 4, ["duplicate"], ["threads"]))
    assert {o.number for o in longer} == {0, 1, 2, 3}
    for other in (["--faults", "3"], ["--faults", "4", "--kind", "drop"]):
        refused = CliRunner().invoke(app, [*command, *other])
        assert isinstance(refused.exception, UnsupportedError)
    record.write_text("{}\n")
    with pytest.raises(FormatError, match="line 1"):
        read_lines(record)
