"""``homkv doctor --url``: a verdict per metrics, real ones and such as were made for it."""

import json
import sys
from pathlib import Path

import httpx
import pytest
from gateway_cases import serving, text_of
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from rich.console import Console
from serve_cases import prompt, wait_until

from homkv import cli
from homkv.cli.doctor_url import render
from homkv.errors import ShapeError, TransferError, UnsupportedError
from homkv.models import LoadedModel
from homkv.serve.diagnose import GROUPS, Diagnosis, Readings, diagnose
from homkv.serve.lifecycle import PHASES

# Of the soaks in benchmarks/results/serve-soak.jsonl.
RECORDED, CROWDED = (Path(__file__).parent / f"metrics-{name}.prom" for name in ("smollm2", "smollm2-crowded"))


def made(
    seconds: dict[str, float],
    *,
    raw: float = 0,
    wire: float = 0,
    rate: float = 0,
    busy: float = 0.5,
    away: bool = False,
) -> str:
    """Prometheus' text of a service whose ten requests each took ``seconds`` per phase."""
    registry = CollectorRegistry()
    phase = Histogram("homkv_phase_seconds", "x", ["phase"], registry=registry)
    jct, ttft, tpot = (Histogram(f"homkv_{name}_seconds", "x", registry=registry) for name in ("jct", "ttft", "tpot"))
    ratio = Histogram("homkv_compression_ratio", "x", registry=registry)
    moved = Counter("homkv_transfer_bytes", "x", ["kind"], registry=registry)
    failures = Counter("homkv_failures", "x", ["reason"], registry=registry)
    Gauge("homkv_link_bytes_per_second", "x", ["instance"], registry=registry).labels("prefill@a:1").set(rate)
    up = Gauge("homkv_instance_up", "x", ["instance"], registry=registry)
    up.labels("decode@b:2").set(not away)
    for name, value in (("busy", 100 * busy), ("up", 100.0)):
        counter = Counter(f"homkv_instance_{name}_seconds", "x", ["instance"], registry=registry)
        for instance in ("prefill@a:1", "decode@b:2"):
            counter.labels(instance).inc(value)
    for _ in range(10):
        for name in PHASES:
            phase.labels(name).observe(seconds.get(name, 0.0))
        jct.observe(sum(seconds.values()))
        ttft.observe(sum(seconds.values()) - seconds.get("decode", 0.0))
        tpot.observe(seconds.get("decode", 0.0) / 10)
        if wire:
            ratio.observe(raw / wire)
            moved.labels("raw").inc(raw)
            moved.labels("wire").inc(wire)
    if away:
        failures.labels("vanished").inc(3)
    return generate_latest(registry).decode()


def of(text: str, link_gbps: float | None = None) -> Diagnosis:
    return diagnose(Readings(text), link_gbps)


def shown(diagnosis: Diagnosis) -> str:
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render(diagnosis))
    return console.export_text()


@pytest.mark.parametrize(
    ("phase", "bound", "remedy"),
    [
        ("queue", "queue", "decode instances"),
        ("wait", "queue", "max-tokens"),
        ("turn", "prefill", "more prefill instances"),
        ("prefill", "prefill", "shorter prompts"),
        ("pack", "link", "smaller format"),
        ("send", "link", "faster link"),
        ("verify", "link", "link"),
        ("first_token", "link", "link"),
        ("decode", "decode", "shorter answers"),
    ],
)
def test_every_phase_leads_to_its_verdict(phase: str, bound: str, remedy: str) -> None:
    found = of(made(dict.fromkeys(PHASES, 0.1) | {phase: 2.0}))
    assert found.bound == bound
    assert remedy in found.remedy
    assert found.jct_s == pytest.approx(2.8)
    assert sum(found.groups_s.values()) == pytest.approx(found.jct_s)
    assert found.busy == {"prefill@a:1": 0.5, "decode@b:2": 0.5}
    assert f"bound by: {bound}" in shown(found)


def test_the_groups_cover_every_phase_once() -> None:
    assert sorted(name for group in GROUPS.values() for name in group) == sorted(PHASES)


def test_a_busy_decode_instance_wants_another() -> None:
    assert "more decode instances" in of(made({"decode": 3.0}, busy=0.97)).remedy


def test_without_requests_nothing_is_claimed() -> None:
    found = of(made({}).replace("homkv_jct_seconds_count 10.0", "homkv_jct_seconds_count 0.0"))
    assert (found.bound, found.compression) == (None, None)
    assert "no transfer was seen" in shown(found)


SECONDS = {"prefill": 0.5, "send": 0.2, "pack": 0.01, "decode": 1.0}


@pytest.mark.parametrize(
    ("link_gbps", "helps", "says"),
    [
        (0.01, "yes", "at least"),  # 10 MB in 16 bits take 8 s; at most 0.5 s of it can hide
        (0.15, "unclear", "if nothing did"),  # 0.53 s: would hide nearly whole
        (10.0, "no", "at most"),  # 8 ms: less than was waited for
    ],
)
def test_compression_is_judged_by_the_link(link_gbps: float, helps: str, says: str) -> None:
    text = made(SECONDS, raw=10e6, wire=2e6, rate=link_gbps * 1e9 / 8)
    for found in (of(text), of(text, link_gbps)):
        compression = found.compression
        assert compression is not None
        assert compression.helps == helps
        assert compression.raw_link_s == pytest.approx(10e6 * 8 / (link_gbps * 1e9))
        assert compression.wire_link_s == pytest.approx(compression.raw_link_s / 5)
        assert compression.gain_most_s == pytest.approx(compression.raw_link_s - 0.21)
        assert f"compression helps: {helps}" in shown(found)
        assert says in shown(found)
    assert "give --link-gbps" in shown(of(text))
    assert "give --link-gbps" not in shown(of(text, link_gbps))


def test_what_should_not_be_is_named() -> None:
    found = of(made({"decode": 1.0}, away=True))
    assert found.warnings == ["3 requests failed: vanished", "instances that do not answer: decode@b:2"]
    assert "! 3 requests failed: vanished" in shown(found)


def test_between_two_readings_only_the_difference_counts() -> None:
    slow, after = made({"decode": 1.0}), made({"prefill": 4.0})
    double = Readings(after).since(Readings(slow))
    assert diagnose(double).num_done == 0  # as many as before: none ended
    again = Readings(after.replace("homkv_jct_seconds_count 10.0", "homkv_jct_seconds_count 3.0"))
    assert diagnose(again.since(Readings(slow))).num_done == 3  # a counter that fell began again


@pytest.mark.parametrize("text", ["<html>", "up 1\n", "", 'a{b="c"'])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(UnsupportedError, match="expected"):
        Readings(text)


def test_recorded_metrics_of_a_soak() -> None:
    """SmolLM2 on a busy machine, two processes, one link of memory: decode bounds it, compression is of no use."""
    text = RECORDED.read_text()
    found = of(text, 10.0)
    assert found.bound == "decode"
    assert found.num_done > 500
    assert found.num_failed == 0
    assert sum(found.phases_s.values()) == pytest.approx(found.jct_s, rel=1e-6)
    assert found.compression is not None
    assert found.compression.helps == "no"
    assert found.compression.raw_bytes > found.compression.wire_bytes
    slow = of(text, 0.001).compression
    assert slow is not None
    assert slow.helps == "yes"


def test_recorded_metrics_of_a_crowded_service() -> None:
    """The same machine with five times the load: prompts wait for each other. The link's rate is the one it saw."""
    found = of(CROWDED.read_text())
    assert (found.bound, found.remedy) == ("prefill", "more prefill instances")
    assert found.phases_s["turn"] > 10 * found.phases_s["prefill"]
    assert found.compression is not None
    assert (found.compression.helps, found.compression.is_measured) == ("no", True)
    assert found.compression.link_bytes_per_s > 50e6
    assert found.warnings == []  # cancelled requests are none


def test_a_running_service_behind_a_slow_link_is_bound_by_it(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(loaded, link_gbps=0.002, api_key="k") as service:
        headers = {"authorization": "Bearer k"}
        body = {"model": "m", "prompt": text_of(prompt(600, seed=77)), "max_tokens": 2, "ignore_eos": True}
        httpx.post(f"{service.url}/v1/completions", json=body, headers=headers, timeout=60).raise_for_status()
        wait_until(lambda: "} 250000.0" in httpx.get(f"{service.url}/metrics", headers=headers).text)  # 0.002 Gb/s
        command = ["homkv", "doctor", "--url", service.url, "--json"]
        monkeypatch.setattr(sys, "argv", [*command, "--api-key", "k"])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert stopped.value.code == 0
        found = json.loads(capsys.readouterr().out)
        assert found["bound"] == "link"
        assert found["compression"]["helps"] == "yes"
        assert found["compression"]["link_bytes_per_s"] == pytest.approx(250_000)
        monkeypatch.setattr(sys, "argv", [*command, "--api-key", "wrong"])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert stopped.value.code == 2
        assert "--api-key" in capsys.readouterr().err


def test_options_and_addresses_that_make_no_sense() -> None:
    from homkv.cli.doctor_url import examine

    with pytest.raises(ShapeError, match="--over-s"):
        examine("http://x", None, -1.0, None, False)
    with pytest.raises(TransferError, match="homkv serve"):
        examine("http://127.0.0.1:9", None, None, None, False)
    with pytest.raises(TransferError, match="homkv serve"):
        examine("nonsense", None, None, None, False)
