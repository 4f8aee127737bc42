"""``homkv keys``: who may connect to whom."""

from pathlib import Path
from typing import Annotated

import typer

from homkv.errors import TransferError

app = typer.Typer(help="Make key pairs and say which public keys an instance trusts.", no_args_is_help=True)


@app.command("new")
def new(name: Annotated[Path, typer.Argument(help="NAME.key, for its owner only, and NAME.pub are written.")]) -> None:
    """Make a key pair; prints its public key."""
    from homkv.transport.keys import KeyPair

    pair, public_file = KeyPair.generate(), name.with_name(name.name + ".pub")
    try:
        pair.save(name.with_name(name.name + ".key"))
        public_file.write_text(pair.public + "\n", encoding="utf-8")
    except OSError as error:
        raise TransferError(f"expected to write new files {name}.*, found {error.strerror}; choose another") from error
    print(pair.public)


@app.command("show")
def show(file: Annotated[Path, typer.Argument(help="A .key, .pub or .trust file.")]) -> None:
    """Print public keys of a file, never a secret."""
    from homkv.transport.keys import KeyPair, TrustStore

    if file.suffix == ".key":
        print(KeyPair.load(file).public)
        return
    for key in TrustStore.load(file).keys:
        print(key)


@app.command("trust")
def trust(
    file: Annotated[Path, typer.Argument(help="The instance's trust file; made if it is not there.")],
    keys: Annotated[list[Path], typer.Argument(help=".pub files of those who may connect.")],
    remove: Annotated[bool, typer.Option("--remove", help="Trust them no longer.")] = False,
) -> None:
    """Let the owners of these public keys connect, or no longer."""
    from homkv.transport.keys import TrustStore

    store = TrustStore.load(file) if file.exists() else TrustStore()
    for source in keys:
        for key in TrustStore.load(source).keys:
            store.remove(key) if remove else store.add(key)
    store.save(file)
    print(f"{file}: {len(store.keys)} trusted keys")
