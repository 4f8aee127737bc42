"""Whether Triton kernels can run here, and on what. The only place that asks the environment."""

import functools
import importlib.util

import torch

from homkv.errors import UnsupportedError

INSTALL = "install it with: pip install 'homkv[gpu]'"


def is_interpreting() -> bool:
    """Whether kernels run in Triton's interpreter on the CPU (``TRITON_INTERPRET=1`` before the first import)."""
    if importlib.util.find_spec("triton") is None:
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


def is_available() -> bool:
    """Whether Triton is installed and has a CUDA device, or interprets on the CPU."""
    if importlib.util.find_spec("triton") is None:
        return False
    return torch.cuda.is_available() or is_interpreting()


def require() -> None:
    """Raise UnsupportedError, with the remedy, unless kernels can run."""
    if importlib.util.find_spec("triton") is None:
        raise UnsupportedError(f"expected Triton for impl='triton', found none; {INSTALL}")
    if not is_available():
        raise UnsupportedError(
            "expected a CUDA device for impl='triton', found none; use impl='cpu', or TRITON_INTERPRET=1 to run the "
            "kernels slowly on the CPU"
        )


def device_type() -> str:
    """Where the tensors of kernels lie, if these can run."""
    return "cpu" if is_interpreting() else "cuda"


def runs_on(device: torch.device) -> bool:
    """Whether kernels can run on tensors of this device."""
    return is_available() and device.type == device_type()


def check_device(device: torch.device) -> None:
    """Raise UnsupportedError unless kernels can run on tensors of this device."""
    expected = device_type()
    if device.type != expected:
        raise UnsupportedError(
            f"expected tensors on {expected!r} for impl='triton', found {device.type!r}; move them, or use impl='cpu'"
        )


@functools.cache
def num_processors(device: torch.device) -> int:
    """Multiprocessors of the device; 4 where kernels are interpreted, so that tests see several splits."""
    if device.type != "cuda":
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory of a multiprocessor; a Hopper's where kernels are interpreted."""
    if device.type != "cuda":
        return 228 * 1024
    return int(torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor)


@functools.cache
def has_dependent_launch(device: torch.device) -> bool:
    """Whether a kernel may start while its predecessor drains (programmatic dependent launch, from Hopper on)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
