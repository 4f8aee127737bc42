"""Arithmetic on measured times: medians, paired ratios, the straight line through them, the bandwidth floor.

Units: bytes, microseconds, TB/s (1e12 bytes per second).
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from homkv.bench.cpu import paired_ratio
from homkv.errors import ShapeError

FP16_PEERS = ("sdpa flash", "sdpa cudnn", "fp16")


def spread(times: Sequence[float]) -> float:
    """Half the distance between the quartiles as a fraction of the median: how far a typical repetition lies off."""
    if len(times) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(times, n=4)
    return (high - low) / 2 / middle


def tera_per_second(amount: float, us: float) -> float:
    """Units of 1e12 per second: bytes to TB/s, operations to TOP/s."""
    return amount / us * 1e-6


def floor_us(num_bytes: float, stream_tbps: float) -> float:
    """Time to read ``num_bytes`` once at the fastest rate seen."""
    return num_bytes / stream_tbps * 1e-6


def fit_line(num_bytes: Sequence[float], us: Sequence[float]) -> tuple[float, float]:
    """Fixed cost in us and marginal rate in TB/s of ``us = fixed + bytes / rate``, least squares of relative residuals.

    Relative, because noise grows with the time: otherwise the longest context alone would decide about the fixed cost.
    The rate is infinite if times do not grow. Raises ShapeError for fewer than two different sizes.
    """
    if len(set(num_bytes)) < 2 or len(num_bytes) != len(us):
        raise ShapeError(f"expected times of two or more sizes, found sizes {list(num_bytes)}; add contexts")
    weight = [1 / t**2 for t in us]
    total = sum(weight)
    x = sum(w * n for w, n in zip(weight, num_bytes, strict=True)) / total
    y = sum(w * t for w, t in zip(weight, us, strict=True)) / total
    over = sum(w * (n - x) * (t - y) for w, n, t in zip(weight, num_bytes, us, strict=True))
    under = sum(w * (n - x) ** 2 for w, n in zip(weight, num_bytes, strict=True))
    slope = over / under
    return y - slope * x, 1e-6 / slope if slope > 0 else math.inf


def best_fp16(times: Mapping[str, Sequence[float]]) -> str | None:
    """The 16-bit peer with the smallest median, None if none ran."""
    ran = [name for name in FP16_PEERS if times.get(name)]
    return min(ran, key=lambda name: statistics.median(times[name]), default=None)


def decode_rows(
    case: Mapping[str, Any], times: Mapping[str, Sequence[float]], num_bytes: Mapping[str, float]
) -> list[dict[str, Any]]:
    """One record per candidate of a case: median, spread, rate, and ratios to every other, taken inside a round.

    ``times``: us per call of every round, by candidate; ``num_bytes``: what one call must read. ``ratios[x]`` says how
    many times longer x took; ``ratio_to_fp16`` compares with the fastest 16-bit peer.
    """
    best = best_fp16(times)
    rows = []
    for name, samples in times.items():
        ratios = {other: paired_ratio(list(times[other]), list(samples)) for other in times if other != name}
        us = statistics.median(samples)
        rows.append(
            {
                "kind": "decode",
                **case,
                "candidate": name,
                "status": "ok",
                "us": us,
                "spread": spread(samples),
                "rounds": len(samples),
                "bytes": num_bytes[name],
                "tbps": tera_per_second(num_bytes[name], us),
                "best_fp16": best,
                "ratio_to_fp16": 1.0 if name == best else ratios.get(best) if best else None,
                "ratios": ratios,
            }
        )
    return rows


def fastest_stream(rows: Sequence[Mapping[str, Any]]) -> float:
    """TB/s of the fastest read of the run: torch.sum, or a 16-bit peer counted by its bytes.

    Raises ShapeError if neither was measured.
    """
    streams = [row for row in rows if row["kind"] == "stream"]
    peers = [row for row in rows if row["kind"] == "decode" and row["candidate"] in FP16_PEERS]
    rates = [row["tbps"] for row in (*streams, *peers) if "tbps" in row]
    if not rates:
        raise ShapeError("expected a measured read stream or 16-bit peer, found none; run with the peers")
    return float(max(rates))


def add_floors(rows: Sequence[dict[str, Any]]) -> None:
    """Enter the floor and the fraction of it into every measured decode row."""
    stream = fastest_stream(rows)
    for row in rows:
        if row["kind"] == "decode" and row["status"] == "ok":
            row["stream_tbps"] = stream
            row["floor_us"] = floor_us(row["bytes"], stream)
            row["floor_fraction"] = row["floor_us"] / row["us"]


def fit_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Fixed cost and marginal rate of every candidate at every shape and batch that has two contexts or more."""
    groups: dict[tuple[str, int, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["kind"] == "decode" and row["status"] == "ok":
            groups.setdefault((row["shape"], row["batch"], row["candidate"]), []).append(row)
    out = []
    for (shape, batch, name), members in groups.items():
        if len({row["bytes"] for row in members}) > 1:
            fixed, rate = fit_line([row["bytes"] for row in members], [row["us"] for row in members])
            case = {"shape": shape, "batch": batch, "candidate": name}
            if rate < math.inf:
                out.append({"kind": "fit", **case, "fixed_us": fixed, "marginal_tbps": rate})
    return out


def plan_rows(rows: Sequence[Mapping[str, Any]], plans: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
    """What a layer of each plan takes on the average, in every case in which all formats of its layers were measured.

    ``plans``: candidates of the layers, by the plan's own name. Ratios are those of the mean times, in which each
    layer's time is the one that was paired with the other candidate's.
    """
    cases: dict[tuple[Any, ...], dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        if row["kind"] == "decode" and row["status"] == "ok":
            cases.setdefault((row["shape"], row["batch"], row["context"]), {})[row["candidate"]] = row
    return [
        _plan_row(name, [measured[layer] for layer in layers])
        for measured in cases.values()
        for name, layers in plans.items()
        if set(layers) <= measured.keys()
    ]


def _plan_row(name: str, layers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One row that stands for layers measured in one case."""
    others = set.intersection(*(set(layer["ratios"]) for layer in layers))
    us, num_bytes = (statistics.fmean(layer[key] for layer in layers) for key in ("us", "bytes"))
    ratios = {x: statistics.harmonic_mean([layer["ratios"][x] for layer in layers]) for x in sorted(others)}
    return {
        **layers[0],
        "candidate": name,
        "layers": len(layers),
        "us": us,
        "spread": max(layer["spread"] for layer in layers),
        "bytes": num_bytes,
        "tbps": tera_per_second(num_bytes, us),
        "ratio_to_fp16": ratios.get(layers[0]["best_fp16"]),
        "ratios": ratios,
    }
