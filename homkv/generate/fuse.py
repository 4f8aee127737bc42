"""Fewer kernels per layer: RMS norms, RoPE and gated activations as one kernel each instead of transformers' twenty."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.functional import rms_norm, silu

from homkv.attention.triton import runtime

TOLERANCE = 0.02  # relative, on random input: two roundings to bfloat16; another formula misses by far more


@contextmanager
def fused_norms(model: nn.Module) -> Iterator[int]:
    """Let a model's RMS norms call torch's fused kernel inside the block; gives the number of norms that do.

    A norm takes part if its class is called so and its output on random input is the fused kernel's up to rounding
    (it rounds once, transformers twice): formulas are compared, not trusted.
    """
    norms = {module: _fused(module) for module in model.modules() if _is_plain_norm(module)}
    with _replaced("forward", norms):
        yield len(norms)


@contextmanager
def fused_steps(model: nn.Module) -> Iterator[tuple[int, int, int]]:
    """As :func:`fused_norms`, and RoPE and gated activations by kernels of their own where the model's device has them.

    Gives the numbers of norms, of rotations and of MLPs that take part, by the same rule. A rotation is a function of
    the module that defines the model's architecture: inside the block other models of it call the kernel, too.
    """
    rotations: dict[Any, Any] = {}
    mlps: dict[Any, Any] = {}
    if runtime.runs_on(next(model.parameters()).device):
        from homkv.attention.triton.pointwise import gated, rope

        sources = {sys.modules[type(module).__module__] for module in model.modules()}
        rotations = {source: rope for source in sources if _is_plain_rope(source, rope, model)}
        mlps = {module: _gated(module, gated) for module in model.modules() if _is_gated_by_silu(module)}
    with fused_norms(model) as norms, _replaced("apply_rotary_pos_emb", rotations), _replaced("forward", mlps):
        yield norms, len(rotations), len(mlps)


@contextmanager
def _replaced(name: str, changed: Mapping[Any, Any]) -> Iterator[None]:
    """Objects with another attribute ``name`` inside the block."""
    before = {owner: vars(owner)[name] for owner in changed if name in vars(owner)}
    for owner, value in changed.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner in changed:
            if owner in before:
                setattr(owner, name, before[owner])
            else:
                delattr(owner, name)  # the class's own is seen again


@torch.no_grad()
def _is_plain_rope(source: Any, rope: Callable[..., tuple[torch.Tensor, ...]], model: nn.Module) -> bool:
    if not hasattr(source, "apply_rotary_pos_emb"):
        return False
    apply, weight = source.apply_rotary_pos_emb, next(model.parameters())
    q, k = (torch.randn(2, heads, 3, 64, device=weight.device).to(weight.dtype) for heads in (4, 2))
    cos, sin = torch.randn(2, 2, 3, 64, device=weight.device).to(weight.dtype)
    return all(map(_is_close, rope(q, k, cos, sin), apply(q, k, cos, sin)))


@torch.no_grad()
def _is_gated_by_silu(module: nn.Module) -> bool:
    gate, up, down, act = (getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj", "act_fn"))
    if not isinstance(gate, nn.Linear) or not callable(up) or not callable(down) or not callable(act):
        return False
    x = torch.randn(4, gate.in_features, device=gate.weight.device).to(gate.weight.dtype)
    return _is_close(down(silu(gate(x)) * up(x)), module(x)) and _is_close(silu(x), act(x))


def _is_close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found.float() - expected.float()).norm() <= TOLERANCE * expected.float().norm())


def _gated(module: Any, gated: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda x: module.down_proj(gated(module.gate_proj(x), module.up_proj(x)))


def _fused(module: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    weight, eps = module.weight, _epsilon(module)
    assert isinstance(weight, torch.Tensor)

    def forward(hidden_states: torch.Tensor) -> torch.Tensor:
        return rms_norm(hidden_states, weight.shape, weight, eps)

    return forward


def _epsilon(module: nn.Module) -> float | None:
    found = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return float(found) if isinstance(found, float) else None


@torch.no_grad()
def _is_plain_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    if not type(module).__name__.endswith("RMSNorm") or not isinstance(weight, torch.Tensor) or weight.ndim != 1:
        return False
    x = torch.randn(4, len(weight), device=weight.device).to(weight.dtype)
    return _is_close(rms_norm(x, weight.shape, weight, _epsilon(module)), module(x))
