"""Commands for vLLM's servers, and the fleet that runs them, with small servers in their place."""

import json
import os
import shlex
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from homkv.errors import TransferError
from homkv.spec import RowsSpec
from homkv.vllm.blocks import BlockPlan
from homkv.vllm.fleet import Fleet
from homkv.vllm.launch import Command, ServeOptions, commands

PLAN = BlockPlan.of(RowsSpec.parse("balanced"), 128)
SERVER = """
import http.server, sys, time
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
        if self.path == "/die": self.server.dead = True
    def log_message(self, *_): print("asked", flush=True)
server = http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler)
server.dead = False
while not server.dead: server.handle_request()
sys.exit("the reason why it died")
"""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def small_server(name: str) -> Command:
    port = free_port()
    return Command(name, f"http://127.0.0.1:{port}", (sys.executable, "-c", SERVER, str(port)))


def option(command: Command, name: str) -> str:
    return command.argv[command.argv.index(name) + 1]


def test_a_pair_and_its_router() -> None:
    options = ServeOptions("/models/m", "m", PLAN, num_decode=2, port=9000, device="cuda", extra=("--seed", "7"))
    prefill, first, second, router = commands(options, 8)
    assert [c.name for c in (prefill, first, second, router)] == ["prefill-0", "decode-0", "decode-1", "router"]
    roles = [json.loads(option(c, "--kv-transfer-config"))["kv_role"] for c in (prefill, first, second)]
    assert roles == ["kv_producer", "kv_consumer", "kv_consumer"]
    for command in (prefill, first, second):
        assert option(command, "--block-size") == "448"
        assert option(command, "--attention-backend") == PLAN.name
        assert command.argv[-2:] == ("--seed", "7")
    sides = [dict(c.env)["VLLM_NIXL_SIDE_CHANNEL_PORT"] for c in (prefill, first, second)]
    assert len(set(sides)) == 3
    assert [dict(c.env)["CUDA_VISIBLE_DEVICES"] for c in (prefill, first, second)] == ["0", "1", "2"]
    assert option(router, "--prefill") == prefill.url
    assert [router.argv[i + 1] for i, arg in enumerate(router.argv) if arg == "--decode"] == [first.url, second.url]
    assert router.url == "http://127.0.0.1:9000"


def test_servers_take_the_gpus_that_this_process_may_use() -> None:
    options = ServeOptions("m", "m", PLAN, device="cuda", gpus=("4", "6"))
    assert [dict(c.env)["CUDA_VISIBLE_DEVICES"] for c in commands(options, 8)[:2]] == ["4", "6"]
    (server,) = commands(replace(options, num_decode=0), 8)
    assert "CUDA_VISIBLE_DEVICES" not in dict(server.env)  # it may take both


@pytest.mark.parametrize(("num_cores", "cores"), [(8, ["0-3", "4-7"]), (2, ["0-0", "1-1"]), (1, ["0-0", "0-0"])])
def test_servers_on_cpus_share_the_cores(num_cores: int, cores: list[str]) -> None:
    servers = commands(ServeOptions("m", "m", PLAN), num_cores)[:2]
    assert [dict(c.env)["VLLM_CPU_OMP_THREADS_BIND"] for c in servers] == cores
    assert all("--attention-backend" not in c.argv for c in servers)  # vLLM's CPU platform ignores it
    assert {dict(c.env)["HOMKV_VLLM_BACKEND"] for c in servers} == {PLAN.name}


def test_one_server_needs_neither_router_nor_transfer() -> None:
    (server,) = commands(ServeOptions("m", "m", PLAN, num_decode=0, port=9000), 2)
    assert server.url == "http://127.0.0.1:9000"
    assert "--kv-transfer-config" not in server.argv


def test_a_command_survives_the_shell() -> None:
    (server, *_) = commands(ServeOptions("/a folder/m", "m", PLAN), 2)
    words = shlex.split(server.shell())
    assert words[: len(server.env)] == [f"{key}={value}" for key, value in server.env]
    assert tuple(words[len(server.env) :]) == server.argv


def test_a_fleet_comes_up_and_goes(tmp_path: Path) -> None:
    said: list[tuple[str, str]] = []
    servers = [small_server("one"), small_server("two")]
    with Fleet(servers, lambda name, text: said.append((name, text)), tmp_path, timeout_s=30) as fleet:
        assert all(httpx.get(f"{c.url}/health").is_success for c in servers)
        fleet.check()
        pids = [fleet.pid(c.name) for c in servers]
    assert {name for name, text in said if text.startswith("ready")} == {"one", "two"}
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_process_that_ends_is_reported_with_its_log_and_takes_the_others_along(tmp_path: Path) -> None:
    servers = [small_server("one"), small_server("two")]
    with Fleet(servers, lambda *_: None, tmp_path, timeout_s=30) as fleet:
        pid = fleet.pid("one")
        httpx.get(f"{servers[1].url}/die")
        with pytest.raises(TransferError, match="expected two to run, found that it ended with code 1") as found:
            fleet.wait()
    assert "the reason why it died" in str(found.value)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_process_that_never_answers_is_given_up(tmp_path: Path) -> None:
    silent = Command("silent", f"http://127.0.0.1:{free_port()}", (sys.executable, "-c", "import time; time.sleep(60)"))
    start = time.monotonic()
    with (
        pytest.raises(TransferError, match="silent to answer within 1 s"),
        Fleet([silent], lambda *_: None, tmp_path, timeout_s=1),
    ):
        raise AssertionError("must not come up")
    assert time.monotonic() - start < 20


PORT_TAKEN = """
import socket, sys, threading, time
threading.Thread(target=lambda: socket.socket().bind(("127.0.0.1", int(sys.argv[1])))).start()
time.sleep(600)
"""


def test_a_server_that_waits_for_a_taken_port_is_an_error(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        argv = (sys.executable, "-c", PORT_TAKEN, str(other.getsockname()[1]))
        waits = Command("waits", f"http://127.0.0.1:{free_port()}", argv)
        with (
            pytest.raises(TransferError, match=r"ports of waits to be free, found one taken(.|\n)*Address already"),
            Fleet([waits], lambda *_: None, tmp_path, timeout_s=300),
        ):
            raise AssertionError("must not come up")


def test_one_process_is_killed_and_replaced(tmp_path: Path) -> None:
    servers = [small_server("one"), small_server("two")]
    with Fleet(servers, lambda *_: None, tmp_path, timeout_s=30) as fleet:
        pids = {name: fleet.pid(name) for name in ("one", "two")}
        command = fleet.kill("two")
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{servers[1].url}/health")
        fleet.add(command)
        assert fleet.pid("one") == pids["one"]
        assert fleet.pid("two") != pids["two"]
        assert httpx.get(f"{servers[1].url}/health").is_success
