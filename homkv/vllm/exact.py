"""The exact blocks of a sequence as vLLM sees them: a spec, the manager that allocates them, and an auxiliary layer.

Every attention layer brings one :class:`ExactLayer`, a layer without weights whose only purpose is a second cache
group: a few blocks of 64 tokens per sequence (the first tokens, and the ring of the window), as large as blocks of
pages and from the same pool. The first one is shared through the prefix cache, the others are the sequence's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.core.kv_cache_utils import resolve_block_hashes
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.kv_cache_interface import AttentionSpec
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from homkv.spec import PAGE_TOKENS
from homkv.vllm.blocks import BlockPlan, ceil_div


@dataclass(frozen=True, kw_only=True)
class ExactSpec(AttentionSpec):  # type: ignore[misc]  # vllm is untyped to us
    """At most ``exact_blocks`` blocks of 64 tokens per sequence, however long it is."""

    exact_blocks: int

    @property
    def block_table_token_alignment(self) -> int | None:
        """None: the table's width does not follow the length."""
        return None

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        """Bytes of one sequence."""
        return self.exact_blocks * int(self.page_size_bytes)

    def max_num_blocks_per_req(self, vllm_config: VllmConfig, max_len: int) -> int:
        """Columns of the block table."""
        return self.exact_blocks

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, Any]) -> bool:
        """Only exact blocks go with exact blocks."""
        return all(isinstance(spec, ExactSpec) for spec in kv_cache_specs.values())

    @property
    def uses_slot_mapping(self) -> bool:
        """Tokens are placed by their position alone."""
        return False


class ExactManager(SingleTypeKVCacheManager):  # type: ignore[misc]
    """Gives a sequence its blocks as it grows to a few, and shares the first one with sequences of the same prefix."""

    def _missing(self, request_id: str, num_tokens: int, hits: int = 0) -> int:
        needed = min(ceil_div(num_tokens, self.block_size), int(self.kv_cache_spec.exact_blocks))
        return max(needed - len(self.req_to_blocks.get(request_id, ())) - hits, 0)

    def _claim(self, request_id: str, num_tokens: int) -> list[Any]:
        blocks = self.block_pool.get_new_blocks(self._missing(request_id, num_tokens))
        self.req_to_blocks[request_id].extend(blocks)
        if self._record_new_block_ids:
            self.new_block_ids.extend(block.block_id for block in blocks)
        return list(blocks)

    def get_num_blocks_to_allocate(
        self, request_id: str, num_tokens: int, new_computed_blocks: Sequence[Any], *args: Any, **kwargs: Any
    ) -> int:
        """Blocks that the pool must be able to give."""
        evictable = self._get_num_evictable_blocks(new_computed_blocks)
        return self._missing(request_id, num_tokens, len(new_computed_blocks)) + int(evictable)

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[Any]:
        """What is missing for ``num_tokens``."""
        return self._claim(request_id, num_tokens)

    def allocate_external_computed_blocks(
        self,
        request_id: str,
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
        record_for_zeroing: bool = True,
    ) -> None:
        """Room for blocks that a connector will fill."""
        if num_external_computed_tokens > 0:
            self._claim(request_id, num_local_computed_tokens + num_external_computed_tokens)

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: Any,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: Any,
        kv_cache_spec: Any,
        drop_eagle_block: bool,
        alignment_tokens: int,
        dcp_world_size: int = 1,
        pcp_world_size: int = 1,
    ) -> tuple[tuple[list[Any], ...], int]:
        """Any prefix whose first block is known may be hit: the window of a hit is not needed (docs/vllm.md)."""
        length = max_length // alignment_tokens * alignment_tokens
        hashes = resolve_block_hashes(
            block_hashes,
            block_pool.hash_block_size,
            kv_cache_spec.block_size,
            supports_fine_grained_hash_lookup=False,
            alignment_tokens=alignment_tokens,
        )
        first = hashes[0] if length and len(hashes) else None
        found = None if first is None else block_pool.get_cached_block(first, kv_cache_group_ids)
        if not found:
            return tuple([] for _ in kv_cache_group_ids), 0
        return tuple([block] for block in found), length

    def cache_blocks(self, request: Any, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """Offer the first block to others; the rest is nobody else's."""
        super().cache_blocks(request, min(num_tokens, self.block_size), *args, **kwargs)

    def remove_skipped_blocks(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is ever skipped."""


def register_spec() -> None:
    """Tell vLLM who manages an :class:`ExactSpec`. Idempotent."""
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(ExactSpec, ExactManager, uniform_type_base_spec=ExactSpec)


class ExactTableBuilder(AttentionMetadataBuilder):  # type: ignore[misc]
    """The metadata of an exact layer is its block table, ``[B, exact_blocks] int32``: vLLM's own, at its address."""

    _cudagraph_support: ClassVar[Any] = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: Any) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> Any:
        """Hand the table on."""
        num_reqs, columns = common_attn_metadata.num_reqs, self.kv_cache_spec.exact_blocks
        return common_attn_metadata.block_table_tensor[:num_reqs, :columns]


class ExactBackend(AttentionBackend):  # type: ignore[misc]
    """What vLLM asks about a layer of the second group."""

    plan: ClassVar[BlockPlan]

    @classmethod
    def get_name(cls) -> str:  # type: ignore[override, unused-ignore]
        """The name of the attention layers' backend: NIXL's handshake compares that of any one layer."""
        return cls.plan.name

    @staticmethod
    def get_impl_cls() -> Any:
        """There is none: the attention layer computes."""
        raise NotImplementedError("exact layers hold memory and compute nothing")

    @staticmethod
    def get_builder_cls() -> type[ExactTableBuilder]:
        """See :class:`ExactTableBuilder`."""
        return ExactTableBuilder

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[Any, ...]:
        """Each layer on its own, each block in one piece."""
        return (KVCacheLayout.LBHNC,)

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        """A block is never cut; NIXL asks this about the blocks of pages as well."""
        return [MultipleOf(PAGE_TOKENS)]


@cache
def exact_backend(plan: BlockPlan) -> type[ExactBackend]:
    """The class for the layers that belong to a plan's attention layers."""
    return type(f"{plan.name}_EXACT", (ExactBackend,), {"plan": plan, "__module__": __name__})


class ExactLayer(nn.Module, AttentionLayerBase):  # type: ignore[misc]
    """Owner of one layer's exact blocks."""

    def __init__(self, name: str, num_kv_heads: int, head_size: int, plan: BlockPlan, config: VllmConfig) -> None:
        super().__init__()
        self.layer_name, self.num_kv_heads, self.head_size, self.plan = name, num_kv_heads, head_size, plan
        self.kv_cache: Tensor = torch.tensor([])
        config.compilation_config.static_forward_context[name] = self

    def get_attn_backend(self) -> type[AttentionBackend]:
        """See :class:`ExactBackend`."""
        return exact_backend(self.plan)

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> ExactSpec:
        """As many bytes as a block of pages."""
        return ExactSpec(
            block_size=PAGE_TOKENS,
            num_kv_heads=self.num_kv_heads,
            head_size=self.head_size,
            dtype=torch.uint8,
            state_content_bytes=self.plan.block_bytes(self.head_size) // PAGE_TOKENS,
            exact_blocks=self.plan.exact_blocks,
        )
