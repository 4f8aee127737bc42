"""Rows of channels -> codes, scales and centre. The arithmetic of docs/format.md, in its order.

Everything is float32 elementwise IEEE arithmetic with a fixed summation tree, so that the C++ and GPU
encoders give the same bytes. Shapes use T for a page's 64 tokens, w for a class's slots.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from homkv.errors import FormatError
from homkv.spec import ChannelClass, PageLayout

STEP = {2: 0.9957 / 64, 4: 0.3352 / 16}  # best uniform step for a normal variable, in lane units per rms
SMALLEST_SCALE = 2.0**-24
DIFFUSION = 0.25  # share of a token's V error that the next token of the page takes over
FIT_STEPS = 2


@dataclass(frozen=True)
class QuantizedRows:
    """Lane values ``[..., T, w] int8`` and E5M3 scales ``[..., T] uint8`` of one class."""

    lanes: Tensor
    scales: Tensor


def tree_sum(x: Tensor) -> Tensor:
    """Sum over the last dimension in a fixed order: zero-pad to a power of two, then add halves."""
    n = x.shape[-1]
    size = 1 << max(n - 1, 0).bit_length()
    if size != n:
        x = torch.nn.functional.pad(x, (0, size - n))
    while size > 1:
        size //= 2
        x = x[..., :size] + x[..., size:]
    return x[..., 0]


def hadamard(x: Tensor, block: int) -> Tensor:
    """Orthonormal Walsh-Hadamard transform of consecutive blocks of the last dimension. Its own inverse."""
    shape, h = x.shape, 1
    while h < block:
        x = x.reshape(*shape[:-1], shape[-1] // (2 * h), 2, h)
        x = torch.stack((x[..., 0, :] + x[..., 1, :], x[..., 0, :] - x[..., 1, :]), dim=-2)
        h *= 2
    scale: float = block**-0.5
    if x.dtype == torch.float32:
        scale = torch.tensor(scale, dtype=torch.float32, device="cpu").item()
    return x.reshape(shape) * scale


def decode_scales(scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """E5M3 bytes to ``2^(e-24) (1 + m/8)``."""
    return ((scales.to(torch.int32) << 20) + (103 << 23)).view(torch.float32).to(dtype)


def encode_scales(s: Tensor, *, up: bool) -> Tensor:
    """Float32 scales to E5M3 bytes, to nearest or upwards. Raises FormatError above 240 and for NaN."""
    byte = ((s.view(torch.int32) + ((1 << 20) - 1 if up else 1 << 19)) >> 20) - (103 << 3)
    if byte.numel() and (int(byte.max()) > 255 or not bool(torch.isfinite(s).all())):
        raise FormatError(
            f"expected row scales up to 240, found {float(s.max()):.4g}; keys or values this large cannot be "
            "quantized: use --kv-cache-dtype fp16"
        )
    return byte.clamp(min=0).to(torch.uint8)


def code_rows(y: Tensor, s: Tensor, bits: int) -> Tensor:
    """Lane values (float32 integers) of rows ``y [..., w]`` at scale ``s [...]``."""
    u = y * (1 / s).unsqueeze(-1)
    if bits == 8:
        return u.round().clamp(-127, 127)
    step, half = (64, 2) if bits == 2 else (16, 8)
    return (u * (1 / step)).floor().clamp(-half, half - 1) * step + step // 2


def fit_rows(y: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Quantize rows ``y [..., w]``: lane values (float32 integers) and E5M3 scale bytes ``[...]``.

    2 and 4 bits start at the best step for a normal variable and take two least-squares steps
    ``s = <lane, y> / <lane, lane>``; 8 bits cover the largest magnitude.
    """
    if bits == 8:
        s = (y.abs().amax(-1) * torch.tensor(1 / 127, dtype=torch.float32)).clamp_min(SMALLEST_SCALE)
        scales = encode_scales(s, up=True)
    else:
        one_over_n = torch.tensor(1 / y.shape[-1], dtype=torch.float32)
        s = (tree_sum(y * y) * one_over_n).sqrt() * torch.tensor(STEP[bits], dtype=torch.float32)
        s = s.clamp_min(SMALLEST_SCALE)
        for _ in range(FIT_STEPS):
            lane = code_rows(y, s, bits)
            s = (tree_sum(lane * y) / tree_sum(lane * lane)).clamp_min(SMALLEST_SCALE)
        scales = encode_scales(s, up=False)
    return code_rows(y, decode_scales(scales), bits), scales


def class_slice(x: Tensor, cls: ChannelClass) -> Tensor:
    """The class's slots of ``x [..., D]``, Hadamard-rotated."""
    return hadamard(x[..., cls.start : cls.stop], cls.hadamard_block)


def require_finite(x: Tensor, what: str) -> None:
    """Raise FormatError if any element is NaN or infinite."""
    if not bool(torch.isfinite(x).all()):
        raise FormatError(
            f"expected finite {what}, found NaN or infinity; the model overflowed before quantization: "
            "compute it in a wider dtype"
        )


def quantize_keys(k: Tensor, order: Tensor, layout: PageLayout) -> tuple[list[QuantizedRows], Tensor]:
    """Centre, permute, rotate and fit keys ``k [..., T, D]`` of whole pages.

    Returns one QuantizedRows per class and the centre ``[..., D] float16`` in slot order.
    """
    x = k.to(torch.float32)[..., order.to(k.device)]
    require_finite(x, "keys")
    centre = (tree_sum(x.transpose(-1, -2)) * (1 / 64)).to(torch.float16)
    if not bool(torch.isfinite(centre).all()):  # an overflowing sum is NaN here
        raise FormatError("expected key means within fp16 (65504), found a larger one; use --kv-cache-dtype fp16")
    residual = x - centre.to(torch.float32).unsqueeze(-2)
    rows = []
    for cls in layout.k_classes:
        lanes, scales = fit_rows(class_slice(residual, cls), cls.bits)
        rows.append(QuantizedRows(lanes.to(torch.int8), scales))
    return rows, centre


def quantize_values(v: Tensor, layout: PageLayout, diffusion: float = DIFFUSION) -> list[QuantizedRows]:
    """Rotate and fit values ``v [..., T, D]``, each token taking over part of its predecessor's error.

    ``y_t = x_t + a e_{t-1}``: softmax weights of neighbouring tokens are alike, so their errors cancel
    in the weighted sum. The page's first token starts without an error, so pages stay independent.
    """
    x = v.to(torch.float32)
    require_finite(x, "values")
    rows = []
    for cls in layout.v_classes:
        rotated = class_slice(x, cls)
        error = torch.zeros_like(rotated[..., 0, :])
        lanes, scales = [], []
        for t in range(rotated.shape[-2]):
            y = rotated[..., t, :] + diffusion * error
            lane, scale = fit_rows(y, cls.bits)
            error = y - decode_scales(scale).unsqueeze(-1) * lane
            lanes.append(lane.to(torch.int8))
            scales.append(scale)
        rows.append(QuantizedRows(torch.stack(lanes, -2), torch.stack(scales, -1)))
    return rows
