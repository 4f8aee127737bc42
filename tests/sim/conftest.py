"""A machine with round numbers, on which times can be worked out by hand."""

from dataclasses import dataclass

import pytest


@dataclass(frozen=True)
class RoundCosts:
    """Costs whose every term is a field."""

    num_layers: int = 4
    stages: int = 1
    prefill_token_s: float = 1e-3
    pack_token_s: float = 0.0
    unpack_token_s: float = 0.0
    step_base_s: float = 0.01
    step_sequence_s: float = 0.001
    per_token_s: float = 1e-5
    dequantize_per_token_s: float = 2e-6
    dequantize_step_s: float = 0.0
    token_bytes: int = 1000

    def prefill_s(self, tokens: int, cached_tokens: int) -> float:
        return (tokens - cached_tokens) * self.prefill_token_s

    def pack_s(self, tokens: int) -> float:
        return tokens * self.pack_token_s

    def unpack_s(self, tokens: int) -> float:
        return tokens * self.unpack_token_s

    def step_s(self, batch: int) -> float:
        return self.step_base_s + batch * self.step_sequence_s

    def wire_bytes(self, tokens: int) -> int:
        return tokens * self.token_bytes

    def kv_bytes(self, tokens: int) -> int:
        return tokens * self.token_bytes


@pytest.fixture
def round_costs() -> type[RoundCosts]:
    return RoundCosts
