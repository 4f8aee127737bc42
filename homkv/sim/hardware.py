"""Machines and models by name, and the measured times of decode kernels. Numbers and their sources: homkv/sim/data."""

import json
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any, TypeVar

import msgspec
import numpy as np

from homkv.errors import UnsupportedError

# Kernels that were measured at one size only take their fixed time from one with the same launches.
SAME_LAUNCHES = {"fp8": "fp16", "kivi": "fp16", "dequant-small": "small", "dequant-balanced": "balanced",
                 "hack": "balanced", "hack-2026": "balanced"}  # fmt: skip
SAME_CHIP = {"h100", "h200"}
AUTHORS = {"fp16": "authors-fp16", "hack": "authors-hack", "hack-2026": "authors-hack"}
T = TypeVar("T")
MIN_FIT_CONTEXT = 16_384  # shorter contexts may lie in a cache


class Gpu(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One accelerator; data/gpus.json explains the fields and says where each number comes from."""

    memory_gb: float
    memory_gbps: float
    tflops: float
    int8_tops: float | None
    bus_gbps: float
    attend: float
    gemm: float
    flash: float
    nic_gbps: float
    gpus_per_instance: int
    stands_in: str | None
    source: dict[str, str]
    name: str = ""


class ModelShape(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A transformer's shape; ``params``: weights that a token passes."""

    layers: int
    hidden: int
    q_heads: int
    kv_heads: int
    head_dim: int
    params: float
    name: str = ""

    @property
    def kv_bytes_per_token(self) -> int:
        """K and V of all layers in 16 bits."""
        return self.layers * self.kv_heads * self.head_dim * 4

    @property
    def weight_bytes(self) -> float:
        """Weights in 16 bits."""
        return 2 * self.params


class Kernel(msgspec.Struct, frozen=True):
    """Decode attention of one layer: ``fixed_us + bytes / rate``. ``source``: which GPU's times, and how taken over."""

    fixed_us: float
    bytes_per_s: float
    source: str


@cache
def data(name: str) -> Any:
    """A file of homkv/sim/data, parsed."""
    return json.loads(resources.files("homkv.sim").joinpath("data", name).read_text(encoding="utf-8"))


@cache
def gpus() -> Mapping[str, Gpu]:
    """All accelerators by name."""
    return {name: msgspec.convert({**row, "name": name}, Gpu) for name, row in data("gpus.json")["gpus"].items()}


@cache
def models() -> Mapping[str, ModelShape]:
    """All models by name."""
    return {
        name: msgspec.convert({**row, "name": name}, ModelShape) for name, row in data("models.json")["models"].items()
    }


def find_gpu(name: str) -> Gpu:
    """A GPU by name, without regard to case. Raises UnsupportedError."""
    return _find("GPU", name, gpus())


def find_model(name: str) -> ModelShape:
    """A model by name or by an unambiguous part of it, ``llama-70b`` included. Raises UnsupportedError."""
    known = models()
    parts = name.lower().split("-")
    matches = [shape for key, shape in known.items() if all(part in key.split("-") for part in parts)]
    return matches[0] if len(matches) == 1 else _find("model", name, known)


def _find(kind: str, name: str, known: Mapping[str, T]) -> T:
    if name.lower() not in known:
        raise UnsupportedError(f"expected a {kind} out of {', '.join(known)}, found {name!r}; see homkv/sim/data")
    return known[name.lower()]


@cache
def kernel(gpu_name: str, name: str) -> Kernel:
    """Times of a decode kernel on a GPU: the first of

    * a fit over all sizes measured here on this GPU;
    * measured here on the same chip with other memory (H100 for H200): the same rate;
    * the HACK authors' times for this GPU;
    * those of the GPU that stands in for it, the rate scaled with the memory's.

    Raises UnsupportedError if there is none.
    """
    if (gpu_name, name) in _fits():
        return _fits()[gpu_name, name]
    stand_in = find_gpu(gpu_name).stands_in
    if stand_in is not None and {gpu_name, stand_in} == SAME_CHIP and (stand_in, name) in _fits():
        return _fits()[stand_in, name]
    if (gpu_name, AUTHORS.get(name, name)) in _fits():
        return _fits()[gpu_name, AUTHORS[name]]
    if stand_in is None:
        measured = sorted({kernel_name for gpu, kernel_name in _fits() if gpu == gpu_name})
        raise UnsupportedError(
            f"expected a format whose decode kernel was measured on {gpu_name} or on a GPU like it "
            f"({', '.join(measured)}), found {name}; choose another GPU or format"
        )
    other = kernel(stand_in, name)
    scale = find_gpu(gpu_name).memory_gbps / find_gpu(stand_in).memory_gbps
    return Kernel(other.fixed_us, other.bytes_per_s * scale, f"{other.source}, rate x {scale:.2f}")


@cache
def _fits() -> Mapping[tuple[str, str], Kernel]:
    groups: dict[tuple[str, str], list[tuple[float, float, str]]] = {}
    for row in data("kernels.json")["rows"]:
        if row["context"] >= MIN_FIT_CONTEXT:
            entry = (row["bytes"], row["us"], f"{row['source']} ({row['gpu']})")
            groups.setdefault((row["gpu"], row["kernel"]), []).append(entry)
    fits = {key: _fit(rows) for key, rows in groups.items() if len(rows) > 1}
    for (gpu, name), rows in groups.items():
        if len(rows) == 1:
            (size, us, source), like = rows[0], fits.get((gpu, SAME_LAUNCHES.get(name, name)))
            fixed = like.fixed_us if like is not None else 0.0
            fits[gpu, name] = Kernel(fixed, size / (us - fixed) * 1e6, source)
    return fits


def _fit(rows: list[tuple[float, float, str]]) -> Kernel:
    """Least squares of the relative error of ``fixed + bytes / rate``."""
    size, us = (np.array([row[i] for row in rows], dtype=np.float64) for i in (0, 1))
    (fixed, slope), *_ = np.linalg.lstsq(np.stack([1 / us, size / us], 1), np.ones_like(us), rcond=None)
    return Kernel(max(0.0, float(fixed)), 1e6 / float(slope), rows[0][2])
