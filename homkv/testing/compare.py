"""Error budgets: how far a float result may lie from the float64 oracle."""

import torch
from torch import Tensor

TINY = 1e-300  # keeps 0 / 0 out of relative errors


def max_error(found: Tensor, expected: Tensor) -> float:
    """``max |found - expected|`` in float64; equal infinities differ by 0, NaN makes it infinite."""
    if found.shape != expected.shape:
        raise AssertionError(f"expected shape {tuple(expected.shape)}, found {tuple(found.shape)}")
    if found.numel() == 0:
        return 0.0
    found, expected = found.double(), expected.double()
    difference = torch.where(found == expected, 0.0, (found - expected).abs())
    return float(difference.nan_to_num(nan=torch.inf).max())


def relative_error(found: Tensor, expected: Tensor) -> float:
    """``max |found - expected| / max |expected|``; infinite elements count where they differ only."""
    return max_error(found, expected) / max(largest(expected), TINY)


def largest(x: Tensor) -> float:
    """Largest finite magnitude, 0 if there is none."""
    finite = x[torch.isfinite(x)]
    return float(finite.double().abs().max()) if finite.numel() else 0.0


def assert_relative(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Raise AssertionError unless the relative error is at most ``tolerance``."""
    error = relative_error(found, expected)
    if not error <= tolerance:
        raise AssertionError(f"expected a relative error up to {tolerance:.3g}, found {error:.3g}")


def assert_as_accurate(found: Tensor, reference: Tensor, oracle: Tensor) -> None:
    """Raise AssertionError unless ``found`` is about as close to the oracle as the float32 reference.

    The rule: ``error <= 2 * (the reference's error + one rounding step)``; the step is float32's epsilon at the
    oracle's largest magnitude.
    """
    step = torch.finfo(torch.float32).eps * largest(oracle)
    error, budget = max_error(found, oracle), 2 * (max_error(reference, oracle) + step)
    if not error <= budget:
        raise AssertionError(f"expected an error up to {budget:.3g}, found {error:.3g}")
