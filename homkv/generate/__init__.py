"""Prefill and decode in one process: a whole decode step without the host, replayed as a CUDA graph on a GPU.

    tokens = homkv.generate.generate(model, ids, "balanced", max_new_tokens=100)

``Decoder`` is the loop, ``StepKV`` what it needs of a KV cache, ``PagesKV`` our pages in that form.
"""

from homkv.generate.kv import PagesKV, StepKV
from homkv.generate.loop import Decoder, generate

__all__ = ["Decoder", "PagesKV", "StepKV", "generate"]
