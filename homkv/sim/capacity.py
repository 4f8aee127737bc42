"""How many requests per second a system can serve at most: closed forms, one per stage."""

import math
from dataclasses import dataclass

from homkv.sim.engine import BYTES_PER_GBIT, System


@dataclass(frozen=True)
class Capacity:
    """Requests per second that each stage can serve, with all instances; ``batch``: sequences per decode instance."""

    prefill: float
    link: float
    decode: float
    batch: int

    @property
    def rate(self) -> float:
        """What the whole can serve."""
        return min(self.prefill, self.link, self.decode)

    @property
    def bottleneck(self) -> str:
        """The stage that limits."""
        return min(("prefill", "link", "decode"), key=lambda stage: float(getattr(self, stage)))


def capacity(system: System, prompt_tokens: int, output_tokens: int) -> Capacity:
    """Largest stable rates for requests of these lengths.

    prefill  N stages / (prefill_s + pack_s)
    link     min(N egress, M ingress) / wire_bytes
    decode   M B / ((o - 1) (g(B) + c B (p + o / 2))),  B: what fits the memory and ``max_batch``
    """
    costs = system.costs
    work = costs.prefill_s(prompt_tokens, 0) + (0.0 if system.background_pack else costs.pack_s(prompt_tokens))
    egress = math.inf if system.egress_gbps is None else system.num_prefill * system.egress_gbps * BYTES_PER_GBIT
    ingress = math.inf if system.ingress_gbps is None else system.num_decode * system.ingress_gbps * BYTES_PER_GBIT
    batch = max_batch(system, prompt_tokens, output_tokens)
    return Capacity(
        prefill=system.num_prefill * costs.stages / work,
        link=min(egress, ingress) / costs.wire_bytes(prompt_tokens),
        decode=system.num_decode * decode_rate(system, prompt_tokens, output_tokens, batch),
        batch=batch,
    )


def max_batch(system: System, prompt_tokens: int, output_tokens: int) -> int:
    """Sequences of these lengths that one decode instance can hold; 0 if not one."""
    limit = system.max_batch or 1 << 20
    if system.capacity_bytes is None:
        return limit
    return min(limit, system.capacity_bytes // system.costs.kv_bytes(prompt_tokens + output_tokens))


def decode_rate(system: System, prompt_tokens: int, output_tokens: int, batch: int) -> float:
    """Requests per second of one decode instance whose batch is always ``batch``; 0 for an empty one."""
    if output_tokens < 2:
        return math.inf
    if batch == 0:
        return 0.0
    costs = system.costs
    context = batch * (prompt_tokens + output_tokens / 2)
    return batch / ((output_tokens - 1) * (costs.step_s(batch) + costs.per_token_s * context))
