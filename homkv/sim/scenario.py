"""A deployment in words: which model, GPUs, links and format; turned into the engine's `System`."""

from dataclasses import dataclass, replace
from typing import Literal

from homkv.errors import UnsupportedError
from homkv.sim.engine import System
from homkv.sim.formats import make_format
from homkv.sim.hardware import Gpu, find_gpu, find_model
from homkv.sim.roofline import Layout, RooflineCosts, capacity_bytes, smallest_layout

MAX_BATCH = 256  # sequences that decode together, as serving engines cap it


@dataclass(frozen=True)
class Scenario:
    """One deployment. None: the smallest layout that holds the weights, the usual cloud instance's network."""

    model: str
    prefill_gpu: str
    decode_gpu: str
    format: str = "fp16"
    num_prefill: int = 1
    num_decode: int = 1
    prefill_layout: Layout | None = None
    decode_layout: Layout | None = None
    link_gbps: float | None = None  # of every instance, in and out
    ingress_gbps: float | None = None  # of a decode instance, where it differs
    overlap: bool = True
    when_full: Literal["wait", "swap"] = "wait"
    max_batch: int = MAX_BATCH
    prefix_gb: float | None = None
    usable_memory: float = 0.9

    def __post_init__(self) -> None:
        if min(self.num_prefill, self.num_decode) < 1:
            found = f"{self.num_prefill} and {self.num_decode}"
            raise UnsupportedError(f"expected at least one instance of each kind, found {found}")
        if any(gbps is not None and not 0 < gbps < 1e9 for gbps in (self.link_gbps, self.ingress_gbps)):
            raise UnsupportedError(f"expected links of more than 0 Gb/s, found {self.link_gbps}, {self.ingress_gbps}")
        if self.prefix_gb is not None and not 0 <= self.prefix_gb < 1e9:
            raise UnsupportedError(f"expected a prefix cache of at least 0 GB, found {self.prefix_gb}")

    def with_format(self, name: str) -> "Scenario":
        """The same deployment with another format."""
        return replace(self, format=name)

    def system(self) -> System:
        """The engine's view. Raises UnsupportedError or FormatError for unknown names and missing memory."""
        model = find_model(self.model)
        prefill, decode = find_gpu(self.prefill_gpu), find_gpu(self.decode_gpu)
        p_layout = self.prefill_layout or smallest_layout(model, prefill, pipeline=True)
        d_layout = self.decode_layout or smallest_layout(model, decode)
        costs = RooflineCosts(model, make_format(self.format, model.head_dim), prefill, decode, p_layout, d_layout)
        return System(
            costs=costs,
            num_prefill=self.num_prefill,
            num_decode=self.num_decode,
            egress_gbps=self.link_gbps or nic_gbps(prefill, p_layout),
            ingress_gbps=self.ingress_gbps or self.link_gbps or nic_gbps(decode, d_layout),
            overlap=self.overlap,
            when_full=self.when_full,
            capacity_bytes=capacity_bytes(model, decode, d_layout, self.usable_memory),
            max_batch=self.max_batch,
            prefix_bytes=None if self.prefix_gb is None else int(self.prefix_gb * 1e9),
        )


def nic_gbps(gpu: Gpu, layout: Layout) -> float:
    """An instance's share of its machines' networks."""
    return gpu.nic_gbps * layout.gpus / gpu.gpus_per_instance
