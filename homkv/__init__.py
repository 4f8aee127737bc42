"""Attention computed directly on a 2-bit KV cache, so that prefill and decode can run on different machines."""

from typing import TYPE_CHECKING, Any

from homkv.errors import HomkvError

if TYPE_CHECKING:
    from homkv.hf import attach

__all__ = ["HomkvError", "attach"]


def __getattr__(name: str) -> Any:
    # `homkv.spec` must stay importable without torch, so transformers is only loaded on demand.
    if name == "attach":
        from homkv.hf import attach

        return attach
    raise AttributeError(f"module 'homkv' has no attribute {name!r}")
