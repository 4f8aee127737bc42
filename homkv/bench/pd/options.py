"""What to measure, checked before anything starts."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, cast, get_args

import torch

from homkv.bench.generate import MODELS
from homkv.bench.pd import nixl
from homkv.bench.pd.direct import has_backend
from homkv.bench.pd.forms import check_kernels, make_form
from homkv.bench.pd.messages import DEVICE_LINKS
from homkv.bench.pd.workload import WORKLOADS, Lengths
from homkv.errors import ShapeError, UnsupportedError

BASE = "bf16"  # whose capacity sets the rates
PrefillName = Literal["exact", "int8"]  # how prompts attend


@dataclass(frozen=True)
class PdOptions:
    """What to measure. ``links``: "direct", "nixl", "tcp", or rates in Gb/s; ``loads``: of the baseline's capacity.

    Raises ShapeError or UnsupportedError for what cannot be measured.
    """

    prefill_devices: tuple[str, ...]
    decode_devices: tuple[str, ...]
    record: Path
    model: str = "llama-3.1-8b"
    workloads: tuple[str, ...] = ("long",)
    formats: tuple[str, ...] = (BASE, "fp8", "hack-2026", "small", "balanced")
    links: tuple[str, ...] = ("10", "25", "100")
    loads: tuple[float, ...] = (0.5, 0.8, 1.0)
    overlaps: tuple[bool, ...] = (True,)
    prefill: PrefillName = "exact"
    requests: int = 16
    turns: int = 1  # of all formats of a point
    slots: int = 8
    kv_budget_gib: float = 0.0  # 0: what the slots need
    rate_rps: float | None = None  # instead of loads of a measured capacity
    lanes: int = 4
    chunk_mib: float = 4.0
    budget_s: float = 3600.0
    cell_timeout_s: float = 300.0
    seed: int = 0
    threads: int = 1
    plots: Path | None = None
    lengths: dict[str, Lengths] = field(default_factory=lambda: dict(WORKLOADS))

    def __post_init__(self) -> None:
        self._check_names()
        self._check_numbers()

    def _check_names(self) -> None:
        for what, found, known in (
            ("model", [self.model], MODELS),
            ("workload", self.workloads, self.lengths),
        ):
            if unknown := [x for x in found if x not in known]:
                raise UnsupportedError(f"expected a {what} out of {', '.join(known)}, found {unknown[0]!r}")
        on_gpus = any(device != "cpu" for device in self.devices)
        for name in self.formats:
            form = make_form(MODELS[self.model], name)
            if on_gpus:
                check_kernels(form, name)
        for link in self.links:
            check_link(link)

    def require_here(self) -> None:
        """Raise UnsupportedError for devices or links that this machine has not."""
        for device in self.devices:
            check_device(device)
        if "direct" in self.links:
            self._check_direct()
        if "nixl" in self.links and not nixl.is_available():
            raise UnsupportedError("expected NIXL for the link nixl, found none; install it with: pip install nixl")

    def _check_numbers(self) -> None:
        for name in ("requests", "turns", "slots", "lanes", "chunk_mib", "budget_s", "cell_timeout_s", "threads"):
            if not getattr(self, name) > 0:
                raise ShapeError(f"expected a positive {name}, found {getattr(self, name)}")
        if any(not load > 0 for load in self.loads) or (self.rate_rps is not None and not self.rate_rps > 0):
            raise ShapeError(f"expected positive loads and rate, found {self.loads} and {self.rate_rps}")
        if self.kv_budget_gib < 0:
            raise ShapeError(f"expected a KV budget of at least 0, found {self.kv_budget_gib}")

    def _check_direct(self) -> None:
        devices = [torch.device(d) for d in self.devices]
        if not has_backend(devices[0]):
            raise UnsupportedError("expected a torch with NCCL (GPUs) or gloo (CPUs) for the direct link, found none")
        if devices[0].type == "cuda" and len(set(devices)) < len(devices):
            raise UnsupportedError(
                f"expected a GPU of its own for every worker on the direct link, found {devices}: NCCL cannot connect "
                "a GPU to itself; use a shaped TCP link"
            )

    @property
    def devices(self) -> tuple[str, ...]:
        """One per worker: prefill's first."""
        return (*self.prefill_devices, *self.decode_devices)

    @property
    def shares_a_device(self) -> bool:
        """Whether two workers run on one."""
        return len(set(self.devices)) < len(self.devices)

    @property
    def shares_a_gpu(self) -> bool:
        """The same of a GPU, where workers take turns; on a CPU each has cores of its own."""
        return self.shares_a_device and self.devices[0] != "cpu"


def check_link(link: str) -> None:
    """Raise UnsupportedError unless a link is known or a positive rate."""
    try:
        known = link in (*DEVICE_LINKS, "tcp") or 0 < float(link) < float("inf")
    except ValueError:
        known = False
    if not known:
        raise UnsupportedError(f"expected direct, nixl, tcp or a rate in Gb/s as link, found {link!r}")


def check_device(name: str) -> None:
    """Raise UnsupportedError unless torch has this device here."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UnsupportedError(f"expected devices like cpu or cuda:0, found {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise UnsupportedError(f"expected cpu or cuda devices, found {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UnsupportedError(f"expected one of {torch.cuda.device_count()} CUDA devices, found {name!r}")


def known_prefill(name: str) -> PrefillName:
    """The way that prompts attend. Raises UnsupportedError."""
    for known in get_args(PrefillName):
        if name == known:
            return cast(PrefillName, known)
    raise UnsupportedError(f"expected an attention out of {', '.join(get_args(PrefillName))}, found {name!r}")
