"""The commands that serve one model with vLLM: prefill servers, decode servers, and what brings requests to them."""

import json
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from homkv.vllm import BACKEND_VARIABLE, COUNT_NANS, SCHEDULER
from homkv.vllm.blocks import BlockPlan

Device = Literal["cpu", "cuda"]
Router = Literal["vllm-router", "proxy"]
ROLES = {"prefill": "kv_producer", "decode": "kv_consumer"}


@dataclass(frozen=True)
class ServeOptions:
    """What `homkv serve --engine vllm` was asked for. ``model``: a folder or a hub name; ``dtype``: of its weights."""

    model: str
    served_name: str
    plan: BlockPlan
    dtype: str = "bfloat16"
    device: Device = "cpu"
    router: Router = "proxy"
    num_prefill: int = 1
    num_decode: int = 1
    host: str = "127.0.0.1"
    port: int = 8000  # of the router; instance i listens on port + 1 + i
    max_model_len: int | None = None
    kv_gib: int = 4  # on CPUs, which have no memory of their own to fill; vLLM takes whole ones
    lease_s: int = 30  # for which a prefill server keeps KV that nobody fetches
    gpus: tuple[str, ...] = ()  # that servers may use, as CUDA_VISIBLE_DEVICES names them; empty: 0, 1 ...
    python: str = sys.executable  # of an environment with vLLM and homkv
    extra: tuple[str, ...] = ()  # options for every vLLM server

    @property
    def is_pair(self) -> bool:
        """Whether prefill and decode are apart; without decode servers there is one plain server and no router."""
        return self.num_decode > 0


@dataclass(frozen=True)
class Command:
    """One process: its name, what it listens on, and how it is started."""

    name: str
    url: str
    argv: tuple[str, ...]
    env: tuple[tuple[str, str], ...] = ()

    def shell(self) -> str:
        """The command as one would type it."""
        return " ".join([*(f"{key}={shlex.quote(value)}" for key, value in self.env), shlex.join(self.argv)])


def commands(options: ServeOptions, num_cores: int) -> list[Command]:
    """Servers first, the router last. ``num_cores``: of this machine, shared out among servers that compute on CPUs."""
    names = [f"prefill-{i}" for i in range(options.num_prefill)] + [f"decode-{i}" for i in range(options.num_decode)]
    if not options.is_pair:
        names = ["server"]
    servers = [_server(options, name, i, len(names), num_cores) for i, name in enumerate(names)]
    return [*servers, _router(options, servers)] if options.is_pair else servers


def _server(options: ServeOptions, name: str, index: int, count: int, num_cores: int) -> Command:
    port = options.port + 1 + index if options.is_pair else options.port
    argv = [options.python, "-m", "vllm.entrypoints.openai.api_server"]
    argv += ["--model", options.model, "--served-model-name", options.served_name, "--dtype", options.dtype]
    argv += ["--host", options.host, "--port", str(port), "--block-size", str(options.plan.block_size)]
    argv += ["--scheduler-cls", SCHEDULER]
    if options.max_model_len is not None:
        argv += ["--max-model-len", str(options.max_model_len)]
    if options.device == "cuda":
        argv += ["--attention-backend", options.plan.name]
    if options.is_pair:
        transfer = {"kv_connector": "NixlConnector", "kv_role": ROLES[name.split("-")[0]]}
        transfer |= {"kv_buffer_device": options.device, "kv_load_failure_policy": "fail"}
        argv += ["--kv-transfer-config", json.dumps(transfer | {"kv_connector_extra_config": _nixl(options)})]
    env = dict(_environment(options, index, count, num_cores))
    return Command(name, f"http://{options.host}:{port}", (*argv, *options.extra), tuple(env.items()))


def _nixl(options: ServeOptions) -> dict[str, int]:
    """NIXL's settings. Its default of four threads polls without rest, which on a CPU takes the model's cores away."""
    return {"kv_lease_duration": options.lease_s} | ({"num_threads": 0} if options.device == "cpu" else {})


def _environment(options: ServeOptions, index: int, count: int, num_cores: int) -> Iterator[tuple[str, str]]:
    """Settings that vLLM reads from the environment only."""
    yield BACKEND_VARIABLE, options.plan.name
    yield COUNT_NANS, "1"
    if options.device == "cpu":
        first, stop = (max(num_cores, count) * i // count for i in (index, index + 1))
        yield "VLLM_CPU_OMP_THREADS_BIND", f"{first % num_cores}-{(stop - 1) % num_cores}"
        yield "VLLM_CPU_KVCACHE_SPACE", str(options.kv_gib)
    elif options.is_pair:  # one each; a single server may take several
        yield "CUDA_VISIBLE_DEVICES", options.gpus[index] if options.gpus else str(index)
    if options.is_pair:
        yield "VLLM_NIXL_SIDE_CHANNEL_HOST", options.host
        yield "VLLM_NIXL_SIDE_CHANNEL_PORT", str(options.port + 1001 + index)


def _router(options: ServeOptions, servers: list[Command]) -> Command:
    prefill = [s.url for s in servers if s.name.startswith("prefill")]
    decode = [s.url for s in servers if s.name.startswith("decode")]
    url = f"http://{options.host}:{options.port}"
    where = ["--host", options.host, "--port", str(options.port)]
    if options.router == "vllm-router":
        argv = ["vllm-router", "--vllm-pd-disaggregation", "--kv-connector", "nixl", "--policy", "round_robin"]
    else:
        argv = [options.python, "-m", "homkv.vllm.proxy"]
    for flag, urls in (("--prefill", prefill), ("--decode", decode)):
        for server in urls:
            argv += [flag, server]
    return Command("router", url, (*argv, *where))
