"""Prefill and decode servers of vLLM over NIXL, behind the proxy, started as `homkv serve --engine vllm` does.

Run by .ci/vllm. The tests share one fleet and follow each other: the last ones take its decode server away, start it
again, and beside it a server of another format, by the command itself.
"""

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from live_cases import HEAD_DIM, KV_HEADS, LAYERS, SMOLLM2, by_transformers, model_folder, text_tokens

from homkv.spec import RowsSpec
from homkv.vllm.blocks import BlockPlan
from homkv.vllm.fleet import Fleet
from homkv.vllm.launch import ServeOptions, commands
from homkv.vllm.proxy import prefill_body

PLAN = BlockPlan.of(RowsSpec.parse("balanced"), HEAD_DIM)
OTHER = "balanced-long"  # the same pages behind a longer window: only the name tells the servers apart
LEASE_S = 20  # longer than a busy machine takes from the end of a prefill to the fetch
FREED_S = 300
NEW_TOKENS = 8


def is_free(port: int) -> bool:
    with socket.socket() as found:
        return found.connect_ex(("127.0.0.1", port)) != 0


def free_ports() -> int:
    """A port with free ones behind it, all below those that the system hands out to every other server's threads."""
    while True:
        port = random.randrange(12_000, 30_000)
        if all(is_free(port + i) for i in (*range(12), *range(1001, 1013))):
            return port


OPTIONS = ServeOptions(
    model=model_folder(),
    served_name=SMOLLM2,
    plan=PLAN,
    port=free_ports(),
    max_model_len=1024,
    kv_gib=1,
    lease_s=LEASE_S,
    extra=("--enforce-eager", "--max-num-seqs", "8", "--max-num-batched-tokens", "1024"),
)
PREFILL, DECODE, ROUTER = commands(OPTIONS, len(os.sched_getaffinity(0)))
Record = Callable[[str, object], None]
client = httpx.Client(timeout=1800, limits=httpx.Limits(max_keepalive_connections=0))  # see homkv.vllm.proxy


def calm(*pids: int) -> None:
    """NIXL's progress threads poll without rest (docs/vllm.md). From now on they take little from who else has work."""
    processes = [p for pid in pids for p in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True))]

    def seconds() -> dict[int, float]:
        threads = ((p.pid, thread) for p in processes for thread in p.threads())
        return {thread.id: thread.user_time + thread.system_time for pid, thread in threads if thread.id != pid}

    before = seconds()
    time.sleep(1)
    for thread, after in seconds().items():
        if after - before.get(thread, after) > 0.1:
            os.setpriority(os.PRIO_PROCESS, thread, 19)


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    with Fleet([PREFILL, DECODE, ROUTER], lambda name, text: print(f"{name}: {text}")) as running:
        calm(running.pid(PREFILL.name), running.pid(DECODE.name))
        yield running


@pytest.fixture(scope="module")
def ids() -> list[int]:
    return text_tokens()


class ByCommand:
    """One server of the other format that can fetch from the pair's prefill server."""

    def __init__(self, folder: Path) -> None:
        port, self.log, self.server_log = OPTIONS.port + 10, folder / "output", folder / "server.log"
        self.url = f"http://127.0.0.1:{port}"
        fetches = {"kv_connector": "NixlConnector", "kv_role": "kv_consumer", "kv_load_failure_policy": "fail"}
        fetches |= {"kv_buffer_device": "cpu", "kv_connector_extra_config": {"num_threads": 0}}
        argv = [sys.executable, "-m", "homkv.cli", "serve", "--engine", "vllm", "--model", SMOLLM2, "--decode", "0"]
        argv += ["--kv-cache-dtype", OTHER, "--device", "cpu", "--port", str(port), "--max-model-len", "1024"]
        argv += ["--kv-gib", "1", "--logs", str(folder), "--", *OPTIONS.extra]
        argv += ["--kv-transfer-config", json.dumps(fetches)]
        side = {"VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1", "VLLM_NIXL_SIDE_CHANNEL_PORT": str(port + 1001)}
        cores = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {min(cores)})  # a thread on each core would wait for the pair's at every product
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(argv, env=os.environ | side, stdout=output, stderr=subprocess.STDOUT)
        os.sched_setaffinity(0, cores)

    def await_ready(self) -> None:
        while self.url not in self.log.read_text():  # it prints its endpoints when they answer
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.5)

    def stop(self) -> int:
        """As Ctrl-C does; its exit code."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(60)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ByCommand]:
    running = ByCommand(tmp_path_factory.mktemp("other"))
    yield running
    if running.process.poll() is None:
        running.stop()


def body(prompt: list[int], count: int = NEW_TOKENS, **more: object) -> dict[str, object]:
    usual = {"model": SMOLLM2, "prompt": prompt, "max_tokens": count, "temperature": 0, "ignore_eos": True}
    return {**usual, "logprobs": 1, **more}


def ask(url: str, prompt: list[int], **more: object) -> httpx.Response:
    return client.post(f"{url}/v1/completions", json=body(prompt, **more))


def answer(url: str, prompt: list[int]) -> tuple[list[int], list[float]]:
    """Tokens and their logprobs."""
    found = ask(url, prompt, return_token_ids=True)
    assert found.status_code == 200, found.text
    choice = found.json()["choices"][0]
    return choice["token_ids"], choice["logprobs"]["token_logprobs"]


def compare(
    prompt: list[int], found: tuple[list[int], list[float]], record: Record, kv: str = "balanced", apart: bool = True
) -> None:
    """An answer is the transformers path's, but for bfloat16; ``apart``: of the pair."""
    tokens, logprobs = found
    assert len(tokens) == NEW_TOKENS
    ((greedy, expected),) = by_transformers([prompt], [tokens], kv=kv, apart=apart)
    others = sum(a != b for a, b in zip(tokens, greedy, strict=True))
    gap = sum(abs(a - b) for a, b in zip(logprobs, expected, strict=True)) / len(tokens)
    record("measured", f"{len(prompt)} tokens: {others} of {len(tokens)} chosen otherwise, logprobs {gap:.4f} apart")
    assert others <= 1
    assert gap < 0.1


def metric(url: str, name: str) -> float:
    lines = client.get(f"{url}/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if re.match(rf"{re.escape(name)}[ {{]", line))


def await_freed(url: str, within_s: float = FREED_S) -> float:
    """Seconds until a server holds no block for any request."""
    start = time.monotonic()
    while metric(url, "vllm:kv_cache_usage_perc") > 0:
        assert time.monotonic() - start < within_s, "blocks were not freed"
        time.sleep(0.5)
    return time.monotonic() - start


@pytest.mark.parametrize("length", [60, 129])
def test_a_pair_answers_as_the_transformers_path_does(
    fleet: Fleet, ids: list[int], length: int, record_property: Record
) -> None:
    prompt = ids[length : 2 * length]
    compare(prompt, answer(ROUTER.url, prompt), record_property)


def test_the_wire_carries_pages(fleet: Fleet, ids: list[int], record_property: Record) -> None:
    """Bytes as vLLM's own metrics count them, and what 16-bit KV of as many tokens would be. Two blocks of pages."""
    prompt = ids[: 2 * PLAN.block_size]
    before = metric(DECODE.url, "vllm:nixl_bytes_transferred_sum")
    found = answer(ROUTER.url, prompt)
    sent = metric(DECODE.url, "vllm:nixl_bytes_transferred_sum") - before
    assert sent == PLAN.kv_bytes(len(prompt), HEAD_DIM) * LAYERS * KV_HEADS
    plain = len(prompt) * 2 * HEAD_DIM * 2 * LAYERS * KV_HEADS
    sizes = f"{sent / 2**20:.2f} MiB instead of {plain / 2**20:.2f} MiB in 16 bits, {plain / sent:.2f}x"
    record_property("measured", f"{len(prompt)} tokens over NIXL: {sizes}")
    assert plain / sent > 2.4
    compare(prompt, found, record_property)


def test_prefill_blocks_are_freed_when_they_were_fetched(fleet: Fleet) -> None:
    await_freed(PREFILL.url)
    await_freed(DECODE.url)


def stream_until(prompt: list[int], kill: Fleet) -> list[dict[str, object] | str]:
    """Stream a long answer and take the decode server away behind its third event."""
    events: list[dict[str, object] | str] = []
    request = body(prompt, 400, stream=True)
    with client.stream("POST", f"{ROUTER.url}/v1/completions", json=request) as found:
        assert found.is_success, found.read().decode()
        for line in found.iter_lines():
            if line.startswith("data: "):
                text = line.removeprefix("data: ")
                events.append(text if text == "[DONE]" else json.loads(text))
                if len(events) == 3:
                    kill.kill(DECODE.name)
    return events


def test_a_decode_server_dies_and_the_client_is_told(fleet: Fleet, ids: list[int]) -> None:
    events = stream_until(ids[20:220], fleet)
    assert "[DONE]" not in events
    assert isinstance(events[-1], dict)
    assert "error" in events[-1]
    assert ask(ROUTER.url, ids[:100]).status_code == 502
    assert metric(PREFILL.url, "vllm:kv_cache_usage_perc") > 0  # for a while: the next test but one


def test_a_restarted_decode_server_answers_in_full(
    fleet: Fleet, other: ByCommand, ids: list[int], record_property: Record
) -> None:
    fleet.add(DECODE)  # while the other one starts
    calm(fleet.pid(DECODE.name))
    prompt = ids[20:220]
    compare(prompt, answer(ROUTER.url, prompt), record_property)


def test_prefill_blocks_that_nobody_fetched_were_freed_with_their_lease(fleet: Fleet) -> None:
    await_freed(PREFILL.url)


def test_the_command_serves_a_longer_window(other: ByCommand, ids: list[int], record_property: Record) -> None:
    other.await_ready()
    calm(other.process.pid)
    prompt = ids[30:530]
    compare(prompt, answer(other.url, prompt), record_property, kv=OTHER, apart=False)


def test_another_format_is_refused_at_the_handshake(fleet: Fleet, other: ByCommand, ids: list[int]) -> None:
    """Both steps by hand, since the router sends nothing to this server."""
    filled = client.post(f"{PREFILL.url}/v1/completions", json=prefill_body(body(ids[:200])))
    params = filled.json()["kv_transfer_params"]
    found = ask(other.url, ids[:200], kv_transfer_params=params)
    assert found.status_code >= 500, found.text
    assert "compatibility hash mismatch" in other.server_log.read_text(errors="replace")


def test_the_command_stops_everything_that_it_started(other: ByCommand) -> None:
    children = psutil.Process(other.process.pid).children(recursive=True)
    assert children
    assert other.stop() == 0
    assert "all servers stopped" in other.log.read_text()
    assert not psutil.wait_procs(children, timeout=10)[1]


def test_prefill_blocks_for_the_refused_one_are_freed(fleet: Fleet) -> None:
    await_freed(PREFILL.url)
