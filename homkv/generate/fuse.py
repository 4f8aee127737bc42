"""Fewer kernels per layer: RMS norms and rotary embeddings as one each instead of transformers' eight and ten."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm

from homkv.attention.triton.runtime import is_available, is_interpreting

Rotary = Callable[..., tuple[Tensor, Tensor]]
ROTARY = "apply_rotary_pos_emb"
TOLERANCE = 0.02  # relative, on random input: two roundings to bfloat16; another formula misses by far more


@contextmanager
def fused_norms(model: nn.Module) -> Iterator[int]:
    """Let a model's RMS norms call torch's fused kernel inside the block; gives the number of norms that do.

    A norm takes part if its class is called so and its output on random input is the fused kernel's up to rounding
    (it rounds once, transformers twice): formulas are compared, not trusted.
    """
    changed = [module for module in model.modules() if _is_plain_norm(module)]
    for module in changed:
        module.forward = _fused(module)
    try:
        yield len(changed)
    finally:
        for module in changed:
            del module.forward  # the class's own is seen again


def _fused(module: nn.Module) -> Callable[[Tensor], Tensor]:
    weight, eps = module.weight, _epsilon(module)
    assert isinstance(weight, Tensor)

    def forward(hidden_states: Tensor) -> Tensor:
        return rms_norm(hidden_states, weight.shape, weight, eps)

    return forward


def _epsilon(module: nn.Module) -> float | None:
    found = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return float(found) if isinstance(found, float) else None


@torch.no_grad()
def _is_plain_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    if not type(module).__name__.endswith("RMSNorm") or not isinstance(weight, Tensor) or weight.ndim != 1:
        return False
    x = torch.randn(4, len(weight), device=weight.device).to(weight.dtype)
    expected, found = module(x).float(), rms_norm(x, weight.shape, weight, _epsilon(module)).float()
    return bool((found - expected).norm() <= TOLERANCE * expected.norm())


@contextmanager
def fused_rotary(model: nn.Module) -> Iterator[int]:
    """Let a model's rotary embedding be one Triton kernel inside the block; gives the number of functions replaced.

    A module's ``apply_rotary_pos_emb`` takes part if it has the kernel's bits on random input; calls that the kernel
    does not take go to the module's own.
    """
    sources = {type(module).__module__ for module in model.modules()}
    sample = next(model.parameters())
    own = {name: function for name in sources if (function := getattr(sys.modules[name], ROTARY, None)) is not None}
    own = {name: function for name, function in own.items() if _is_plain_rotary(function, sample)}
    for name, function in own.items():
        setattr(sys.modules[name], ROTARY, _rotary(function))
    try:
        yield len(own)
    finally:
        for name, function in own.items():
            setattr(sys.modules[name], ROTARY, function)


def _rotary(own: Rotary) -> Rotary:
    from homkv.attention.triton.rotary import can_rotate, rotate

    def apply(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        if unsqueeze_dim == 1 and can_rotate(q, k, cos, sin):
            return rotate(q, k, cos, sin)
        return own(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)

    return apply


@torch.no_grad()
def _is_plain_rotary(function: Rotary, sample: Tensor) -> bool:
    if not is_available() or sample.device.type != ("cpu" if is_interpreting() else "cuda"):
        return False
    q, k, cos, sin = (torch.randn(2, heads, 3, 64, device=sample.device).to(sample.dtype) for heads in (2, 1, 1, 1))
    expected, found = function(q, k, cos[:, 0], sin[:, 0]), _rotary(function)(q, k, cos[:, 0], sin[:, 0])
    return all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
