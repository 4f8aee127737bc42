"""PyTorch's attention, one named backend at a time: the 16-bit peers that everybody has."""

from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from homkv.errors import UnsupportedError

BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


def attend(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, backend: str, *, is_causal: bool = False) -> Tensor:
    """``softmax(softmax_scale q k^T) v`` by this backend and no other.

    ``q [B, H, T, D]``, ``k v [B, G, S, D]``, 16 bits; ``backend``: "flash" or "cudnn". All sequences have S
    tokens. Raises UnsupportedError with PyTorch's reason if the backend does not take the call.
    """
    if backend not in BACKENDS:
        raise UnsupportedError(f"expected a backend in {tuple(BACKENDS)}, found {backend!r}; choose one of these")
    try:
        with sdpa_kernel(BACKENDS[backend]):
            return scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=softmax_scale, enable_gqa=True)
    except RuntimeError as error:
        raise UnsupportedError(
            f"expected PyTorch's {backend} attention to take {tuple(q.shape)} {q.dtype} on {q.device}, found: "
            f"{str(error).strip()}; use another peer"
        ) from error
