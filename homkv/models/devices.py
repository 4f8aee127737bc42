"""Where a model computes: the names that ``--device`` takes."""

import re

import torch

from homkv.errors import UnsupportedError


def find_device(name: str) -> torch.device:
    """Return the device called ``cpu``, ``cuda`` or ``cuda:N``. Raises UnsupportedError if it is not there."""
    if name == "cpu":
        return torch.device("cpu")
    match = re.fullmatch(r"cuda(?::([0-9]{1,3}))?", name)
    if match is None:
        raise UnsupportedError(f"expected a device out of cpu, cuda, cuda:N, found {name!r}")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(match[1] or 0) >= count:
        raise UnsupportedError(
            f"expected the device {name!r}, found {count} GPUs that torch {torch.__version__} can use; choose "
            f"{'one of cuda:0 to cuda:' + str(count - 1) if count else '--device cpu'}"
        )
    return torch.device(name)
