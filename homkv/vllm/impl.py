"""Attention of one layer inside vLLM: store the step's tokens, seal pages, attend."""

import itertools
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.v1.attention.backend import AttentionImpl

from homkv.attention import api
from homkv.attention.prefill import causal
from homkv.attention.view import LayerView
from homkv.errors import UnsupportedError
from homkv.formats.rows import RowsCodec
from homkv.rope import pairing_of, rope_from_config
from homkv.vllm.backend import Chunk, StepMetadata
from homkv.vllm.blocks import BlockPlan
from homkv.vllm.exact import ExactLayer
from homkv.vllm.scheduling import require_ending
from homkv.vllm.store import LayerStore, Places, Ring, values_to_store

EXACT_PREFIX = "homkv.layers"


def channel_order(config: VllmConfig, head_size: int) -> tuple[int, ...]:
    """Slot -> channel of the model's keys, from its config."""
    text = config.model_config.hf_text_config
    return rope_from_config(text.to_dict(), head_size, pairing=pairing_of(text.model_type)).channel_order()


def refuse(config: VllmConfig, arguments: dict[str, Any]) -> None:
    """Raise UnsupportedError for what pages do not compute; ``arguments``: of the layer, None or empty if unused."""
    parallel, kv_transfer = config.parallel_config, config.kv_transfer_config
    found = [name for name, value in arguments.items() if value]
    found += ["speculative decoding"] if config.speculative_config is not None else []
    found += ["pipeline parallelism"] if parallel.pipeline_parallel_size > 1 else []
    found += ["context parallelism"] if parallel.decode_context_parallel_size > 1 else []
    if kv_transfer is not None and parallel.tensor_parallel_size > 1:
        found.append("KV transfer between tensor-parallel instances")
    if found:
        raise UnsupportedError(
            f"expected a decoder with plain full attention, found {', '.join(found)}; start vLLM without "
            "homkv's backend for this model, or without the option"
        )


class PagesImpl(AttentionImpl):  # type: ignore[misc]  # vllm is untyped to us
    """vLLM's attention interface on top of :class:`LayerStore`."""

    plan: ClassVar[BlockPlan]

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = "decoder",
        kv_sharing_target_layer_name: str | None = None,
        **others: Any,
    ) -> None:
        config = get_current_vllm_config()
        arguments = {
            "ALiBi": alibi_slopes,
            "sliding-window attention": sliding_window,
            f"--kv-cache-dtype {kv_cache_dtype}": kv_cache_dtype != "auto",
            "a logits soft cap": logits_soft_cap,
            f"{attn_type} attention": attn_type != "decoder",
            "layers that share their KV": kv_sharing_target_layer_name,
            **others,
        }
        refuse(config, arguments)
        require_ending(config)
        self.raw_dtype = config.model_config.dtype
        self.plan.check(head_size, self.raw_dtype.itemsize, config.cache_config.block_size)
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.codec = RowsCodec(head_size, self.plan.spec, channel_order(config, head_size))
        self.exact = self._exact_layer(config)
        self._store: LayerStore | None = None

    def _exact_layer(self, config: VllmConfig) -> ExactLayer:
        names = config.compilation_config.static_forward_context
        name = next(n for i in itertools.count() if (n := f"{EXACT_PREFIX}.{i}.exact") not in names)
        return ExactLayer(name, self.num_kv_heads, self.head_size, self.plan, config)

    def store(self, pages: Tensor) -> LayerStore:
        """Views of the layer's cache; made anew when vLLM binds another one, perhaps larger at the same address."""
        found = self._store
        if found is None or not found.is_of(pages, self.exact.kv_cache):
            self._store = found = LayerStore(self.codec, self.plan, pages, self.exact.kv_cache, self.raw_dtype)
        return found

    @torch.no_grad()
    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: StepMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """``query output [N, H, D]``, ``key value [N, G, D]``. Everything is stored before anything attends.

        A sequence may start behind pages that another one of the same step has just written. So rings are copied first,
        then all tokens stored, then pages and first tokens read.
        """
        if output_scale is not None or output_block_scale is not None:
            raise UnsupportedError("expected attention that puts out plain numbers, found a quantized output asked for")
        if attn_metadata is None:  # profiling
            return output.zero_()
        step, store = attn_metadata, self.store(kv_cache)
        exact = get_forward_context().attn_metadata[self.exact.layer_name]
        rings = [self._ring(store, exact, chunk) for chunk in step.chunks]
        for chunk, ring in zip(step.chunks, rings, strict=True):
            table, blocks = step.tables[chunk.row], exact[chunk.row]
            store.store_many(table, blocks, chunk.start, key[chunk.at], value[chunk.at], ring)
        n = step.num_single
        if n:
            view, taint = _store_and_view(store, step, exact[:n], key[:n], value[:n])
            o, _ = api.attend(query[:n].unsqueeze(2), view, self.codec, self.scale)
            torch.add(o.squeeze(2), taint[:, None, None], out=output[:n])
        for chunk, ring in zip(step.chunks, rings, strict=True):
            q, k, v = (x[chunk.at].transpose(0, 1).unsqueeze(0) for x in (query, key, value))
            if ring is None:
                o = causal(q, k, values_to_store(k, v), self.scale)
            else:
                row = slice(chunk.row, chunk.row + 1)
                view = store.view(step.tables[row], exact[row], ring)
                o = api.extend(q, k, values_to_store(k, v), view, self.codec, self.scale) + store.taint(view)
            output[chunk.at] = o[0].transpose(0, 1).to(output.dtype)
        return output

    def _ring(self, store: LayerStore, exact: Tensor, chunk: Chunk) -> Ring | None:
        """What a chunk finds of its own sequence's window; None if it is the first one."""
        if chunk.start == 0:
            return None
        before = torch.tensor([chunk.start], device=exact.device)
        return store.ring(exact[chunk.row : chunk.row + 1], before)


def _store_and_view(
    store: LayerStore, step: StepMetadata, exact: Tensor, k: Tensor, v: Tensor
) -> tuple[LayerView, Tensor]:
    """Store a token of each of n sequences; return what it attends to, and the taint.

    ``exact [n, 1 + R]``, ``k v [n, G, D]``.
    """
    n = step.num_single
    if isinstance(step.planned, Places):
        store.store_one(step.tables[:n], exact, step.planned, k, v)
        view = store.view(step.tables[:n], exact, store.ring(exact, step.lengths[:n]), new=1)
        return view, store.taint(view)
    return store.step(step.planned.pages, exact, step.lengths[:n], k, v)
