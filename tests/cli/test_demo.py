"""``homkv demo``: what it refuses before anything starts, and what it prints."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from homkv import cli
from homkv.cli.demo import render
from homkv.eval.compare import Agreement
from homkv.eval.demo import Comparison, Run
from homkv.models import load_tokenizer
from homkv.serve import spawn
from homkv.serve.client import PHASES

EXACT = Run(
    kv_cache_dtype="fp16",
    tokens=list(range(64)),
    text="The essay tells how a small team built a machine that everybody wanted. " * 3,
    ttft_s=12.5,
    phases_s=dict.fromkeys(PHASES, 12.5 / 6),
    busy_s={"pack": 0.2, "send": 0.9, "verify": 0.04},
    tpot_s=0.0421,
    num_prompt_tokens=3014,
    raw_kv_bytes=69_442_560,
    wire_bytes=69_460_000,
    kv_bytes=70_000_000,
    bits_per_element=16.01,
)
OURS = replace(
    EXACT,
    kv_cache_dtype="balanced",
    tokens=[*range(60), 0, 0, 0, 0],
    text="Another answer, [bold]in plain text[/bold].",
    ttft_s=12.25,
    wire_bytes=11_576_666,
    kv_bytes=11_700_000,
    bits_per_element=2.67,
)
RESULT = Comparison("smollm2", 1.0, EXACT, OURS, Agreement(64, 60, 60, 0.0161, 0.952, 63))


def printed(result: Comparison, width: int = 80) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"), color_system=None)  # noqa: SIM115
    console.print(render(result))
    return console.export_text()


def test_every_number_is_readable_at_80_columns() -> None:
    lines = printed(RESULT).splitlines()
    assert max(map(len, lines)) <= 80
    rows = {line.strip().split("  ")[0]: line.split("  ") for line in lines}
    table = {name: [cell.strip() for cell in cells if cell.strip()][1:] for name, cells in rows.items()}
    assert table["tokens that agree"] == ["64", "60 of 64"]
    assert table["KL(exact || ours), nats"] == ["0", "0.0161"]
    assert table["top-1 agreement"] == ["1", "0.952 of 63"]
    assert table["KV on the wire"] == ["69.46 MB", "11.58 MB", "6.00x"]
    assert table["KV held at the end"] == ["70.00 MB", "11.70 MB", "5.98x"]
    assert table["bits per element"] == ["16.01", "2.67"]
    assert table["TTFT"] == ["12,500.0 ms", "12,250.0 ms", "1.02x"]
    assert table["send"] == ["(900) 2,083.3 ms", "(900) 2,083.3 ms"]
    assert table["TPOT"] == ["42.1 ms", "42.1 ms", "1.00x"]
    assert set(PHASES) <= set(table)


def test_both_answers_stand_side_by_side_above_the_table() -> None:
    lines = printed(RESULT).splitlines()
    titles = next(i for i, line in enumerate(lines) if "16-bit KV" in line and "balanced" in line and "─" in line)
    table = next(i for i, line in enumerate(lines) if "tokens that agree" in line)
    assert titles < table
    text = "\n".join(lines[titles:table])
    assert "The essay tells how" in text
    assert "[bold]in plain" in text  # a model's words are not markup


def test_a_long_format_name_and_no_text_still_fit() -> None:
    long = replace(RESULT, compressed=replace(OURS, kv_cache_dtype="hack:pi=64,bits=2,se=1,rqe=1", text=" "))
    text = printed(replace(long, link_gbps=None))
    assert max(map(len, text.splitlines())) <= 80
    assert "(no text)" in text
    assert "Gb/s" not in text


def test_the_comparison_is_plain_data() -> None:
    data = json.loads(json.dumps(RESULT.to_dict()))
    assert data["compressed"]["wire_bytes"] == 11_576_666
    assert data["agreement"]["num_equal"] == 60


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    """Run ``homkv demo …`` without processes; return exit code, what stderr said and the options of the pair."""
    started: list[Any] = []

    class NoPair:
        def __init__(self, options: Any, report: Any) -> None:
            started.append(options)
            raise KeyboardInterrupt

    tokenizer = SimpleNamespace(chat_template=None, encode=lambda text, **_: text.split())
    monkeypatch.setattr(spawn, "LocalCluster", NoPair)
    monkeypatch.setattr("homkv.models.load_tokenizer", lambda name, progress: tokenizer)

    def call(*args: str) -> tuple[int, str, list[Any]]:
        started.clear()
        monkeypatch.setattr(sys, "argv", ["homkv", "demo", *args])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return int(stopped.value.code or 0), " ".join(capsys.readouterr().err.split()), started

    return call


@pytest.fixture
def document(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("some words of a text")
    return file


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--prompt-tokens", "0"), "ShapeError: expected at least one prompt token"),
        (("--max-new-tokens", "1"), "ShapeError: expected at least two new tokens"),
        (("--link-gbps", "0"), "ShapeError: expected a positive --link-gbps"),
        (("--link-gbps", "-2"), "ShapeError: expected a positive --link-gbps"),
        (("--link-gbps", "nan"), "ShapeError: expected a positive --link-gbps"),
        (("--kv-cache-dtype", "nonsense"), "FormatError: expected one of"),
        (("--kv-cache-dtype", "hack:prefill=int8"), "UnsupportedError: expected a format with exact prefill"),
        (("--question", "  "), "ShapeError: expected a question"),
        (("--document", "/no/such/file"), "UnsupportedError: expected a UTF-8 text file"),
        (("--document", "/"), "UnsupportedError: expected a UTF-8 text file"),
        (("--json", "/proc/no/such/file"), "UnsupportedError: expected to write"),
        (("--num-threads", "0"), "--num-threads"),
    ],
)
def test_mistakes_are_found_before_a_process_starts(demo, args: tuple[str, ...], says: str) -> None:  # type: ignore[no-untyped-def]
    code, said, started = demo(*args)
    assert code == 2
    assert says in said
    assert "Traceback" not in said
    assert not started


@pytest.mark.parametrize(("content", "says"), [(b" \n", "expected text in"), (b"\xff\xfe\x00x", "UTF-8")])
def test_documents_without_text_are_refused(demo, document: Path, content: bytes, says: str) -> None:  # type: ignore[no-untyped-def]
    document.write_bytes(content)
    code, said, started = demo("--document", str(document))
    assert (code, bool(started)) == (2, False)
    assert says in said


def test_an_unknown_model_is_refused(demo, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    def unknown(name: str) -> None:
        raise OSError("no such thing\nand more")

    monkeypatch.setattr("homkv.models.load_tokenizer", load_tokenizer)  # the real one; the fixture has a tiny one
    monkeypatch.setattr("homkv.models.AutoTokenizer.from_pretrained", unknown)
    code, said, started = demo("--model", "nonsense")
    assert (code, bool(started)) == (2, False)
    assert "'nonsense', which transformers cannot load: no such thing" in said


def test_what_was_asked_reaches_the_processes(demo, document: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    code, _, started = demo(
        *("--document", str(document), "--question", "and a question", "--link-gbps", "2.5", "--num-threads", "3"),
        *("--kv-cache-dtype", "small", "--max-new-tokens", "16", "--json", str(tmp_path / "new" / "out.json")),
    )
    assert code == 130  # where the pair would have started
    (options,) = started
    assert (options.link_gbps, options.num_threads, options.formats) == (2.5, 3, ("fp16", "small"))
    assert options.max_tokens >= 8 + 16


def test_16_bit_is_offered_once(demo, document: Path) -> None:  # type: ignore[no-untyped-def]
    _, _, started = demo("--document", str(document), "--kv-cache-dtype", "fp16")
    assert started[0].formats == ("fp16",)
