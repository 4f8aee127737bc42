"""Step times and bytes of a model on GPUs, from measured kernels and data-sheet rates. Formulas: docs/sim.md."""

from dataclasses import dataclass
from functools import cached_property

from homkv.errors import UnsupportedError
from homkv.sim.formats import KvFormat
from homkv.sim.hardware import Gpu, ModelShape, kernel

WEIGHT_READ = 0.91  # of memory_gbps: torch.sum reads 3.05 TB/s on an H100, 4.43 on an H200
LAYER_OVERHEAD_S = 86e-6  # per layer and step beside weights and attention: generate-h100.jsonl, -h200.jsonl
PACK_READ = 0.24  # of memory_gbps, bytes read and written: attention-h100.jsonl, 0.81 of 3.35 TB/s
LAUNCH_S = 5e-6  # one kernel launch in a captured graph: a third of a decode call of three (kernels.json)
ALL_REDUCE_S = 15e-6  # latency of one all-reduce; two per layer
HACK_PREFILL = 1.17  # faster than FlashAttention-2 where int8 runs at twice the rate (H100, partitions of 64)
HACK_FLASH = 0.165  # of peak, our kernel for HACK's prompts, 16,384 tokens: attention-h100-two-launches.jsonl
WIRE_HEADER_BYTES = 64  # per layer: frame head and digest


@dataclass(frozen=True)
class Layout:
    """GPUs of one instance: ``tensor`` parallel within a stage, ``pipeline`` stages one after the other."""

    tensor: int = 1
    pipeline: int = 1

    def __post_init__(self) -> None:
        if min(self.tensor, self.pipeline) < 1:
            raise UnsupportedError(f"expected at least one GPU and one stage, found {self.tensor} and {self.pipeline}")

    @property
    def gpus(self) -> int:
        """GPUs of one instance."""
        return self.tensor * self.pipeline


@dataclass(frozen=True)
class RooflineCosts:
    """`homkv.sim.costs.Costs` of one model in one format on one kind of prefill and one kind of decode instance."""

    model: ModelShape
    kv: KvFormat
    prefill_gpu: Gpu
    decode_gpu: Gpu
    prefill_layout: Layout = Layout()
    decode_layout: Layout = Layout()

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return self.model.layers

    @property
    def stages(self) -> int:
        """Pipeline stages of prefill."""
        return self.prefill_layout.pipeline

    def prefill_s(self, tokens: int, cached_tokens: int) -> float:
        """``max(2 P n / (tp F gemm), weights / (tp bw)) + 2 H D L (T^2 - c^2) / (tp F flash) + all-reduces``.

        n = T - c are the tokens to compute.

        A prompt passes all stages one after the other, so stages do not shorten it.
        """
        gpu, model, tensor = self.prefill_gpu, self.model, self.prefill_layout.tensor
        new = tokens - cached_tokens
        flops = gpu.tflops * 1e12 * tensor
        products = max(
            2 * model.params * new / (flops * gpu.gemm),
            model.weight_bytes / (tensor * gpu.memory_gbps * 1e9 * WEIGHT_READ),
        )
        pairs = 2 * model.q_heads * model.head_dim * model.layers * (tokens**2 - cached_tokens**2)
        return products + pairs / (flops * self._flash) + self._all_reduces(gpu, tensor, new)

    @cached_property
    def _flash(self) -> float:
        """Of peak. On Hopper exact attention (cuDNN) is faster than HACK's, which runs only where a format insists."""
        gpu, kv = self.prefill_gpu, self.kv
        if gpu.int8_tops is None or kv.prefill == "exact":
            return gpu.flash
        if gpu.source["flash"] == "measured":
            return HACK_FLASH if kv.prefill == "int8" else gpu.flash
        return gpu.flash * HACK_PREFILL

    def _all_reduces(self, gpu: Gpu, tensor: int, tokens: int) -> float:
        if tensor == 1:
            return 0.0
        moved = 2 * tokens * self.model.hidden * 2 * (tensor - 1) / tensor
        return 2 * self.model.layers * (ALL_REDUCE_S + moved / (gpu.bus_gbps * 1e9))

    def pack_s(self, tokens: int) -> float:
        """Read K and V once, write what is stored."""
        if not self.kv.packs:
            return 0.0
        moved = self.model.kv_bytes_per_token * tokens + self.kv_bytes(tokens)
        return moved / (self.prefill_layout.tensor * self.prefill_gpu.memory_gbps * 1e9 * PACK_READ)

    def unpack_s(self, tokens: int) -> float:
        """Entropy decoding, at the rate of packing: reads the wire's bytes, writes the stored ones. Else nothing."""
        if self.kv.wire_ratio == 1.0:
            return 0.0
        moved = self.wire_bytes(tokens) + self.kv_bytes(tokens)
        return moved / (self.decode_layout.tensor * self.decode_gpu.memory_gbps * 1e9 * PACK_READ)

    def step_s(self, batch: int) -> float:
        """``max(weights / (tp bw), 2 P B / (tp F gemm)) + L (overhead + kernel's fixed time) + all-reduces``."""
        gpu, model, tensor = self.decode_gpu, self.model, self.decode_layout.tensor
        weights = model.weight_bytes / (tensor * gpu.memory_gbps * 1e9 * WEIGHT_READ)
        products = 2 * model.params * batch / (tensor * gpu.tflops * 1e12 * gpu.gemm)
        fixed = model.layers * (LAYER_OVERHEAD_S + self._kernel_fixed_s) + self.dequantize_step_s
        return max(weights, products) + fixed + self._all_reduces(gpu, tensor, batch)

    @cached_property
    def _kernel_fixed_s(self) -> float:
        return kernel(self.decode_gpu.name, self.kv.kernel).fixed_us * 1e-6

    @cached_property
    def dequantize_step_s(self) -> float:
        """Without requantization elimination: one more launch per layer. A kernel that dequantizes first: another."""
        return self.model.layers * LAUNCH_S * (self.kv.requantizes + self.kv.unfused)

    @cached_property
    def per_token_s(self) -> float:
        """Bytes of a token over the kernel's rate; if KV is restored first: read, write 16 bits, read 16 bits."""
        rate = self.decode_layout.tensor * kernel(self.decode_gpu.name, self.kv.kernel).bytes_per_s
        return self._read_bytes * self.kv.kernel_factor / rate

    @property
    def _read_bytes(self) -> float:
        stored = self.model.layers * self.model.kv_heads * self.kv.bytes_per_token()
        return stored + 2 * self.model.kv_bytes_per_token if self.kv.unfused else stored

    @cached_property
    def dequantize_per_token_s(self) -> float:
        """``per_token_s`` less what reading the stored bytes takes the 16-bit kernel."""
        rate = self.decode_layout.tensor * kernel(self.decode_gpu.name, "fp16").bytes_per_s
        stored = self.model.layers * self.model.kv_heads * self.kv.bytes_per_token()
        return max(0.0, self.per_token_s - stored / rate)

    def wire_bytes(self, tokens: int) -> int:
        """Pages, sinks and window of all layers and heads, and a head per layer."""
        heads = self.model.layers * self.model.kv_heads
        return int(heads * self.kv.stored_bytes(tokens) * self.kv.wire_ratio) + WIRE_HEADER_BYTES * self.model.layers

    def kv_bytes(self, tokens: int) -> int:
        """Pages, sinks and window of all layers and heads."""
        return int(self.model.layers * self.model.kv_heads * self.kv.stored_bytes(tokens))


def capacity_bytes(model: ModelShape, gpu: Gpu, layout: Layout, usable: float = 0.9) -> int:
    """Bytes left for KV: ``usable`` of an instance's memory less the weights. Raises UnsupportedError if none are."""
    free = usable * gpu.memory_gb * 1e9 * layout.gpus - model.weight_bytes
    if free <= 0:
        raise UnsupportedError(
            f"expected memory for {model.weight_bytes / 1e9:.0f} GB of weights of {model.name}, found {layout.gpus} x "
            f"{gpu.name} with {gpu.memory_gb:.0f} GB each; use more GPUs per instance"
        )
    return int(free)


def smallest_layout(model: ModelShape, gpu: Gpu, *, headroom: float = 1.15, pipeline: bool = False) -> Layout:
    """Fewest GPUs, a power of two, whose memory holds ``headroom`` times the weights.

    Tensor parallel over all, or with ``pipeline`` over at most the GPUs of one cloud instance, stages over instances.
    """
    limit = gpu.gpus_per_instance if pipeline else 1 << 30
    tensor, stages = 1, 1
    while 0.9 * gpu.memory_gb * 1e9 * tensor * stages < headroom * model.weight_bytes:
        if 2 * tensor <= limit:
            tensor *= 2
        else:
            stages += 1
    return Layout(tensor, stages)
