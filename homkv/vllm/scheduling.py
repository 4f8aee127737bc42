"""vLLM's schedulers, but a request whose logits are not numbers ends with an error.

A page that the format cannot hold gives NaN to whoever reads it (homkv/vllm/store.py), and so do the model's own
numbers when they overflow. vLLM counts NaNs per request if ``VLLM_COMPUTE_NANS_IN_LOGITS`` is set, and goes on to
sample tokens from them. Here the request ends before such a token leaves, as vLLM ends one whose KV did not arrive:
HTTP status 500, an error event in a stream, or ``finish_reason`` "error". All other requests go on.
"""

import logging
from typing import Any

from vllm import envs
from vllm.config import VllmConfig
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import RequestStatus

from homkv.errors import UnsupportedError
from homkv.vllm import COUNT_NANS, SCHEDULER

log = logging.getLogger(__name__)


class _EndsNaN:
    """What is added to both of vLLM's schedulers."""

    def update_from_output(
        self: Any, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """End requests with NaNs in their logits, then do as vLLM does with the others."""
        counts = model_runner_output.num_nans_in_logits or {}
        wrong = [request_id for request_id, count in counts.items() if count]
        ended = self.finish_requests(wrong, RequestStatus.FINISHED_ERROR) if wrong else []
        outputs: dict[int, EngineCoreOutputs] = super().update_from_output(  # type: ignore[misc]  # of Scheduler
            scheduler_output, model_runner_output
        )
        for request in ended:
            log.error(
                "Request %s ends with an error: its logits are not numbers. Either the model's own numbers overflow, "
                "or keys or values of this request do not fit the pages' format (docs/format.md).",
                request.request_id,
            )
            last = EngineCoreOutput(
                request_id=request.request_id,
                new_token_ids=[],
                finish_reason=request.get_finished_reason(),
                events=request.take_events(),
                trace_headers=request.trace_headers,
                num_nans_in_logits=counts[request.request_id],  # vLLM's metric vllm:corrupted_requests
            )
            outputs.setdefault(request.client_index, EngineCoreOutputs()).outputs.append(last)
        return outputs


class _Sync(_EndsNaN, Scheduler):  # type: ignore[misc]  # vllm is untyped to us
    """Between steps."""


class _Async(_EndsNaN, AsyncScheduler):  # type: ignore[misc]
    """While the next step runs already."""


def scheduler(*, vllm_config: VllmConfig, **others: Any) -> Scheduler:
    """The scheduler that vLLM would take, with the above. For ``--scheduler-cls``."""
    chosen = _Async if vllm_config.scheduler_config.async_scheduling else _Sync
    return chosen(vllm_config=vllm_config, **others)


def require_ending(config: VllmConfig) -> None:
    """Raise UnsupportedError unless NaNs end something: the request, or, if one prefers, the engine."""
    found = config.scheduler_config.scheduler_cls
    if envs.VLLM_RAISE_ON_LOGIT_NANS or (found == SCHEDULER and envs.VLLM_COMPUTE_NANS_IN_LOGITS):
        return
    raise UnsupportedError(
        f"expected --scheduler-cls {SCHEDULER} and {COUNT_NANS}=1, so that a request ends whose keys or values pages "
        f"cannot hold, found scheduler {found} and {COUNT_NANS}={int(envs.VLLM_COMPUTE_NANS_IN_LOGITS)}; set both, or "
        "VLLM_RAISE_ON_LOGIT_NANS=1, which ends the whole engine instead"
    )
