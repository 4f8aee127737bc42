"""What homkv needs to know of a model, measured on the model where it can be: heads, RoPE, fingerprint."""

import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
import xxhash
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from homkv.errors import UnsupportedError
from homkv.models.forward import returned_cache
from homkv.rope import Pairing, RopeSpec, no_rope, pairing_of, rope_from_config

FINGERPRINT_BYTES = 64 * 1024  # of each tensor: enough to tell models apart, quick for any size
# Said by the file or the loader, not by the model.
NOISE = {"architectures", "dtype", "torch_dtype", "transformers_version", "quantization_config", "use_cache"}

FULL, SLIDING = "full_attention", "sliding_attention"


def _layer_types(config: PreTrainedConfig) -> tuple[str, ...]:
    """Kinds of attention that a config names, layer by layer; without names all layers are of one kind."""
    if types := getattr(config, "layer_types", None):
        return tuple(types)
    window = getattr(config, "sliding_window", None) or 1 << 62
    kind = SLIDING if window < getattr(config, "max_position_embeddings", 0) else FULL
    return (kind,) * int(getattr(config, "num_hidden_layers", 1))


def sliding_windows_of(config: PreTrainedConfig) -> tuple[int | None, ...]:
    """Sliding window of each layer in tokens; None for layers that attend to all tokens, whose KV becomes pages."""
    return tuple(int(config.sliding_window) if kind == SLIDING else None for kind in _layer_types(config))


# What attention on pages does not compute. All of it is named in the config.
UNSUPPORTED: dict[str, Callable[[PreTrainedConfig], bool]] = {
    "layers of different shapes": lambda c: bool(getattr(c, "is_heterogeneous", False)),
    "an encoder and a decoder": lambda c: bool(c.is_encoder_decoder),
    "multi-head latent attention": lambda c: bool(getattr(c, "kv_lora_rank", None)),
    "state-space or recurrent layers": lambda c: any(
        hasattr(c, key) for key in ("state_size", "layers_block_type", "hybrid_override_pattern", "block_types")
    ),
    "layers that attend neither fully nor in a sliding window": lambda c: bool(set(_layer_types(c)) - {FULL, SLIDING}),
    "sliding-window attention in every layer": lambda c: set(_layer_types(c)) == {SLIDING},
    "layers that share keys and values": lambda c: bool(getattr(c, "num_kv_shared_layers", None)),
    "attention in both directions": lambda c: bool(getattr(c, "use_bidirectional_attention", None)),
    "attention sinks of its own": lambda c: c.model_type in {"gpt_oss"},
    "soft-capped attention scores": lambda c: bool(getattr(c, "attn_logit_softcapping", None)),
    "layers without RoPE between layers with it": lambda c: 0 in (getattr(c, "no_rope_layers", None) or ()),
    "ALiBi": lambda c: c.model_type in {"bloom", "mpt"} or bool(getattr(c, "alibi", False)),
    "keys and values of different size": lambda c: (
        (getattr(c, "v_head_dim", None) or c.head_dim) != c.head_dim if hasattr(c, "head_dim") else False
    ),
}


def refuse_unsupported(config: PreTrainedConfig, name: str) -> None:
    """Raise UnsupportedError if the config names an attention that homkv does not compute."""
    for what, found in UNSUPPORTED.items():
        if found(config):
            raise UnsupportedError(
                f"expected a decoder with full attention, found {what} in {name} ({config.model_type}); use a model "
                "like Llama, Qwen3 or Gemma 3"
            )


def refuse_sliding_windows(windows: Sequence[int | None], name: str, what: str) -> None:
    """Raise UnsupportedError if layers have a sliding window: ``what`` knows pages only."""
    if sliding := len(windows) - windows.count(None):
        raise UnsupportedError(
            f"expected a model with full attention in every layer for {what}, found a sliding window in {sliding} of "
            f"{len(windows)} layers of {name}; homkv.attach and `homkv eval` keep such layers exact"
        )


@torch.no_grad()
def probe_cache(model: PreTrainedModel, name: str) -> tuple[Tensor, Tensor]:
    """Keys and values ``[G, 2, D]`` for one token twice: equal but for what the position does to them.

    Of the first layer with full attention: both tokens meet equal values everywhere, so it sees them alike as well.
    """
    config = model.config.get_text_config()
    first = sliding_windows_of(config).index(None)
    token = int(config.vocab_size) // 2  # any but padding, whose keys may be zero
    ids = torch.full((1, 2), token, device=model.device)
    layers = getattr(returned_cache(model.base_model(input_ids=ids, use_cache=True)), "layers", None)
    held = [getattr(layers[first], x, None) for x in ("keys", "values")] if layers else []
    kv = [x[0] for x in held if isinstance(x, Tensor) and x.ndim == 4 and x.shape[2] == ids.shape[1]]
    if len(kv) != 2:
        raise UnsupportedError(
            f"expected a model with a KV cache of one key and one value per token and head, {name} keeps none; use a "
            "model like Llama or Qwen3"
        )
    return kv[0], kv[1]


def measure_rope(model: PreTrainedModel, keys: Tensor) -> RopeSpec:
    """Return the RoPE of a model's full attention: its own frequencies, and the pairing that its keys obey.

    Args:
        model: any decoder of transformers.
        keys: ``[G, 2, D]`` of ``probe_cache``.

    Raises:
        UnsupportedError: the keys at position 1 are not those at position 0, rotated in pairs.
    """
    config, head_dim = model.config.get_text_config(), keys.shape[-1]
    declared = pairing_of(config.model_type)
    specs = [_spec(model, config, head_dim, pairing) for pairing in _with_other(declared)]
    if specs[0].pairing == "none":
        return specs[0]
    if float((keys[:, 1] - keys[:, 0]).norm()) < 1e-3 * float(keys[:, 0].norm()):
        return no_rope(head_dim)  # only its sliding windows have positions
    errors = [rotation_error(keys, spec) for spec in specs]
    best = min(range(len(specs)), key=errors.__getitem__)
    if errors[best] > 0.5:  # a wrong pairing misses by about 1, rounding to bfloat16 by about 0.01
        raise UnsupportedError(
            f"expected keys that rotate in pairs (half or interleaved), found another rule in {config.model_type}; "
            "use a model like Llama, Qwen2 or GPT-J"
        )
    return specs[best]


def _with_other(pairing: Pairing) -> tuple[Pairing, Pairing]:
    return (pairing, "interleaved" if pairing == "half" else "half")


def _spec(model: nn.Module, config: PreTrainedConfig, head_dim: int, pairing: Pairing) -> RopeSpec:
    """The frequencies that the model computes with; those of the config only where it keeps none."""
    for module in model.modules():
        inv_freq = getattr(module, f"{FULL}_inv_freq", getattr(module, "inv_freq", None))
        if isinstance(inv_freq, Tensor):
            return RopeSpec(head_dim, 2 * inv_freq.numel(), pairing, tuple(inv_freq.double().tolist()))
    spec = rope_from_config(config.to_dict(), head_dim, pairing=pairing)
    return spec if spec.inv_freq else no_rope(head_dim)


def rotation_error(keys: Tensor, spec: RopeSpec) -> float:
    """How badly ``spec`` predicts the keys of position 1 from position 0, relative to what the rotation changes."""
    first, second = keys.double().unbind(1)
    a, b = (torch.tensor(channels) for channels in zip(*spec.pairs(), strict=True))
    angle = torch.tensor(spec.inv_freq, dtype=torch.float64, device=keys.device)
    errors = []
    for sine in (angle.sin(), -angle.sin()):  # models turn either way round
        turned = first.clone()
        turned[:, a] = first[:, a] * angle.cos() - first[:, b] * sine
        turned[:, b] = first[:, b] * angle.cos() + first[:, a] * sine
        errors.append(float((turned - second).norm() / (second - first).norm().clamp_min(1e-30)))
    return min(errors)


def fingerprint(model: PreTrainedModel) -> str:
    """Identify a model by 32 hex digits: equal in every process that loads the same weights in the same dtype.

    XXH3-128 of the config without paths and of each parameter's name, shape, dtype and first 64 KiB.
    """
    digest = xxhash.xxh3_128(json.dumps(_plain(model.config.to_dict()), sort_keys=True, default=str).encode())
    for name, weight in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        head = weight.detach().flatten()[: FINGERPRINT_BYTES // weight.element_size()].cpu().contiguous()
        digest.update(head.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    """Drop what depends on where and how a config was read, at every level."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items() if not str(k).startswith("_") and k not in NOISE}
    return value
