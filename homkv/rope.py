"""RoPE order of channels: from the slowest to the fastest rotating pair. Standard library only.

Far from the query, slowly rotating channels carry the content of a key; the fastest ones average out
while their quantization noise does not. So the rows formats give bits to channels in this order.
The order needs the model's config alone, no data.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from homkv.errors import UnsupportedError

Pairing = Literal["half", "interleaved", "none"]

# transformers' model_type of the language models that rotate channels 2p and 2p + 1 together; all others use halves.
# homkv.models checks the pairing against the keys of the loaded model, so a type missing here is found at load.
INTERLEAVED_TYPES = {
    *("blt", "codegen", "cohere", "cohere2", "cohere2_moe", "ernie4_5", "ernie4_5_moe", "glm", "glm4", "glm4v_text"),
    *("glm_ocr_text", "gptj", "helium", "llama4_text"),
}


@dataclass(frozen=True)
class RopeSpec:
    """How a model rotates its keys.

    ``rotary_dim`` channels at the front of the head rotate; the rest (partial rotary) do not.
    ``pairing``: which channels turn together. ``half``: p and p + rotary_dim/2 (Llama, Qwen, GPT-NeoX);
    ``interleaved``: 2p and 2p + 1 (GPT-J, Cohere); ``none``: no RoPE at all.
    ``inv_freq``: radians per token of each pair, ``[rotary_dim / 2]``.
    """

    head_dim: int
    rotary_dim: int
    pairing: Pairing
    inv_freq: tuple[float, ...]

    def __post_init__(self) -> None:
        if self.pairing != "none" and len(self.inv_freq) * 2 != self.rotary_dim:
            raise UnsupportedError(
                f"expected one frequency per channel pair ({self.rotary_dim // 2}), found {len(self.inv_freq)}; "
                "build the RopeSpec with rope_from_config() or pass the model's own inv_freq"
            )

    def channel_order(self) -> tuple[int, ...]:
        """Return ``order`` with ``order[slot] = channel``: unrotated first, then slowest to fastest pair.

        The two partners of a pair are neighbours. Equal frequencies keep the higher pair index first,
        which is what a monotonically falling ``inv_freq`` gives anyway.
        """
        if self.pairing == "none":
            return tuple(range(self.head_dim))
        pairs = self.pairs()
        slowest_first = sorted(range(len(pairs)), key=lambda p: (self.inv_freq[p], -p))
        order = list(range(self.rotary_dim, self.head_dim))
        for p in slowest_first:
            order += pairs[p]
        return tuple(order)

    def pairs(self) -> tuple[tuple[int, int], ...]:
        """Return the two channels that ``inv_freq[p]`` turns together, for each p."""
        half = self.rotary_dim // 2
        if self.pairing == "interleaved":
            return tuple((2 * p, 2 * p + 1) for p in range(half))
        return tuple((p, p + half) for p in range(half))


def pairing_of(model_type: str) -> Pairing:
    """Which channels transformers rotates together in models of this ``model_type``."""
    return "interleaved" if model_type in INTERLEAVED_TYPES else "half"


def no_rope(head_dim: int) -> RopeSpec:
    """A model without RoPE (learned, ALiBi or no positions): channels keep their natural order."""
    return RopeSpec(head_dim=head_dim, rotary_dim=0, pairing="none", inv_freq=())


def default_rope(head_dim: int, theta: float = 10_000.0, *, pairing: Pairing = "half") -> RopeSpec:
    """Unscaled RoPE over the whole head: ``inv_freq[p] = theta ** (-2 p / head_dim)``."""
    return RopeSpec(head_dim, head_dim, pairing, base_frequencies(head_dim, theta))


def base_frequencies(rotary_dim: int, theta: float) -> tuple[float, ...]:
    """``theta ** (-2 p / rotary_dim)`` for p in [0, rotary_dim / 2): RoFormer, arXiv 2104.09864, eq. 15."""
    return tuple(theta ** (-2 * p / rotary_dim) for p in range(rotary_dim // 2))


def llama3_frequencies(base: Sequence[float], p: Mapping[str, Any]) -> tuple[float, ...]:
    """Llama 3.1's scaling: divide low frequencies by ``factor``, keep high ones, blend between."""
    factor, low, high = float(p["factor"]), float(p["low_freq_factor"]), float(p["high_freq_factor"])
    length = float(p["original_max_position_embeddings"])

    def scale(f: float) -> float:
        turns = length * f / (2 * math.pi)  # full rotations inside the original context
        if turns < low:
            return f / factor
        if turns > high:
            return f
        smooth = (turns - low) / (high - low)
        return (1 - smooth) * f / factor + smooth * f

    return tuple(scale(f) for f in base)


def yarn_frequencies(base: Sequence[float], theta: float, p: Mapping[str, Any]) -> tuple[float, ...]:
    """YaRN (arXiv 2309.00071, section 3.2): a linear ramp between interpolated and original frequencies."""
    factor = float(p["factor"])
    length = float(p["original_max_position_embeddings"])
    fast, slow = float(p.get("beta_fast") or 32), float(p.get("beta_slow") or 1)
    dim = 2 * len(base)

    def pair_with(turns: float) -> float:
        return dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    lo, hi = pair_with(fast), pair_with(slow)
    if p.get("truncate", True):
        lo, hi = math.floor(lo), math.ceil(hi)
    lo, hi = max(lo, 0), min(hi, dim - 1)
    span = max(hi - lo, 1e-3)
    keep = [1 - min(max((i - lo) / span, 0.0), 1.0) for i in range(len(base))]
    return tuple(f / factor * (1 - w) + f * w for f, w in zip(base, keep, strict=True))


def rope_from_config(config: Mapping[str, Any], head_dim: int, *, pairing: Pairing = "half") -> RopeSpec:
    """Build the RopeSpec from a transformers config given as a dict.

    Reads ``rope_parameters`` (transformers 5) or ``rope_theta`` + ``rope_scaling`` (4),
    ``partial_rotary_factor``, and GPT-J's ``rotary_dim``, whose theta is 10,000 without being said.
    A config with none of these has no RoPE.
    Raises UnsupportedError for a scaling whose frequencies are not known here, such as longrope.
    """
    params = dict(config.get("rope_scaling") or {}) | dict(config.get("rope_parameters") or {})
    gptj_dim = config.get("rotary_dim") or 0
    theta = params.get("rope_theta", config.get("rope_theta", 10_000.0 if gptj_dim else None))
    if theta is None:
        return no_rope(head_dim)
    partial = params.get("partial_rotary_factor", config.get("partial_rotary_factor")) or 1.0
    rotary_dim = gptj_dim or int(head_dim * float(partial)) // 2 * 2
    base = base_frequencies(rotary_dim, float(theta))
    kind = params.get("rope_type", params.get("type")) or "default"
    match kind:
        case "default" | "dynamic":  # dynamic NTK raises theta with the length: other values, the same order
            freqs = base
        case "linear":
            freqs = tuple(f / float(params["factor"]) for f in base)
        case "llama3":
            freqs = llama3_frequencies(base, params)
        case "yarn":
            params.setdefault("original_max_position_embeddings", config.get("max_position_embeddings"))
            freqs = yarn_frequencies(base, float(theta), params)
        case _:
            raise UnsupportedError(
                f"expected rope_type default, dynamic, linear, llama3 or yarn, found {kind!r}; "
                "construct RopeSpec yourself with the model's inv_freq"
            )
    return RopeSpec(head_dim, rotary_dim, pairing, freqs)
