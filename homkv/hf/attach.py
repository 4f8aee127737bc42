"""Attaching a format to a transformers model: what its forward passes cache becomes pages."""

from types import TracebackType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from homkv.errors import UnsupportedError
from homkv.formats import PageCodec, make_codec
from homkv.formats.per_layer import require_model
from homkv.hf.attention import switch_attention
from homkv.hf.cache import KVCache
from homkv.models.describe import fingerprint, measure_rope, probe_cache, refuse_unsupported, sliding_windows_of
from homkv.models.forward import CACHE_NAMES, cache_argument
from homkv.plan import spelled
from homkv.spec import DEFAULT_FORMAT


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
    config = model.config.get_text_config()
    settings |= {
        "sliding_windows": sliding_windows_of(config),
        "max_tokens": max_tokens or config.max_position_embeddings,
    }
    return Attachment(model, codec, settings | {"impl": impl})


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
    num_layers = sliding_windows_of(config).count(None)
    require_model(codec, lambda: fingerprint(model), num_layers)
    if exact_dtype is None:
        exact_dtype = torch.float16 if model.dtype not in (torch.float16, torch.bfloat16) else model.dtype
    return codec, {
        "num_layers": num_layers,
        "num_kv_heads": keys.shape[0],
        "exact_dtype": exact_dtype,
        "device": keys.device,
    }
