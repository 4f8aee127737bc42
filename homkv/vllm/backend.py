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

from homkv.errors import UnsupportedError
from homkv.spec import PAGE_TOKENS
from homkv.vllm.blocks import BlockPlan, ceil_div
from homkv.vllm.lasting import Kept, Lasting
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

    ``num_single``: of the former; ``lengths [B]``: tokens after this step; ``tables [B, num_pages]``: see page_ids;
    ``planned``: where the single tokens go, or what kernels need to find that out on a GPU.
    """

    num_single: int
    chunks: list[Chunk]
    lengths: Tensor
    tables: Tensor
    planned: Places | Kept


class StepMetadataBuilder(AttentionMetadataBuilder):  # type: ignore[misc]  # vllm is untyped to us
    """Splits a batch into single tokens and chunks. On GPUs a CUDA graph may hold the step if there are no chunks."""

    plan: ClassVar[BlockPlan]
    _cudagraph_support: ClassVar[Any] = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: Any) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=False)
        self._lasting: Lasting | None = None
        if torch.device(device).type != "cpu":
            self._lasting = Lasting(vllm_config.scheduler_config.max_num_seqs, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> StepMetadata:
        """Without speculation vLLM's upper bound of a length is the length.

        Raises UnsupportedError for a batch that is not causal throughout.
        """
        batch = common_attn_metadata
        refuse_masks(batch)
        num_single = split_decodes_and_prefills(batch, decode_threshold=1)[0]
        chunks = self._chunks(batch, num_single)
        blocks = batch.block_table_tensor[: batch.num_reqs]
        if self._lasting is None:
            lengths = _host_lengths(batch)[:num_single]
            blocks = blocks[:, : max(ceil_div(batch.max_seq_len, self.plan.block_size), 1)]
            tables = page_ids(blocks, self.plan.pages_per_block)
            places = Places.of(lengths, self.plan.ring_blocks)
            return StepMetadata(num_single, chunks, batch.seq_lens, tables, places)
        tables = page_ids(blocks, self.plan.pages_per_block)
        kept = self._lasting.keep(num_single, batch.seq_lens[: batch.num_reqs], tables)
        return StepMetadata(num_single, chunks, kept.lengths, kept.tables, kept)

    def _chunks(self, batch: CommonAttentionMetadata, num_single: int) -> list[Chunk]:
        if num_single == batch.num_reqs:
            return []
        lengths, starts = _host_lengths(batch).tolist(), batch.query_start_loc_cpu.tolist()
        spans = [(row, starts[row], starts[row + 1]) for row in range(num_single, batch.num_reqs)]
        chunks = [Chunk(row, lengths[row] - (stop - first), slice(first, stop)) for row, first, stop in spans]
        return [chunk for chunk in chunks if chunk.at.stop > chunk.at.start]


def refuse_masks(batch: CommonAttentionMetadata) -> None:
    """Raise UnsupportedError if tokens of the batch attend to anything but all tokens up to themselves."""
    found = ["attention that is not causal"] if batch.causal is not True else []
    found += ["prefixes that attend both ways"] if any((batch.mm_req_doc_ranges or {}).values()) else []
    found += ["sliding windows behind a prefix"] if batch.rswa_prefix_lens is not None else []
    if found:
        raise UnsupportedError(
            f"expected tokens that attend to all tokens up to themselves, found {', '.join(found)}; start vLLM without "
            "homkv's backend for this model"
        )


def _host_lengths(batch: CommonAttentionMetadata) -> Tensor:
    found: Tensor | None = batch.seq_lens_cpu_upper_bound
    return batch.seq_lens.cpu() if found is None else found


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

    @classmethod
    def get_builder_cls(cls) -> type[StepMetadataBuilder]:
        """See :class:`StepMetadataBuilder`."""
        return type(f"{cls.plan.name}_Builder", (StepMetadataBuilder,), {"plan": cls.plan})

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
        return cls.plan.head_dims()


@cache
def backend_class(name: str) -> type[PagesBackend]:
    """The class of a backend name. Raises FormatError."""
    return type(name, (PagesBackend,), {"plan": BlockPlan.parse(name), "__module__": __name__, "__qualname__": name})


def __getattr__(name: str) -> type[PagesBackend]:
    if name == "MLA":
        raise UnsupportedError(
            "expected a decoder with plain full attention, found multi-head latent attention (MLA); unset "
            "HOMKV_VLLM_BACKEND for this model"
        )
    if not name.startswith("HOMKV_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return backend_class(name)
