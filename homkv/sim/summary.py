"""Numbers that describe a run: means, percentiles, decomposition."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from homkv.sim.engine import Outcome
from homkv.sim.record import PHASES


@dataclass(frozen=True)
class Summary:
    """Seconds, and counts of one run. ``phases_s`` sums to ``jct_s``; ``dequantize_s`` is a share of its decode_s."""

    requests: int
    jct_s: float
    jct_p50_s: float
    jct_p99_s: float
    ttft_s: float
    ttft_p99_s: float
    tpot_s: float
    phases_s: Mapping[str, float]
    dequantize_s: float
    wire_bytes: float  # mean per request
    peak_kv_bytes: int
    requests_per_s: float  # finished over the whole run
    tokens_per_s: float


def summarize(outcome: Outcome) -> Summary:
    """Means over all requests, in the order of PHASES."""
    column = outcome.tally.column
    jct, ttft = column("jct_s"), column("ttft_s")
    p50, p99 = np.percentile(jct, (50, 99))
    return Summary(
        requests=len(outcome.tally),
        jct_s=float(jct.mean()),
        jct_p50_s=float(p50),
        jct_p99_s=float(p99),
        ttft_s=float(ttft.mean()),
        ttft_p99_s=float(np.percentile(ttft, 99)),
        tpot_s=float(column("tpot_s").mean()),
        phases_s={name: float(column(name).mean()) for name in PHASES},
        dequantize_s=float(column("dequantize_s").mean()),
        wire_bytes=float(column("wire_bytes").mean()),
        peak_kv_bytes=outcome.peak_kv_bytes,
        requests_per_s=len(outcome.tally) / outcome.end_s if outcome.end_s else float("inf"),
        tokens_per_s=float(column("output_tokens").sum()) / outcome.end_s if outcome.end_s else float("inf"),
    )
