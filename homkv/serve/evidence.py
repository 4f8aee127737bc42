"""What a decode instance holds of a prompt, in a form that two runs, or two services, can compare.

Equal texts prove little: an answer often survives damaged KV. Equal bytes prove that the transfer changed nothing, and
equal attention over them that they are read through the right references.
"""

from collections.abc import Callable, Iterable

import torch
import xxhash
from torch import Tensor

from homkv.models import LoadedModel
from homkv.serve.messages import Evidence

QUERY_SEED = 7  # of the queries that attention is probed with: any fixed one


def collect(
    loaded: LoadedModel, stored: Callable[[int], Iterable[Tensor]], attend: Callable[[int, Tensor], Tensor]
) -> Evidence:
    """Digest everything and attend once per layer.

    ``stored(layer)``: what is held; ``attend(layer, q)``: attention of ``q [1, H, 1, D]`` over it, of the same shape.
    ``kv`` is XXH3-128 over all bytes, layer by layer; ``attention`` float32 little endian ``[L, H, D]``.
    """
    digest, outputs = xxhash.xxh3_128(), []
    generator = torch.Generator().manual_seed(QUERY_SEED)
    for layer in range(loaded.num_layers):
        for part in stored(layer):
            digest.update(part.contiguous().view(torch.uint8).numpy().data)
        q = torch.randn(1, loaded.num_q_heads, 1, loaded.head_dim, generator=generator)
        outputs.append(attend(layer, q)[0, :, 0].float())
    return Evidence(digest.digest(), torch.stack(outputs).numpy().tobytes())
