"""``homkv serve`` as people run it: one command, processes, a signal."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from gateway_cases import text_of, words
from serve_cases import ENDPOINT, OPTIONS, Running, prompt, tiny, twin, wait_until

from homkv.serve.decode import DecodeInstance
from homkv.serve.messages import FromDecode
from homkv.serve.prefill import PrefillInstance
from homkv.transport.endpoint import LinkError
from homkv.transport.keys import KeyPair, Security, TrustStore
from homkv.transport.link import Peer

START_S = STOP_S = 300.0  # far above what either takes: a busy machine is not a failure
PROMPT = text_of(prompt(150, seed=50))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("service-model")
    tiny().model.save_pretrained(path)
    words().save_pretrained(path)
    return path


def test_the_life_of_a_service(folder: Path, tmp_path: Path) -> None:
    """Settings from file, environment and flags; a killed instance comes back; SIGTERM lets a stream finish."""
    (tmp_path / "homkv.toml").write_text('kv_cache_dtype = ["small"]\nprefill = 1\nport = 1\nnum_threads = 1\n')
    command = [sys.executable, "-m", "homkv.cli", "serve", "--port", "18973", "--log-json", "--served-model-name", "m"]
    environment = os.environ | {"HOMKV_MODEL": str(folder), "HOMKV_API_KEY": "k", "TMPDIR": str(tmp_path)}
    with (
        (tmp_path / "log").open("w") as log,
        subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=log, stdout=log) as service,
        httpx.Client(base_url="http://127.0.0.1:18973", timeout=60, headers={"authorization": "Bearer k"}) as client,
    ):
        try:
            wait_until(lambda: is_healthy(client), START_S)
            check_killed_instance_comes_back(client, tmp_path)
            check_stream_survives_sigterm(client, service)
            assert service.wait(STOP_S) == 0
        finally:
            service.kill()
    lines = (tmp_path / "log").read_text().splitlines()
    assert all("time" in json.loads(line) or "timestamp" in json.loads(line) for line in lines if line.startswith("{"))
    assert not list(tmp_path.glob("homkv-*"))  # keys are gone


def check_killed_instance_comes_back(client: httpx.Client, folder: Path) -> None:
    """The request that runs there ends with an error and not with silence; the next one is answered."""
    body = {"model": "m", "prompt": PROMPT, "max_tokens": 1800, "stream": True, "ignore_eos": True}
    pid = int(re.findall(r"decode-0: ready, process (\d+)", (folder / "log").read_text())[-1])
    with client.stream("POST", "/v1/completions", json=body) as stream:
        lines = stream.iter_lines()
        next(lines)
        os.kill(pid, signal.SIGKILL)
        said = [line for line in lines if line.startswith("data: ")]
    assert json.loads(said[-1].removeprefix("data: "))["error"]["code"] == "instance_failed"
    wait_until(lambda: is_healthy(client), START_S)
    assert "homkv_instance_restarts" in client.get("/metrics").text
    answer = client.post("/v1/completions", json={"model": "m", "prompt": PROMPT, "max_tokens": 3, "ignore_eos": True})
    assert answer.json()["usage"]["completion_tokens"] == 3


def is_healthy(client: httpx.Client) -> bool:
    try:
        health = client.get("/health").json()
    except httpx.TransportError:
        return False
    return health["status"] == "ok" and len(health["instances"]) == 2


def check_stream_survives_sigterm(client: httpx.Client, service: "subprocess.Popen[bytes]") -> None:
    assert client.get("/v1/models").json()["data"][0]["kv_cache_dtype"] == "small"
    body = {"model": "m", "prompt": PROMPT, "max_tokens": 120, "stream": True, "temperature": 0, "ignore_eos": True}
    with client.stream("POST", "/v1/completions", json=body) as stream:
        lines = stream.iter_lines()
        next(lines)
        service.send_signal(signal.SIGTERM)
        rest = [line for line in lines if line.startswith("data: ")]
    assert rest[-1] == "data: [DONE]"
    assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"


def test_a_gateway_with_keys_before_instances_elsewhere(folder: Path, tmp_path: Path) -> None:
    loaded = tiny()
    pairs = {name: KeyPair.generate() for name in ("gateway", "prefill", "decode", "stranger")}
    for name, pair in pairs.items():
        pair.save(tmp_path / f"{name}.key")
        (tmp_path / f"{name}.pub").write_text(pair.public)
    trusted = TrustStore([pairs["gateway"].public, pairs["prefill"].public])
    decode = DecodeInstance(
        twin(loaded), ["balanced"], ENDPOINT, Security(pairs["decode"], trusted), max_tokens=4096, options=OPTIONS
    )
    guard = Security(pairs["prefill"], TrustStore([pairs["gateway"].public]))
    prefill = PrefillInstance(loaded, ENDPOINT, guard, options=OPTIONS)
    with Running(decode) as d, Running(prefill) as p:
        with pytest.raises(LinkError, match="refused"):
            Peer(d.address.endpoint, FromDecode, Security(pairs["stranger"]), pairs["decode"].public, OPTIONS)
        command = [sys.executable, "-m", "homkv.cli", "serve", "gateway", "--port", "18974", "--model", str(folder)]
        command += ["--served-model-name", "m", "--keys", str(tmp_path / "gateway.key")]
        command += ["--prefill-at", f"{p.address.endpoint}={tmp_path / 'prefill.pub'}"]
        command += ["--decode-at", f"{d.address.endpoint}={tmp_path / 'decode.pub'}"]
        with (
            (tmp_path / "log").open("w") as log,
            subprocess.Popen(command, stderr=log, stdout=log) as service,
            httpx.Client(base_url="http://127.0.0.1:18974", timeout=60) as client,
        ):
            try:
                wait_until(lambda: is_healthy(client), START_S)
                body = {"model": "m", "prompt": PROMPT, "max_tokens": 9, "temperature": 0, "ignore_eos": True}
                assert client.post("/v1/completions", json=body).json()["usage"]["completion_tokens"] == 9
                wait_until(lambda: 'name="refused.untrusted_key"} 1.0' in client.get("/metrics").text)
                service.send_signal(signal.SIGINT)
                assert service.wait(STOP_S) == 0
            finally:
                service.kill()
