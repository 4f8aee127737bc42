"""homkv inside transformers: a cache whose layers are pages, and the attention function that reads them.

    with homkv.attach(model, "balanced"):
        model.generate(...)

The model computes prompts exactly; every later token attends to the stored pages without restoring them.
On a GPU pages, sinks and windows lie beside the model; homkv.generate decodes there without waiting for the host.
"""

from abc import ABC, abstractmethod
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

from homkv.attention.prefill import causal
from homkv.cache import PagedCache
from homkv.errors import CapacityError, HomkvError, UnsupportedError
from homkv.formats import PageCodec, make_codec
from homkv.formats.per_layer import require_model
from homkv.models.describe import fingerprint, measure_rope, probe_cache, refuse_unsupported
from homkv.models.forward import CACHE_NAMES, cache_argument
from homkv.plan import spelled
from homkv.spec import DEFAULT_FORMAT

ATTENTION_NAME = "homkv"
# Arguments of transformers' attention functions that change the mathematics and that pages do not compute.
UNSUPPORTED_ARGUMENTS = ("sliding_window", "softcap", "s_aux", "position_bias", "cu_seq_lens_q")


class PagedLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers is untyped
    """One layer of an :class:`AttendingCache`, as transformers sees it."""

    is_sliding = False
    supports_early_init = False

    def __init__(self, owner: "AttendingCache", layer: int) -> None:
        super().__init__()
        self.owner, self.layer = owner, layer
        self.num_seen = 0  # columns of the attention mask so far, padding included
        self.is_pending = False  # update() was called, attention not yet

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the owner opens its sequences with the first tokens."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Hand the new keys and values on to the attention function, which stores them."""
        if self.is_pending:
            raise HomkvError(
                f"expected attention {ATTENTION_NAME!r} to follow the update of layer {self.layer}, found none; use "
                "this cache inside `with homkv.attach(model, ...)`"
            )
        self.is_pending = True
        keys = key_states.view_as(key_states)
        keys.homkv_layer = self  # type: ignore[attr-defined]  # the attention function receives this very tensor
        return keys, value_states

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, mask: Tensor | None, positions: Tensor | None
    ) -> Tensor:
        """Store ``k v [B, G, T, D]`` and attend with ``q [B, H, T, D]``; ``mask [B, seen + T]`` marks real tokens."""
        self.is_pending = False
        real = self.owner.read_mask(self.layer, mask, q.shape[2])
        if self.layer == 0 and positions is not None:
            refuse_packed(positions, real)
        out = self.owner.attend(self.layer, q, k, v, softmax_scale, real)
        self.num_seen += q.shape[2]
        return out

    def get_seq_length(self) -> int:
        """Mask columns so far."""
        return self.num_seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the mask that the next attention needs."""
        return self.num_seen + query_length, 0

    def get_max_length(self) -> int:
        """Tokens that a sequence can hold; -1 if only the pool bounds it."""
        return -1 if self.owner.max_tokens is None else self.owner.max_tokens

    def reset(self) -> None:
        """Forget the tokens; the owner frees the sequences."""
        self.num_seen, self.is_pending = 0, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Refuse: sequences span layers, so the owner reorders them."""
        raise UnsupportedError("expected KVCache.reorder_cache(), found a single layer's; reorder the whole cache")


class AttendingCache(Cache, ABC):  # type: ignore[misc]  # transformers is untyped
    """A cache that computes attention itself: its layers mark the new keys, :func:`attention_forward` calls back."""

    def __init__(self, num_layers: int, max_tokens: int | None) -> None:
        super().__init__(layers=[PagedLayer(self, i) for i in range(num_layers)])
        self.max_tokens = max_tokens
        self._mask: Tensor | None = None
        self._real: Tensor | None = None

    @abstractmethod
    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, real: Tensor | None) -> Tensor:
        """Store ``k v [B, G, T, D]`` and attend with ``q [B, H, T, D]``; ``real [B, T]`` marks tokens, None all."""

    def read_mask(self, layer: int, mask: Tensor | None, count: int) -> Tensor | None:
        """Which of the newest tokens are real, on the host; None for all.

        Read back once per forward pass: the first layer reads, the others are given the same tensor.
        """
        if mask is None:
            return None
        if layer == 0 or mask is not self._mask:
            real = mask[:, -count:].bool().cpu()
            self._mask, self._real = mask, None if bool(real.all()) else real
        return self._real


class KVCache(AttendingCache):
    """transformers' view of a PagedCache: one sequence per row of the batch.

    ``max_tokens``: per sequence, padding included; memory is reserved for it, which on a CPU is only touched as far as
    tokens are stored. None for adopted sequences: their cache decides. ``device``: the model's.
    """

    def __init__(
        self,
        codec: PageCodec,
        *,
        num_layers: int,
        num_kv_heads: int,
        max_tokens: int | None,
        exact_dtype: torch.dtype = torch.float16,
        impl: str | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(num_layers, max_tokens)
        self.codec = codec
        self._settings: dict[str, Any] = {
            "num_layers": num_layers,
            "num_kv_heads": num_kv_heads,
            "exact_dtype": exact_dtype,
            "impl": impl,
            "device": device,
        }
        self._paged: PagedCache | None = None
        self.seq_ids: list[int] = []

    @property
    def paged(self) -> PagedCache:
        """The pages. Raises HomkvError before the first forward pass."""
        if self._paged is None:
            raise HomkvError("expected a cache with tokens, found an empty one; run the model first")
        return self._paged

    @classmethod
    def adopt(cls, paged: PagedCache, seq_ids: list[int]) -> "KVCache":
        """Continue sequences that were loaded or computed elsewhere, for example received over the wire.

        Sequences of unequal length need ``position_ids`` at every forward pass: transformers counts from the longest.
        """
        cache = cls(
            paged.codec,
            num_layers=paged.num_layers,
            num_kv_heads=paged.num_kv_heads,
            max_tokens=None,
            device=paged.device,
        )
        cache._paged, cache.seq_ids = paged, list(seq_ids)
        for layer in cache.layers:
            layer.num_seen = max(paged.num_tokens(s, layer.layer) for s in seq_ids)
        return cache

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, real: Tensor | None) -> Tensor:
        """Open one sequence per batch row at the first call, then store and attend."""
        if self._paged is None:
            self._open(q.shape[0])
        if q.shape[0] != len(self.seq_ids):
            raise UnsupportedError(
                f"expected the batch of {len(self.seq_ids)} sequences this cache was started with, found {q.shape[0]}; "
                "use a new cache"
            )
        if self.max_tokens is not None:
            self._check_room(layer, q.shape[2], self.max_tokens)
        return self.paged.attend(layer, self.seq_ids, q, k, v, softmax_scale, real)

    def _check_room(self, layer: int, num_new: int, max_tokens: int) -> None:
        longest = max(self.paged.num_tokens(s, layer) for s in self.seq_ids)
        if longest + num_new > max_tokens:
            raise CapacityError(
                f"expected at most {max_tokens} tokens in a sequence, found {longest} and {num_new} more; "
                "nothing was stored: attach with a larger max_tokens"
            )

    def _open(self, batch: int) -> None:
        assert self.max_tokens is not None  # only adopted caches have none, and they are open
        blocks = batch * (self.codec.num_pages(self.max_tokens) + 1)
        self._paged = PagedCache(self.codec, num_blocks=blocks, max_sequences=batch, **self._settings)
        self.seq_ids = [self._paged.new_sequence() for _ in range(batch)]

    def kv_bytes(self) -> int:
        """Bytes of all sequences: pages, sinks and windows."""
        return sum(self.paged.kv_bytes(s) for s in self.seq_ids)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the chosen beams; beams with a common past share its pages."""
        chosen = [self.seq_ids[i] for i in beam_idx.tolist()]
        for seq_id in set(self.seq_ids) - set(chosen):
            self.paged.free(seq_id)
        # The first to choose a beam goes on with it, the others with copies: never more sequences than before.
        self.seq_ids = [s if s not in chosen[:i] else self.paged.fork(s) for i, s in enumerate(chosen)]

    def reset(self) -> None:
        """Free all sequences; the cache can be used again."""
        for seq_id in self.seq_ids:
            self.paged.free(seq_id)
        self._paged, self.seq_ids = None, []
        super().reset()

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse: a sealed page cannot be opened again."""
        raise UnsupportedError("expected tokens to stay, found crop(); assisted decoding does not work on pages")

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Refuse: expand the inputs instead."""
        raise UnsupportedError("expected a fixed batch, found batch_repeat_interleave(); repeat the inputs instead")

    def batch_select_indices(self, indices: Tensor) -> None:
        """Refuse: select the inputs instead."""
        raise UnsupportedError("expected a fixed batch, found batch_select_indices(); use a new cache")


def refuse_packed(positions: Tensor, real: Tensor | None) -> None:
    """Raise UnsupportedError unless the real tokens of every row are consecutive: ``positions [B or 1, T]``.

    Several documents in one row, told apart only by positions that start again, would see each other.
    """
    if positions.shape[1] == 1:
        return
    positions = positions.cpu()
    for row in range(positions.shape[0]):
        found = positions[row] if real is None else positions[row][real[row]]
        if bool((found.diff() != 1).any()):
            raise UnsupportedError(
                f"expected consecutive positions, found {found.tolist()[:8]} …; put each document in a row of its own"
            )


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function for transformers' AttentionInterface; ``query [B, H, T, D]`` to ``[B, T, H, D]``."""
    for name in UNSUPPORTED_ARGUMENTS:
        if kwargs.get(name) is not None:
            raise UnsupportedError(f"expected plain causal attention, found {name}; this model does not run on pages")
    if dropout:
        raise UnsupportedError(f"expected dropout 0, found {dropout}; call model.eval() first")
    if attention_mask is not None and attention_mask.ndim != 2:
        raise UnsupportedError(
            f"expected a padding mask [B, tokens], found {attention_mask.ndim} dimensions; pages attend causally only"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer = getattr(key, "homkv_layer", None)
    if layer is not None:
        o = layer.attend(query, key, value, scale, attention_mask, kwargs.get("position_ids"))
    elif attention_mask is None and query.shape[2] == key.shape[2]:
        o = causal(query, key, value, scale)  # a forward pass that keeps no cache
    else:
        raise UnsupportedError(
            "expected keys from a homkv cache, found another cache or padding without a cache; pass use_cache=True and "
            "no cache of another kind"
        )
    return o.transpose(1, 2).contiguous(), None


def switch_attention(model: PreTrainedModel) -> str:
    """Make a model call :func:`attention_forward`; returns the name of the attention that it had.

    Raises UnsupportedError if it does so already.
    """
    if model.config._attn_implementation == ATTENTION_NAME:
        raise UnsupportedError("expected a model without homkv attached, found one; leave the other block first")
    # transformers' registries map names to functions; registering the same stateless function again is harmless.
    AttentionInterface.register(ATTENTION_NAME, attention_forward)
    AttentionMaskInterface.register(ATTENTION_NAME, flash_attention_mask)
    before = str(model.config._attn_implementation)
    model.set_attn_implementation(ATTENTION_NAME)
    return before


class Attachment:
    """Makes a model use pages for as long as the ``with`` block runs. Built by :func:`attach`."""

    def __init__(self, model: PreTrainedModel, codec: PageCodec, settings: dict[str, Any]) -> None:
        self.model, self.codec, self._settings = model, codec, settings
        self.last_cache: KVCache | None = None  # of the most recent forward pass that started one
        self._hook: torch.utils.hooks.RemovableHandle | None = None
        self._implementation = ""

    def new_cache(self) -> KVCache:
        """Return an empty cache for the model's ``cache`` (``past_key_values`` before transformers 5.24)."""
        return KVCache(self.codec, **self._settings)

    def __enter__(self) -> "Attachment":
        self._implementation = switch_attention(self.model)
        self._hook = self.model.register_forward_pre_hook(self._provide_cache, with_kwargs=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        self.model.set_attn_implementation(self._implementation)

    def _provide_cache(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Give every forward pass that starts a cache a paged one."""
        past = next((kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None), None)
        use_cache = kwargs.get("use_cache")
        wanted = self.model.config.use_cache if use_cache is None else use_cache
        if isinstance(past, KVCache) or not wanted:
            return args, kwargs
        if past is not None and (not isinstance(past, DynamicCache) or past.get_seq_length()):
            raise UnsupportedError(
                f"expected no cache or a homkv cache, found a {type(past).__name__} with tokens; start the "
                "prompt inside the block"
            )
        if getattr(past, "homkv_replaced", False):  # it stayed empty: going on with it would forget the prompt
            raise UnsupportedError(
                f"expected the cache that the model returned, found the {type(past).__name__} it replaced; "
                "pass the returned cache, or start with new_cache()"
            )
        if past is not None:
            past.homkv_replaced = True
        self.last_cache = self.new_cache()
        others = {name: value for name, value in kwargs.items() if name not in CACHE_NAMES}
        return args, others | {cache_argument(self.model): self.last_cache}


def attach(
    model: PreTrainedModel,
    kv_cache_dtype: str = DEFAULT_FORMAT,
    *,
    impl: str | None = None,
    exact_dtype: torch.dtype | None = None,
    max_tokens: int | None = None,
) -> Attachment:
    """Let a transformers model keep its KV cache as pages inside a ``with`` block.

    ``kv_cache_dtype``: a format's name (`homkv formats`) or a plan file (`homkv calibrate`). ``impl``: "cpu", "triton"
    (GPUs) or "reference"; None takes the format's first on the model's device. ``exact_dtype``: of sinks and window;
    None takes the model's 16-bit dtype, or float16 for a float32 model. ``max_tokens``: longest sequence, for which a
    GPU's memory is taken; None takes the model's context.
    Raises FormatError for an unknown format, UnsupportedError for a head_dim, an attention or a placement not covered.
    """
    codec, settings = measure(model, kv_cache_dtype, exact_dtype)
    context = model.config.get_text_config().max_position_embeddings
    return Attachment(model, codec, settings | {"max_tokens": max_tokens or context, "impl": impl})


def measure(
    model: PreTrainedModel, kv_cache_dtype: str, exact_dtype: torch.dtype | None = None
) -> tuple[PageCodec, dict[str, Any]]:
    """Bind a format to a model: the codec, and the arguments of PagedCache that the model decides. See attach()."""
    config = model.config.get_text_config()
    name = str(model.config.name_or_path or config.model_type)
    refuse_unsupported(config, name)
    devices = {str(weight.device) for weight in model.parameters()}
    if len(devices) > 1:
        raise UnsupportedError(f"expected a model on one device, found {name} on {', '.join(sorted(devices))}; move it")
    keys, _ = probe_cache(model, name)
    codec = make_codec(spelled(kv_cache_dtype), keys.shape[-1], measure_rope(model, keys))
    require_model(codec, lambda: fingerprint(model), config.num_hidden_layers)
    if exact_dtype is None:
        exact_dtype = torch.float16 if model.dtype not in (torch.float16, torch.bfloat16) else model.dtype
    return codec, {
        "num_layers": config.num_hidden_layers,
        "num_kv_heads": keys.shape[0],
        "exact_dtype": exact_dtype,
        "device": keys.device,
    }
