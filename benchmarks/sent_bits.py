"""Bits per element that a prompt's KV takes on the wire and in decode, measured on a model's own keys and values.

python benchmarks/sent_bits.py --model smollm2 --tokens 1792 >> benchmarks/results/sent-bits.jsonl
"""

import json
import platform
from typing import Annotated

import typer

from homkv.eval.exact import run_exact
from homkv.eval.sizes import measure_size
from homkv.formats import format_names
from homkv.models import load_model
from homkv.texts import essays


def main(
    model: Annotated[str, typer.Option(help="As homkv eval takes it.")] = "smollm2",
    tokens: Annotated[int, typer.Option(help="Tokens of the prompt, the first of the essays.")] = 1792,
    kv_cache_dtype: Annotated[list[str] | None, typer.Option(help="Formats; default: all listed.")] = None,
    num_threads: Annotated[int | None, typer.Option(help="Compute threads.")] = None,
) -> None:
    """Print one JSON line per format."""
    loaded = load_model(model, num_threads=num_threads)
    ids = loaded.tokenizer(essays()[: tokens * 8], return_tensors="pt")["input_ids"][0, : tokens + 1]
    exact = run_exact(loaded, ids, tokens)
    for name in kv_cache_dtype or format_names():
        size = measure_size(loaded, exact, name)
        row = {
            "model": model,
            "format": name,
            "tokens": tokens,
            "bits_sent": size.sent,
            "bits_held": size.stored,
            "machine": platform.machine(),
        }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    typer.run(main)
