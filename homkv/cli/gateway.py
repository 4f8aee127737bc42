"""The gateway process of ``homkv serve``: with local instances (all) or with those of other hosts (gateway)."""

import signal
import socket
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from homkv.errors import TransferError, UnsupportedError

if TYPE_CHECKING:
    from homkv.serve.fleet import Address
    from homkv.serve.settings import Role, ServeSettings
    from homkv.serve.spawn import InstanceOptions
    from homkv.transport.keys import Security


def run_gateway(settings: "ServeSettings", role: "Role") -> None:
    """Start what is needed, serve until a signal, drain, stop."""
    import uvicorn

    from homkv.models import load_context_length, load_tokenizer
    from homkv.serve.dispatch import Dispatcher
    from homkv.serve.gateway.app import Gateway, make_app
    from homkv.serve.metrics import Metrics
    from homkv.serve.query import DispatchOptions

    console = Console(stderr=True)
    settings.read_api_key()  # an error now, not behind the models
    with ExitStack() as stack:
        listening = stack.enter_context(_bind(settings.host, settings.port))
        prefills, decodes, security = _instances(settings, role, stack, console)
        tokenizer = load_tokenizer(settings.model)
        limits = DispatchOptions(
            policy=settings.policy,
            max_requests=settings.max_requests,
            max_records=settings.max_records,
            request_timeout_s=settings.request_timeout_s,
        )
        metrics = Metrics()
        dispatcher = Dispatcher(prefills, decodes, security, limits=limits, on_end=metrics.ended)
        stack.callback(dispatcher.close)
        gateway = Gateway(settings, tokenizer, load_context_length(settings.model), dispatcher, metrics)
        config = uvicorn.Config(
            make_app(gateway, dispatcher.close),
            log_config=None,
            timeout_graceful_shutdown=int(settings.drain_s) + 1,
            timeout_keep_alive=30,
            backlog=2048,
        )
        console.print(f"[bold]homkv[/bold] serves {settings.served_name} at {_url(listening)}/v1")
        for number in (signal.SIGINT, signal.SIGTERM):  # uvicorn raises them again when it has shut down: we clean up
            signal.signal(number, lambda *_: None)
        uvicorn.Server(config).run(sockets=[listening])


def _bind(host: str, port: int) -> socket.socket:
    """Take the gateway's port, before models are loaded; who connects is refused until it serves."""
    made = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((host, port))
    except OSError as error:
        made.close()
        raise TransferError(
            f"expected to listen at --host {host} --port {port}, found {error.strerror}; choose others, --port 0 for a "
            "free one"
        ) from error
    return made


def _url(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _instances(
    settings: "ServeSettings", role: "Role", stack: ExitStack, console: Console
) -> "tuple[list[Address], list[Address], Security]":
    """Addresses of all instances and the keys to reach them."""
    from homkv.serve.spawn import LocalCluster
    from homkv.serve.supervise import Supervisor
    from homkv.transport.keys import KeyPair, Security

    remote = [_addresses(settings, texts) for texts in (settings.prefill_at, settings.decode_at)]
    if role == "gateway":
        if not all(remote):
            raise UnsupportedError(
                "expected --prefill-at and --decode-at for a gateway alone, found "
                f"{len(remote[0])} and {len(remote[1])}; `homkv serve` starts instances of its own"
            )
        if (settings.keys is None) != settings.insecure:
            raise TransferError(
                "expected --keys FILE or --insecure, found both or neither; `homkv keys new` makes keys"
            )
        security = Security(insecure=True) if settings.keys is None else Security(KeyPair.load(settings.keys))
        return remote[0], remote[1], security
    if any(remote) or settings.prefill == 0 or settings.decode == 0:
        raise UnsupportedError(
            "expected at least one prefill and one decode instance here and none elsewhere, found "
            f"{settings.prefill} and {settings.decode}; use `homkv serve gateway` for instances elsewhere"
        )
    cluster = stack.enter_context(
        LocalCluster(_options(settings), lambda *line: console.print(": ".join(line), highlight=False))
    )
    stack.enter_context(Supervisor(cluster))
    return cluster.addresses("prefill"), cluster.addresses("decode"), cluster.security


def _options(settings: "ServeSettings") -> "InstanceOptions":
    """What the instances of this machine are started with."""
    from homkv.serve.spawn import InstanceOptions

    return InstanceOptions(
        settings.model,
        tuple(dict.fromkeys(settings.kv_cache_dtype)),
        settings.prefill,
        settings.decode,
        settings.link_gbps,
        settings.threads,
        settings.max_tokens,
        log_json=settings.log_json,
        show_logs=True,
        prefill={name: getattr(settings, name) for name in PREFILL_SETTINGS},
        decode={name: getattr(settings, name) for name in DECODE_SETTINGS},
    )


PREFILL_SETTINGS = ("source", "chunk_tokens", "prefix_bytes", "overlap", "drain_s")
DECODE_SETTINGS = ("max_sequences", "lease_s", "max_lease_s", "share_prefixes", "drain_s")


def _addresses(settings: "ServeSettings", texts: list[str]) -> "list[Address]":
    from homkv.serve.fleet import Address
    from homkv.serve.settings import Remote

    found = []
    for remote in map(Remote.parse, texts):
        if (remote.key_file is None) != settings.insecure:
            raise TransferError(
                f"expected tcp://HOST:PORT=FILE.pub, or --insecure and no file, found {remote.endpoint!r}; "
                "`homkv keys new` writes FILE.pub"
            )
        found.append(Address(remote.endpoint, None if remote.key_file is None else _public_key(remote.key_file)))
    return found


def _public_key(file: Path) -> str:
    from homkv.transport.keys import TrustStore

    keys = TrustStore.load(file).keys
    if len(keys) != 1:
        raise TransferError(
            f"expected one public key in {file}, found {len(keys)}; `homkv keys new` writes such a file"
        )
    return keys[0]
