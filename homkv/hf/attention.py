"""The attention function that transformers calls: it hands queries on to the cache layer whose keys it is given."""

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

from homkv.attention.prefill import causal, causal_window
from homkv.errors import UnsupportedError
from homkv.hf.cache import ATTENTION_NAME, SlidingLayer

# Arguments of transformers' attention functions that change the mathematics and that no layer here computes.
UNSUPPORTED_ARGUMENTS = ("softcap", "s_aux", "position_bias", "cu_seq_lens_q")


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
    layer, window = getattr(key, "homkv_layer", None), kwargs.get("sliding_window")
    if layer is not None:
        if window != (held := layer.sliding_window if isinstance(layer, SlidingLayer) else None):
            raise UnsupportedError(
                f"expected a sliding window of {held} tokens as in the model's config, found {window}"
            )
        o = layer.attend(query, key, value, scale, attention_mask, kwargs.get("position_ids"))
    elif attention_mask is None and query.shape[2] == key.shape[2]:  # a forward pass that keeps no cache
        o = causal_window(query, key, value, scale, window) if window else causal(query, key, value, scale)
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
