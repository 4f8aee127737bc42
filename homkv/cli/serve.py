"""``homkv serve prefill`` and ``homkv serve decode``: one instance of the disaggregated system."""

import json
import logging
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from homkv.errors import ShapeError, TransferError
from homkv.spec import DEFAULT_FORMAT

if TYPE_CHECKING:
    from homkv.models import LoadedModel
    from homkv.transport.keys import Security

app = typer.Typer(help="Run one instance; `homkv demo` runs both.", no_args_is_help=True)

Model = Annotated[str, typer.Option(help="smollm2, qwen2.5-coder-0.5b, a folder, a .gguf file or a hub name.")]
Endpoint = Annotated[str, typer.Option(help="Where to listen; port 0 takes a free one.")]
Keys = Annotated[Path | None, typer.Option(help="This instance's key pair (`homkv serve keys FILE` makes one).")]
Trust = Annotated[Path | None, typer.Option(help="Public keys that may connect, one per line.")]
Insecure = Annotated[bool, typer.Option("--insecure", help="No encryption, no authentication.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Compute threads; default: torch's.")]
UntilEof = Annotated[bool, typer.Option("--until-eof", help="Stop when standard input closes.")]


@app.command()
def keys(file: Annotated[Path, typer.Argument(help="New file for the key pair, readable by you only.")]) -> None:
    """Make a key pair and print its public key."""
    from homkv.transport.keys import KeyPair

    pair = KeyPair.generate()
    try:
        pair.save(file)
    except OSError as error:
        raise TransferError(f"expected to write a new file {file}, found {error.strerror}; choose another") from error
    print(pair.public)


@app.command()
def prefill(
    model: Model = "smollm2",
    endpoint: Endpoint = "tcp://127.0.0.1:0",
    keys: Keys = None,
    trust: Trust = None,
    insecure: Insecure = False,
    link_gbps: Annotated[float | None, typer.Option(help="Send as slowly as a link of this many Gb/s.")] = None,
    num_threads: Threads = None,
    until_eof: UntilEof = False,
) -> None:
    """Compute prompts and send their KV as pages."""
    _watch_input(until_eof)
    security = _security(keys, trust, insecure)
    if link_gbps is not None and not link_gbps > 0:
        raise ShapeError(f"expected a positive --link-gbps, found {link_gbps}; leave it out for an unshaped link")
    loaded = _load(model, num_threads)
    from homkv.serve.prefill import PrefillInstance

    instance = PrefillInstance(loaded, endpoint, security, link_gbps=link_gbps)
    _serve(instance.run, instance.close, instance.listener.endpoint, loaded)


@app.command()
def decode(
    model: Model = "smollm2",
    kv_cache_dtype: Annotated[list[str] | None, typer.Option(help="Formats to accept; `homkv formats`.")] = None,
    endpoint: Endpoint = "tcp://127.0.0.1:0",
    keys: Keys = None,
    trust: Trust = None,
    insecure: Insecure = False,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of KV to hold, per format.")] = 32_768,
    max_sequences: Annotated[int, typer.Option(min=1, help="Sequences to hold, per format.")] = 16,
    lease_s: Annotated[float, typer.Option(help="Seconds to wait for a sequence's next layer.")] = 120.0,
    num_threads: Threads = None,
    until_eof: UntilEof = False,
) -> None:
    """Receive pages, attend on them, stream tokens."""
    _watch_input(until_eof)
    security = _security(keys, trust, insecure)
    if not lease_s > 0:
        raise ShapeError(f"expected a positive --lease-s, found {lease_s}; 120 is the default")
    loaded = _load(model, num_threads)
    from homkv.serve.decode import DecodeInstance

    instance = DecodeInstance(
        loaded,
        list(dict.fromkeys(kv_cache_dtype or [DEFAULT_FORMAT])),
        endpoint,
        security,
        max_tokens=max_tokens,
        max_sequences=max_sequences,
        lease_s=lease_s,
    )
    _serve(instance.run, instance.close, instance.listener.endpoint, loaded)


def _say(**event: object) -> None:
    print(json.dumps(event), flush=True)


def _security(keys: Path | None, trust: Path | None, insecure: bool) -> "Security":
    from homkv.transport.keys import KeyPair, Security, TrustStore

    if insecure == (keys is not None) or (keys is None) != (trust is None):
        given = [name for name, on in (("--keys", keys), ("--trust", trust), ("--insecure", insecure)) if on]
        raise TransferError(
            f"expected --keys FILE and --trust FILE, or --insecure alone, found {' '.join(given) or 'none of them'}; "
            "`homkv serve keys FILE` makes keys and prints the line for the other side's trust file"
        )
    if keys is None or trust is None:
        return Security(insecure=True)
    try:
        return Security(KeyPair.load(keys), TrustStore.load(trust))
    except UnicodeDecodeError as error:
        raise TransferError(f"expected a public key per line in {trust}, found bytes that are no text") from error


def _load(model: str, num_threads: int | None) -> "LoadedModel":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    from homkv.models import load_model

    return load_model(model, num_threads=num_threads, progress=lambda text: _say(event="loading", text=text))


def _serve(
    run: Callable[[threading.Event], None], close: Callable[[], None], endpoint: str, loaded: "LoadedModel"
) -> None:
    """Say that the instance is ready, then run it until a signal or the end of standard input."""
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    _say(event="ready", endpoint=endpoint, model=loaded.name, fingerprint=loaded.fingerprint)
    try:
        run(stop)
    finally:
        close()


def _watch_input(until_eof: bool) -> None:
    """Stop at the end of standard input: at once while the model loads, in order once the instance runs."""
    if until_eof:
        threading.Thread(target=_terminate_at_eof, daemon=True).start()


def _terminate_at_eof() -> None:
    sys.stdin.read()
    signal.raise_signal(signal.SIGTERM)
