"""Load a model and measure what homkv needs of it: from the hub, a folder, a GGUF file or a pip package."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from homkv.errors import DTypeError, HomkvError, UnsupportedError
from homkv.models.bundles import BUNDLES, Bundle
from homkv.models.cache import Progress, cache_root, dequantized, file_sha256
from homkv.models.describe import fingerprint, measure_rope, probe_cache, refuse_unsupported, sliding_windows_of
from homkv.models.devices import find_device
from homkv.models.fetch import bundle_files
from homkv.rope import RopeSpec

__all__ = [
    "BUNDLES",
    "Bundle",
    "LoadedModel",
    "Progress",
    "cache_root",
    "describe_model",
    "find_model",
    "load_context_length",
    "load_model",
    "load_tokenizer",
]

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode and the numbers that caches, wire and attention need."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    fingerprint: str  # 32 hex digits; two machines may share pages only if theirs are equal
    sliding_windows: tuple[int | None, ...]  # of all layers, in tokens; None for full attention
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    rope: RopeSpec
    context_length: int  # tokens

    @property
    def num_layers(self) -> int:
        """Layers with full attention: those whose KV becomes pages."""
        return self.sliding_windows.count(None)

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""
        return cast(nn.Embedding, self.model.get_input_embeddings()).num_embeddings


def _silent(_: str) -> None:
    """Take a message and do nothing."""


def load_model(
    name_or_path: str,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    num_threads: int | None = None,
    progress: Progress = _silent,
) -> LoadedModel:
    """Load a model with its tokenizer.

    Args:
        name_or_path: a name of ``homkv models`` (pip packages), a folder, a ``.gguf`` file, or a hub name. A file with
            the bytes of a known model goes by that model's name.
        dtype: ``float32``, ``bfloat16`` or ``float16``.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        num_threads: given to torch if not None.
        progress: called with a line of text at each step, for example ``rich.status.Status.update``.

    Raises:
        UnsupportedError: the model is not found (the message has the command that gets it), its attention is not one
            that homkv computes, or there is no such device.
        DTypeError: an unknown dtype.
        FormatError: a package's GGUF file is not the expected one.
    """
    if dtype not in DTYPES:
        raise DTypeError(f"expected a dtype out of {', '.join(DTYPES)}, found {dtype!r}; float32 is the reference")
    place = find_device(device)
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    with _no_progress_bars():
        name, source = _find(name_or_path, progress)
        progress(f"loading {name}")
        with _explained(name_or_path):
            tokenizer = AutoTokenizer.from_pretrained(source)
            model = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype))
    progress(f"measuring {name}")
    loaded = describe_model(model, cast(PreTrainedTokenizerBase, tokenizer), name)
    loaded.model.to(place)  # behind describe_model: the numbers that pages depend on are the CPU's everywhere
    return loaded


def load_tokenizer(name_or_path: str, *, progress: Progress = _silent) -> PreTrainedTokenizerBase:
    """Load only the tokenizer of what ``load_model`` loads; a GGUF file is dequantized into the cache on the way.

    Raises UnsupportedError and FormatError as ``load_model`` does.
    """
    with _no_progress_bars(), _explained(name_or_path):
        return cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(find_model(name_or_path, progress)))


def load_context_length(name_or_path: str, *, progress: Progress = _silent) -> int:
    """Tokens that a model takes in, from its config alone. Raises as :func:`load_tokenizer` does."""
    with _no_progress_bars(), _explained(name_or_path):
        config = AutoConfig.from_pretrained(find_model(name_or_path, progress)).get_text_config()
    return int(config.max_position_embeddings)


def describe_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> LoadedModel:
    """Measure a model that is already loaded.

    Heads, head_dim and the pairing of RoPE are read from the keys of a two-token forward pass, the frequencies from
    the model's own buffer. Raises UnsupportedError for an attention that homkv does not compute.
    """
    model.eval()
    config = model.config.get_text_config()
    refuse_unsupported(config, name)
    keys, _ = probe_cache(model, name)
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        name=name,
        fingerprint=fingerprint(model),
        sliding_windows=sliding_windows_of(config),
        num_q_heads=config.num_attention_heads,
        num_kv_heads=keys.shape[0],
        head_dim=keys.shape[-1],
        rope=measure_rope(model, keys),
        context_length=int(getattr(config, "max_position_embeddings", tokenizer.model_max_length)),
    )


def find_model(name_or_path: str, progress: Progress = _silent) -> str:
    """Turn a name into what from_pretrained reads; GGUF files go through the cache of dequantized models."""
    return _find(name_or_path, progress)[1]


def _find(name_or_path: str, progress: Progress) -> tuple[str, str]:
    """The model's name, and what from_pretrained reads."""
    path = Path(name_or_path)
    if bundle := BUNDLES.get(name_or_path):
        return bundle.name, str(dequantized(bundle.name, bundle.sha256, lambda: bundle_files(bundle), progress))
    if path.suffix == ".gguf" and path.is_file():
        progress(f"reading {path.name}")
        sha256 = file_sha256(path)
        name = next((b.name for b in BUNDLES.values() if b.sha256 == sha256), None)
        return name or name_or_path, str(dequantized(name or path.stem, sha256, lambda: [path], progress))
    if (path.is_absolute() or name_or_path.startswith(".") or path.suffix == ".gguf") and not path.exists():
        raise UnsupportedError(
            f"expected one of {', '.join(BUNDLES)}, a hub name, or a folder or .gguf file, found nothing at "
            f"{path}; see `homkv models list`"
        )
    return name_or_path, name_or_path


@contextmanager
def _explained(name_or_path: str) -> Iterator[None]:
    """Turn what transformers says of a model that it cannot load into our error."""
    try:
        yield
    except HomkvError:  # says what is wrong already; FormatError is a ValueError as well
        raise
    except (OSError, ValueError) as error:
        raise UnsupportedError(
            f"expected one of {', '.join(BUNDLES)} (`homkv models fetch NAME`), a folder, a .gguf file or a hub name "
            f"that can be reached, found {name_or_path!r}, which transformers cannot load: {str(error).splitlines()[0]}"
        ) from error


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Keep transformers' bars out of the way of the caller's own progress display."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
