"""One request on its way, and the phases of all that have arrived."""

from array import array
from collections.abc import Iterator

import msgspec
import numpy as np
from numpy.typing import NDArray

from homkv.sim.record import PHASES, RequestRecord
from homkv.sim.trace import Request

COLUMNS = (*PHASES, "arrival_s", "dequantize_s", "ttft_s", "jct_s")


class Job:
    """A request's moments, in seconds of simulated time, filled in as they pass."""

    __slots__ = (
        "admitted",
        "arrived",
        "cached_tokens",
        "computed",
        "context",
        "decode_id",
        "dequantize_s",
        "has_room",
        "kv_bytes",
        "packed",
        "prefill_id",
        "request",
        "room_wait_s",
        "sent_early",
        "started",
        "unpacked",
        "wire_bytes",
    )

    def __init__(self, request: Request, wire_bytes: int, kv_bytes: int) -> None:
        self.request = request
        self.wire_bytes = wire_bytes
        self.kv_bytes = kv_bytes
        self.prefill_id = self.decode_id = -1
        self.has_room = False  # at decode
        self.cached_tokens = 0
        self.context = 0  # tokens of KV while it decodes
        self.room_wait_s = 0.0  # for room at decode, before the transfer
        self.dequantize_s = 0.0
        self.sent_early = 0.0  # bytes that left before the transfer is looked at
        self.started = self.computed = self.packed = self.arrived = self.unpacked = self.admitted = 0.0


class Tally:
    """Columns of finished requests, in the order in which they finished."""

    def __init__(self) -> None:
        self.seconds = {name: array("d") for name in COLUMNS}
        self.ids: list[str] = []
        self.counts = {
            name: array("q")
            for name in ("prompt_tokens", "output_tokens", "wire_bytes", "kv_bytes", "prefill_id", "decode_id")
        }

    def add(self, job: Job, done: float) -> None:
        """Take a finished request's phases."""
        request, seconds, counts = job.request, self.seconds, self.counts
        self.ids.append(request.request_id)
        seconds["arrival_s"].append(request.arrival_s)
        seconds["queue_s"].append(job.started - request.arrival_s)
        seconds["prefill_s"].append(job.computed - job.started)
        seconds["pack_s"].append(job.packed - job.computed)
        seconds["transfer_s"].append(job.arrived - job.packed - job.room_wait_s)
        seconds["unpack_s"].append(job.unpacked - job.arrived)
        seconds["wait_s"].append(job.admitted - job.unpacked + job.room_wait_s)
        seconds["decode_s"].append(done - job.admitted)
        seconds["dequantize_s"].append(job.dequantize_s)
        seconds["ttft_s"].append(job.admitted - request.arrival_s)
        seconds["jct_s"].append(done - request.arrival_s)
        counts["prompt_tokens"].append(request.prompt_tokens)
        counts["output_tokens"].append(request.output_tokens)
        counts["wire_bytes"].append(job.wire_bytes)
        counts["kv_bytes"].append(job.kv_bytes)
        counts["prefill_id"].append(job.prefill_id)
        counts["decode_id"].append(job.decode_id)

    def __len__(self) -> int:
        return len(self.ids)

    def column(self, name: str) -> NDArray[np.float64]:
        """A column as float64. ``name``: one of COLUMNS, ``tpot_s``, or a count."""
        if name == "tpot_s":
            tpot: NDArray[np.float64] = self.column("decode_s") / np.maximum(self.column("output_tokens") - 1, 1)
            return tpot
        return np.asarray(self.seconds[name] if name in self.seconds else self.counts[name], dtype=np.float64)

    def records(self, run_id: str) -> Iterator[RequestRecord]:
        """The same as lines of a record."""
        for i, request_id in enumerate(self.ids):
            seconds = {name: max(0.0, values[i]) for name, values in self.seconds.items()}  # -1e-15: rounding
            counts = {name: values[i] for name, values in self.counts.items()}
            tpot_s = seconds["decode_s"] / max(1, counts["output_tokens"] - 1)
            fields = {"run_id": run_id, "request_id": request_id, "tpot_s": tpot_s, **seconds, **counts}
            yield msgspec.convert(fields, RequestRecord)
