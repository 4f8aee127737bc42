"""Attention and page encoding on GPUs, in Triton. The same page bytes as the CPU's and the wire's.

The kernels are plain Triton, for NVIDIA GPUs from compute capability 8.0 on; on 9.0 they start before their predecessor
has drained. With TRITON_INTERPRET=1 set before Triton is imported they run, slowly, on the CPU.
"""

from torch import Tensor

from homkv.attention.view import LayerView
from homkv.errors import UnsupportedError
from homkv.formats.base import PageCodec
from homkv.formats.hack import HackCodec
from homkv.formats.hack2026 import Hack2026Codec
from homkv.formats.rows import RowsCodec


def attend(q: Tensor, view: LayerView, codec: PageCodec, softmax_scale: float) -> tuple[Tensor, Tensor]:
    """Attention of ``q [B, H, T, D]`` (float16, bfloat16, float32) over every token of ``view``, on the pages' codes.

    ``o = softmax(softmax_scale q . k) v`` with int8 queries and 8-bit weights (docs/format.md, "Computing with a
    page"); query head h reads kv head ``h // (H / G)``, every row sees the whole view, ``H / G * T <= 16``. Sinks and
    window are computed exactly. Returns ``o [B, H, T, D] float32`` and ``lse [B, H, T] float32`` (natural logarithm;
    -inf and o = 0 for an empty sequence).

    Safe in a CUDA graph: nothing is read back, and lengths and tables are read on the device at every replay. Indices
    outside their array are clamped into it, so that a wrong table gives a wrong answer but never touches other memory.
    Raises ShapeError, DTypeError, UnsupportedError before anything is launched.
    """
    if isinstance(codec, RowsCodec):
        from homkv.attention.triton.decode import attend_rows

        return attend_rows(q, view, codec, softmax_scale)
    if isinstance(codec, HackCodec | Hack2026Codec):
        from homkv.attention.triton.hack_decode import attend_hack

        return attend_hack(q, view, codec, softmax_scale)
    raise UnsupportedError(
        f"expected a rows or a hack format for impl='triton', found {codec.name}; use impl='reference'"
    )
