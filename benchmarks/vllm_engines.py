"""Stock vLLM with homkv's pages, against its own KV caches: how many sequences fit, and how many tokens per second.

    python benchmarks/vllm_engines.py --kv auto --kv fp8 --kv balanced --kv-gib 6 --prompts 18 --prompt-tokens 16384

Every KV cache gets an engine of its own in a process of its own, the same memory, the same prompts (random tokens, no
prefix cache, each in one piece) and greedy sampling. The model has the shape of Llama 3 8B and weights that vLLM makes
up: neither speed nor capacity depends on them. Needs vLLM; runs on GPUs, and with ``--shape tiny`` on CPUs.
"""

import argparse
import faulthandler
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

SHAPES = {
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256},
    "tiny": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 1024},
}  # fmt: skip
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "rope_theta": 500000.0, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
    "torch_dtype": "bfloat16", "initializer_range": 0.02,
}  # fmt: skip
STOCK = ("auto", "fp8")
LONG = 32768  # tokens of a sequence, to compare capacities at
BEGIN = time.perf_counter()
GRAPHS = [1, 2, 4, 8, 12, 16, 20, 24, 32]


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kv", action="append", required=True, help="auto (16 bits), fp8, or a rows format of homkv")
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--kv-gib", type=float, default=6)
    parser.add_argument("--prompts", type=int, default=18)
    parser.add_argument("--prompt-tokens", type=int, default=16384)
    parser.add_argument("--new-tokens", type=int, default=192)
    parser.add_argument("--timeout-s", type=float, default=600, help="for each engine")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has: compiles the same kernels sooner")
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs")
    parser.add_argument("--profile", type=Path, help="folder for kernels and host functions by time, after the run")
    parser.add_argument("--out", type=Path, help="JSONL to append to")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def backend(kv: str, shape: str) -> Any:
    """The plan of a format's blocks; None for vLLM's own caches."""
    from homkv.spec import RowsSpec
    from homkv.vllm.blocks import BlockPlan

    return None if kv in STOCK else BlockPlan.of(RowsSpec.parse(kv), SHAPES[shape]["head_dim"])


def engine(options: argparse.Namespace, kv: str, folder: str) -> Any:
    """An engine with ``--kv-gib`` of KV."""
    from homkv.vllm import COUNT_NANS, SCHEDULER

    plan, length = backend(kv, options.shape), options.prompt_tokens + options.new_tokens
    usual: dict[str, Any] = {
        "model": folder, "load_format": "dummy", "skip_tokenizer_init": True, "dtype": "bfloat16",
        "max_model_len": length, "max_num_seqs": GRAPHS[-1], "max_num_batched_tokens": length + GRAPHS[-1],
        "enable_chunked_prefill": False, "enable_prefix_caching": False, "disable_log_stats": False, "seed": 0,
        "kernel_config": {"enable_jit_warmup": False},  # kernels for sampling that nothing here asks for
    }  # fmt: skip
    import torch

    if torch.cuda.is_available():
        usual |= {"kv_cache_memory_bytes": int(options.kv_gib * 2**30), "enforce_eager": options.eager}
        usual["gpu_memory_utilization"] = 0.5  # must be free at the start; KV takes what the line above says
        usual |= {"attention_backend": plan.name if plan else "FLASH_ATTN"}
        if not options.eager:
            graphs = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": GRAPHS}
            usual["compilation_config"] = graphs
    else:
        os.environ |= {
            "VLLM_CPU_KVCACHE_SPACE": f"{options.kv_gib:.0f}",
            "HOMKV_VLLM_BACKEND": plan.name if plan else "",
        }
        usual["enforce_eager"] = True
    if plan:
        usual |= {"block_size": plan.block_size, "scheduler_cls": SCHEDULER}
        os.environ[COUNT_NANS] = "1"
    usual["kv_cache_dtype"] = kv if kv in STOCK else "auto"
    from vllm import LLM

    return LLM(**usual)


def fitting(llm: Any, options: argparse.Namespace, kv: str, length: int) -> float:
    """Sequences of ``length`` tokens that the cache holds; one of its blocks vLLM keeps."""
    cache, plan = llm.llm_engine.vllm_config.cache_config, backend(kv, options.shape)
    each = plan.num_blocks(length) if plan else -(-length // cache.block_size)
    return float((cache.num_gpu_blocks - 1) / each)


def measure(options: argparse.Namespace, kv: str) -> dict[str, Any]:
    """One engine's record."""
    import torch

    shape = SHAPES[options.shape] | ({"num_hidden_layers": options.layers} if options.layers else {})
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(LLAMA | shape))
        llm = engine(options, kv, folder)
    from vllm import SamplingParams

    length = options.prompt_tokens + options.new_tokens
    room = int(fitting(llm, options, kv, length))
    say(f"{kv}: {room} sequences of {length} tokens fit")
    say(f"{kv}: the engine is up")
    rng, vocab = random.Random(0), SHAPES[options.shape]["vocab_size"]
    tokens = [[rng.randrange(10, vocab) for _ in range(options.prompt_tokens)] for _ in range(options.prompts)]
    prompts: Any = [{"prompt_token_ids": ids} for ids in tokens]
    greedy = SamplingParams(temperature=0, max_tokens=options.new_tokens, ignore_eos=True, detokenize=False)
    few = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False)
    llm.generate(prompts[:2], few, use_tqdm=False)  # compiles kernels
    say(f"{kv}: warm")
    start = time.perf_counter()
    outputs = llm.generate(prompts, greedy, use_tqdm=False)
    wall_s = time.perf_counter() - start
    if options.profile:
        profile(llm, prompts, options.profile / f"{kv}.txt")
    counts = [len(output.outputs[0].token_ids) for output in outputs]
    assert counts == [options.new_tokens] * options.prompts
    times = [output.metrics for output in outputs if output.metrics is not None]
    tpot = [(t.last_token_ts - t.first_token_ts) / (options.new_tokens - 1) for t in times]
    last_prompt = max(t.first_token_ts for t in times) - min(t.scheduled_ts for t in times)
    on_gpu = torch.cuda.is_available()
    return {
        "kv": kv, "shape": options.shape, "layers": shape["num_hidden_layers"], "kv_gib": options.kv_gib,
        "prompts": options.prompts, "tokens_at_32k": int(fitting(llm, options, kv, LONG) * LONG),
        "prompt_tokens": options.prompt_tokens, "new_tokens": options.new_tokens, "eager": options.eager,
        "fitting": room, "wall_s": wall_s, "tokens_per_s": sum(counts) / wall_s,
        "until_last_prompt_s": last_prompt, "tpot_median_ms": 1e3 * statistics.median(tpot),
        "first_tokens": [list(output.outputs[0].token_ids[:8]) for output in outputs[:2]],
        "device": torch.cuda.get_device_name() if on_gpu else "cpu", "torch": torch.__version__,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None,
    }  # fmt: skip


def profile(llm: Any, prompts: Any, path: Path) -> None:
    """Tables of 40 steps that decode all prompts' first 512 tokens: GPU time by kernel, host time by function."""
    import torch
    from torch.profiler import ProfilerActivity
    from vllm import SamplingParams

    short = [{"prompt_token_ids": prompt["prompt_token_ids"][:512]} for prompt in prompts]
    greedy = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, detokenize=False)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    start = time.perf_counter()
    with torch.profiler.profile(activities=activities) as found:
        llm.generate(short, greedy, use_tqdm=False)
    wall_s, rows = time.perf_counter() - start, found.key_averages()
    gpu_s = sum(row.self_device_time_total for row in rows) / 1e6
    path.parent.mkdir(parents=True, exist_ok=True)
    by = ["self_cpu_time_total", *(["self_device_time_total"] if torch.cuda.is_available() else [])]
    tables = [rows.table(sort_by=name, row_limit=60, max_name_column_width=80) for name in by]
    path.write_text("\n".join((f"{wall_s:.3f} s, of which the GPU was busy for {gpu_s:.3f} s", *tables)))


def say(text: str) -> None:
    """A line of progress, with the seconds since this process began to measure."""
    print(f"PROGRESS {time.perf_counter() - BEGIN:.0f} s {text}", flush=True)


def apart(kv: str, options: argparse.Namespace) -> dict[str, Any] | None:
    """The record of an engine in a process of its own; None, after the end of its output, if it failed."""
    own = [sys.executable, __file__, *sys.argv[1:], "--one"]
    own = [x for i, x in enumerate(own) if x != "--kv" and own[i - 1] != "--kv"] + ["--kv", kv]
    # vLLM would sample with FlashInfer, and refuse to start where that is not installed.
    environment = {"VLLM_USE_FLASHINFER_SAMPLER": "0", **os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    process = subprocess.Popen(own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    limit = threading.Timer(options.timeout_s, process.kill)
    limit.start()
    lines: list[str] = []
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line.rstrip())
        if line.startswith("PROGRESS "):
            print(line.removeprefix("PROGRESS "), end="", flush=True)
    code = process.wait()
    limit.cancel()
    for line in lines:
        if line.startswith("RECORD "):
            return dict(json.loads(line.removeprefix("RECORD ")))
    print(
        f"==== {kv}: exit code {code}, limit {options.timeout_s:g} s; its output:", *lines[-120:], sep="\n", flush=True
    )
    return None


def main() -> None:
    """Print a table, and append records."""
    options = arguments()
    if options.one:
        faulthandler.dump_traceback_later(max(options.timeout_s - 3, 1))  # if it hangs: where
        print("RECORD " + json.dumps(measure(options, options.kv[0])), flush=True)
        return
    records = []
    for kv in options.kv:
        record = apart(kv, options)
        if record is None:
            continue
        records.append(record)
        print(json.dumps(record), flush=True)
        if options.out:
            with options.out.open("a") as file:
                file.write(json.dumps(record) + "\n")
    table = Table(title=f"{options.prompts} prompts of {options.prompt_tokens} tokens, {options.new_tokens} new, "
                        f"{options.kv_gib:g} GiB of KV")  # fmt: skip
    for column in ("KV", "sequences that fit", "wall s", "new tokens/s", "last prompt after s", "median ms per token"):
        table.add_column(column, justify="right")
    for r in records:
        numbers = (f"{r[name]:.1f}" for name in ("wall_s", "tokens_per_s", "until_last_prompt_s", "tpot_median_ms"))
        table.add_row(r["kv"], str(r["fitting"]), *numbers)
    Console().print(table)
    if len(records) < len(options.kv):
        sys.exit(1)


if __name__ == "__main__":
    main()
