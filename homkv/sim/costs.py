"""What the engine must know about a machine, a model and a format: times of steps and numbers of bytes."""

from typing import Protocol


class Costs(Protocol):
    """Times in seconds and bytes, of one instance. Implemented by the roofline and by fits of a real record."""

    @property
    def num_layers(self) -> int:
        """Layers, the unit in which KV is packed and sent."""

    @property
    def stages(self) -> int:
        """Pipeline stages of a prefill instance: prompts that it computes at once, one per stage."""

    def prefill_s(self, tokens: int, cached_tokens: int) -> float:
        """Compute a prompt of ``tokens``, of whose KV the first ``cached_tokens`` are there already."""

    def pack_s(self, tokens: int) -> float:
        """Quantize and pack the KV of a prompt."""

    def unpack_s(self, tokens: int) -> float:
        """What must be done once with the KV of a prompt before decode can attend to it: verify, entropy decode."""

    def step_s(self, batch: int) -> float:
        """One decode step of ``batch`` sequences without what grows with their contexts."""

    @property
    def per_token_s(self) -> float:
        """What a decode step takes for every token of context in its batch."""

    @property
    def dequantize_per_token_s(self) -> float:
        """Share of ``per_token_s`` that goes into dequantizing, or into correction terms."""

    @property
    def dequantize_step_s(self) -> float:
        """Share of ``step_s`` that goes into dequantizing or requantizing whatever the context."""

    def wire_bytes(self, tokens: int) -> int:
        """What crosses the link for a prompt."""

    def kv_bytes(self, tokens: int) -> int:
        """What a sequence of ``tokens`` holds in decode's memory."""
