"""``homkv serve``: the gateway with its instances, or one role of several machines."""

import json
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, cast

import typer

from homkv.errors import TransferError, UnsupportedError

if TYPE_CHECKING:
    from homkv.models import LoadedModel
    from homkv.serve.settings import Role, ServeSettings
    from homkv.transport.keys import Security

ROLES = ("all", "gateway", "prefill", "decode")


def serve(context: typer.Context) -> None:
    """Serve a model over the OpenAI API; `homkv serve ROLE` runs one role: gateway, prefill or decode."""
    args = list(context.args)
    role = args.pop(0) if args and not args[0].startswith("-") else "all"
    if role not in ROLES:
        raise UnsupportedError(f"expected one of {', '.join(ROLES)} behind serve, found {role!r}; see --help")
    from homkv.serve.settings import load_settings

    settings = load_settings(args, _take_config(args))
    if settings.until_eof:  # stop at its end: at once while the model loads, in order once the instance runs
        threading.Thread(target=_terminate_at_eof, daemon=True).start()
    from homkv.serve import logs

    logs.configure(role, as_json=settings.log_json)
    run: dict[str, Callable[[ServeSettings], None]] = {"prefill": _prefill, "decode": _decode}
    if role in run:
        run[role](settings)
    else:
        from homkv.cli.gateway import run_gateway

        run_gateway(settings, cast("Role", role))


def _take_config(args: list[str]) -> Path | None:
    """Remove ``--config FILE`` from the flags: it says where the other settings are."""
    for i, arg in enumerate(args):
        if arg == "--config" and i + 1 < len(args):
            del args[i]
            return Path(args.pop(i))
        if arg.startswith("--config="):
            return Path(args.pop(i).partition("=")[2])
    return None


def _prefill(settings: "ServeSettings") -> None:
    security = instance_security(settings)
    loaded = _load(settings)
    from homkv.serve.prefill import PrefillInstance

    instance = PrefillInstance(
        loaded,
        settings.endpoint,
        security,
        source=settings.source,
        chunk_tokens=settings.chunk_tokens,
        overlap=settings.overlap,
        prefix_bytes=settings.prefix_bytes,
        link_gbps=settings.link_gbps,
    )
    _serve(lambda stop: instance.run(stop, settings.drain_s), instance.close, instance.listener.endpoint, loaded)


def _decode(settings: "ServeSettings") -> None:
    security = instance_security(settings)
    loaded = _load(settings)
    from homkv.serve.decode import DecodeInstance

    instance = DecodeInstance(
        loaded,
        list(dict.fromkeys(settings.kv_cache_dtype)),
        settings.endpoint,
        security,
        max_tokens=settings.max_tokens,
        max_sequences=settings.max_sequences,
        share_prefixes=settings.share_prefixes,
        lease_s=settings.lease_s,
        max_lease_s=settings.max_lease_s,
    )
    _serve(lambda stop: instance.run(stop, settings.drain_s), instance.close, instance.listener.endpoint, loaded)


def say(**event: object) -> None:
    """Tell the parent process, one JSON line."""
    print(json.dumps(event), flush=True)


def instance_security(settings: "ServeSettings") -> "Security":
    """Keys and trust of a process that other instances reach. Raises TransferError unless it is clear."""
    from homkv.transport.keys import KeyPair, Security, TrustStore

    keys, trust, insecure = settings.keys, settings.trust, settings.insecure
    if insecure == (keys is not None) or (keys is None) != (trust is None):
        given = [name for name, on in (("--keys", keys), ("--trust", trust), ("--insecure", insecure)) if on]
        raise TransferError(
            f"expected --keys FILE and --trust FILE, or --insecure alone, found {' '.join(given) or 'none of them'}; "
            "`homkv keys new NAME` makes keys and `homkv keys trust` fills the other side's trust file"
        )
    if keys is None or trust is None:
        return Security(insecure=True)
    return Security(KeyPair.load(keys), TrustStore.load(trust))


def _load(settings: "ServeSettings") -> "LoadedModel":
    from homkv.models import load_model

    threads = settings.num_threads
    return load_model(settings.model, num_threads=threads, progress=lambda text: say(event="loading", text=text))


def _serve(
    run: Callable[[threading.Event], None], close: Callable[[], None], endpoint: str, loaded: "LoadedModel"
) -> None:
    """Say that the instance is ready, then run it until a signal or the end of standard input."""
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    say(event="ready", endpoint=endpoint, model=loaded.name, fingerprint=loaded.fingerprint)
    try:
        run(stop)
    finally:
        close()


def _terminate_at_eof() -> None:
    sys.stdin.read()
    signal.raise_signal(signal.SIGTERM)
