"""homkv's attention backends for vLLM: one class per backend name, made when vLLM asks this module for it."""

from dataclasses import dataclass, replace
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills
from vllm.v1.kv_cache_layout import KVCacheLayout

from homkv.spec import HEAD_DIMS, PAGE_TOKENS
from homkv.vllm.blocks import BlockPlan
from homkv.vllm.store import Places, page_ids


@dataclass(frozen=True)
class Chunk:
    """New tokens ``at`` of sequence ``row``, behind ``start`` tokens that are stored."""

    row: int
    start: int
    at: slice


@dataclass(frozen=True)
class StepMetadata:
    """One step's batch: sequences with a single token first, then chunks of prompts. Layers share it.

    ``places``: of the single tokens; ``lengths [B]``: tokens after this step; ``tables [B, num_pages]``: see page_ids.
    """

    places: Places
    chunks: list[Chunk]
    lengths: Tensor
    tables: Tensor


class StepMetadataBuilder(AttentionMetadataBuilder):  # type: ignore[misc]  # vllm is untyped to us
    """Splits a batch into single tokens and chunks. No CUDA graph holds this attention: it plans on the host."""

    _cudagraph_support: ClassVar[Any] = AttentionCGSupport.NEVER

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: Any) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=False)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> StepMetadata:
        """Without speculation vLLM's upper bound of a length is the length."""
        batch, plan_block = common_attn_metadata, self.kv_cache_spec.block_size
        num_single = split_decodes_and_prefills(batch, decode_threshold=1)[0]
        lengths = batch.seq_lens_cpu_upper_bound
        lengths = batch.seq_lens.cpu() if lengths is None else lengths
        starts = batch.query_start_loc_cpu.tolist()
        spans = [(row, starts[row], starts[row + 1]) for row in range(num_single, batch.num_reqs)]
        chunks = [Chunk(row, int(lengths[row]) - (stop - first), slice(first, stop)) for row, first, stop in spans]
        blocks = max(-(-batch.max_seq_len // plan_block), 1)
        return StepMetadata(
            places=Places.of(lengths[:num_single], self.device),
            chunks=[chunk for chunk in chunks if chunk.at.stop > chunk.at.start],
            lengths=batch.seq_lens,
            tables=page_ids(batch.block_table_tensor[: batch.num_reqs, :blocks], plan_block // PAGE_TOKENS),
        )


class PagesBackend(AttentionBackend):  # type: ignore[misc]
    """Base of all backends; ``plan`` says which."""

    plan: ClassVar[BlockPlan]
    forward_includes_kv_cache_update = True
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto"]

    @classmethod
    def get_name(cls) -> str:  # type: ignore[override, unused-ignore]
        """The backend's name; NIXL's handshake compares it."""
        return cls.plan.name

    @classmethod
    def get_impl_cls(cls) -> type[Any]:
        """Computes on the pages of ``plan``."""
        from homkv.vllm.impl import PagesImpl

        return type(f"{cls.plan.name}_Impl", (PagesImpl,), {"plan": cls.plan})

    @staticmethod
    def get_builder_cls() -> type[StepMetadataBuilder]:
        """See :class:`StepMetadataBuilder`."""
        return StepMetadataBuilder

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        """Bytes per token and head: a page's, by 64."""
        layout = cls.plan.spec.layout(spec.head_size)
        return replace(spec, dtype=torch.uint8, state_content_bytes=layout.page_bytes // PAGE_TOKENS)

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[Any, ...]:
        """Each layer on its own, each block in one piece."""
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def get_supported_kernel_block_sizes(cls, kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        """One: the pages of a block are laid out together."""
        return [cls.plan.block_size]

    @classmethod
    def supports_block_size(cls, block_size: int | None) -> bool:
        """Exactly the plan's."""
        return block_size is None or block_size == cls.plan.block_size

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        """Those whose plan this is."""
        widths = (dtype.itemsize for dtype in cls.supported_dtypes)
        sizes = {(dim, width) for dim in HEAD_DIMS for width in widths}
        return sorted({dim for dim, width in sizes if BlockPlan.of(cls.plan.spec, dim, width) == cls.plan})


@cache
def backend_class(name: str) -> type[PagesBackend]:
    """The class of a backend name. Raises FormatError."""
    return type(name, (PagesBackend,), {"plan": BlockPlan.parse(name), "__module__": __name__, "__qualname__": name})


def __getattr__(name: str) -> type[PagesBackend]:
    if not name.startswith("HOMKV_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return backend_class(name)
