"""Two real processes: they answer, they end with their parent, and their errors carry their logs."""

import json
import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from serve_cases import BYSTANDER, prompt, tiny, wait_until
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from homkv.errors import TransferError
from homkv.eval.compare import kl_divergence
from homkv.models import LoadedModel
from homkv.serve.client import Client, Query
from homkv.serve.spawn import InstanceOptions, LocalCluster

IDS = prompt(150)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model on disk, with a tokenizer of one word per token."""
    path = tmp_path_factory.mktemp("model")
    tiny().model.save_pretrained(path)
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(200)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(path)
    return path


def client(pair: LocalCluster) -> Client:
    (prefill,), (decode,) = pair.addresses("prefill"), pair.addresses("decode")
    return Client(prefill, decode, pair.security)


def is_alive(pid: int) -> bool:
    """Running, or not: a zombie that waits for a parent is not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_the_life_of_a_pair(folder: Path, undisturbed: list[int]) -> None:
    """It answers, keeps its keys to itself, and when one process dies the error says which, with its log."""
    options = InstanceOptions(str(folder), ("fp16", "balanced"), link_gbps=0.004, num_threads=1, max_tokens=2048)
    lines: list[tuple[str, str]] = []
    pair = LocalCluster(options, lambda role, text: lines.append((role, text)))

    def live() -> None:
        with pair:
            files.append(pair.folder)
            check_keys(pair.folder)
            with client(pair) as made:
                check_answer(made, undisturbed)
                check_arenas(pair.processes["prefill-0"].pid)
                kill = pair.processes["prefill-0"].kill
                made.generate(Query(IDS, "balanced", 4), on_layer=lambda layer: kill(), timeout_s=20)

    files: list[Path] = []
    with pytest.raises(TransferError, match="prefill-0 instance ended with code -9; its log") as caught:
        live()
    assert isinstance(caught.value.__cause__, TransferError)  # what the client saw
    assert {("prefill-0", "loading"), ("decode-0", "ready,")} <= {(role, text.split()[0]) for role, text in lines}
    assert pair.processes["decode-0"].returncode == 0  # asked to stop, not killed
    assert not files[0].exists()


def check_keys(folder: Path) -> None:
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    keys = sorted(folder.glob("*.key"))
    assert [key.name for key in keys] == ["decode-0.key", "prefill-0.key"]  # the client's never touches the disk
    assert {stat.S_IMODE(key.stat().st_mode) for key in keys} == {0o600}


def check_arenas(pid: int) -> None:
    environ = Path(f"/proc/{pid}/environ")
    assert not environ.exists() or b"MALLOC_ARENA_MAX=2" in environ.read_bytes().split(b"\0")


def check_answer(made: Client, expected: list[int]) -> None:
    answer = made.generate(BYSTANDER)
    assert answer.tokens == expected
    assert sum(answer.phases_s().values()) == pytest.approx(answer.ttft_s)
    assert answer.prefill is not None
    assert answer.prefill.times.send_busy_s == pytest.approx(answer.prefill.wire_bytes * 8 / 4e6)  # --link-gbps


def test_a_process_that_does_not_stop_is_killed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with LocalCluster(InstanceOptions(str(folder), ("balanced",), num_threads=1)) as pair:
        stuck, sound = pair.processes["decode-0"], pair.processes["prefill-0"]
        stuck.send_signal(signal.SIGSTOP)
        monkeypatch.setattr("homkv.serve.spawn.STOP_TIMEOUT_S", 0.5)
        pair.processes.pop("prefill-0")  # has all the time that it needs
        sound.communicate()
        pair.close()
    assert stuck.returncode == -signal.SIGKILL
    assert sound.returncode == 0


def test_a_process_that_cannot_start_is_an_error_with_its_log(folder: Path) -> None:
    with (
        pytest.raises(TransferError, match=r"(?s)decode-0 instance to start.*code 2; its log:.*--num-threads"),
        LocalCluster(InstanceOptions(str(folder), ("balanced",), num_threads=0)),
    ):
        pytest.fail("started without threads")


def test_a_process_whose_input_ends_while_it_loads_does_not_start(folder: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "homkv.cli",
        "serve",
        "decode",
        "--insecure",
        "--until-eof",
        "--model",
        str(folder),
    ]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == -signal.SIGTERM
    assert "ready" not in done.stdout


PARENT = """
import json, sys, time
from homkv.serve.spawn import InstanceOptions, LocalCluster
options = InstanceOptions(sys.argv[1], ("balanced",), num_threads=1)
def report(role, text):
    if role == "prefill-0" and text.startswith("ready"):
        print(json.dumps([p.pid for p in pair.processes.values()] + [str(pair.folder)]), flush=True)
        time.sleep(600)
pair = LocalCluster(options, report)
pair.__enter__()
"""


def test_no_child_outlives_a_killed_parent(folder: Path) -> None:
    command = [sys.executable, "-c", PARENT, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        watchdog = threading.Timer(300, parent.kill)  # a busy machine takes its time to import torch
        watchdog.start()
        assert parent.stdout is not None
        *children, files = json.loads(parent.stdout.readline())
        watchdog.cancel()
        assert all(is_alive(child) for child in children)
        os.kill(parent.pid, signal.SIGKILL)
    assert len(children) == 2
    wait_until(lambda: not any(is_alive(child) for child in children))
    for file in Path(files).iterdir():  # a killed process cannot remove its keys; only their owner can read them
        file.unlink()
    Path(files).rmdir()


@pytest.mark.model
def test_the_real_model_answers_in_two_processes(smollm2: LoadedModel) -> None:
    """SmolLM2-135M: 16-bit KV says what one process says, pages stay close to it."""
    words = "Prefill computes the prompt, decode writes the answer, and the cache travels between them. " * 14
    ids = smollm2.tokenizer.encode(words)[:200]
    options = InstanceOptions("smollm2", ("fp16", "balanced"), max_tokens=1024)
    with LocalCluster(options) as pair, client(pair) as made:
        exact = made.generate(Query(ids, "fp16", 8, return_logits=True))
        forced = Query(ids, "balanced", 8, forced_ids=exact.tokens, return_logits=True)
        ours = made.generate(forced)
    inputs = torch.tensor([ids])
    out = smollm2.model.generate(
        inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=8, do_sample=False, pad_token_id=0
    )
    assert exact.tokens == out[0, len(ids) :].tolist()
    logits = [np.stack([row for row in run.logits if row is not None]) for run in (exact, ours)]
    assert kl_divergence(*logits).mean() < 0.1
    assert exact.prefill is not None
    assert ours.prefill is not None
    assert ours.prefill.wire_bytes < exact.prefill.wire_bytes
