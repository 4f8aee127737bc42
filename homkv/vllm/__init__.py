"""homkv inside vLLM: a plug-in that keeps vLLM's KV cache as pages and attends on them. docs/vllm.md.

vLLM finds :func:`register` through the entry point ``vllm.general_plugins`` and calls it in every process, more than
once. Nothing of vLLM is patched; nothing changes until one of the registered backends is chosen.
"""

import os

BACKEND_VARIABLE = "HOMKV_VLLM_BACKEND"  # the backend's name: on CPUs the only switch, on GPUs for formats of your own
SCHEDULER = "homkv.vllm.scheduling.scheduler"  # for --scheduler-cls: ends requests whose logits are not numbers,
COUNT_NANS = "VLLM_COMPUTE_NANS_IN_LOGITS"  # which this variable of vLLM's has it count


def register() -> None:
    """Add homkv's attention backends to vLLM, and take CPU attention over if ``HOMKV_VLLM_BACKEND`` names one.

    vLLM's CPU platform has one attention backend and ignores ``--attention-backend``, hence the variable. Its backends
    for MLA are taken over as well, to refuse: such a model would run on vLLM's own KV cache without a word. Idempotent.
    Raises FormatError for a name that is none of ours.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from homkv.vllm.blocks import BlockPlan, preset_names
    from homkv.vllm.exact import register_spec

    register_spec()
    chosen = os.environ.get(BACKEND_VARIABLE)
    if chosen:
        BlockPlan.parse(chosen)
    for name in dict.fromkeys((*preset_names(), *([chosen] if chosen else []))):
        if name not in AttentionBackendEnum.__members__:
            register_backend(name, f"homkv.vllm.backend.{name}")
    if chosen:
        register_backend(AttentionBackendEnum.CPU_ATTN, f"homkv.vllm.backend.{chosen}")
        for mla in (AttentionBackendEnum.CPU_MLA, AttentionBackendEnum.AMX_MLA):
            register_backend(mla, "homkv.vllm.backend.MLA")
