"""The part of an extension without pages: exact attention of new tokens to sinks, window and, causally, each other."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from homkv.attention.triton.expand import load_queries
from homkv.attention.triton.lanes import LOG2E, NEVER, dot16
from homkv.errors import UnsupportedError

Prior = tuple[Tensor, Tensor]  # output [B, H, T, D] and natural log-sum-exp [B, H, T] float32


@triton.jit
def load_rows(X, t, stop, stride, D: tl.constexpr, DP: tl.constexpr, MASK: tl.constexpr):
    """Tokens ``t`` of one head ``[KEYS, DP]``; zeros from ``stop`` on, which MASK asks for."""
    d = tl.arange(0, DP)
    at = X + t.to(tl.int64)[:, None] * stride + d[None, :]
    if MASK:
        return tl.load(at, mask=(t < stop)[:, None] & (d < D)[None, :], other=0.0)
    elif D < DP:
        return tl.load(at, mask=(d < D)[None, :], other=0.0)
    else:
        return tl.load(at)


@triton.jit
def add_tile(q, k, v, visible, state, scale_log2, MASK: tl.constexpr):
    """One step of the online softmax: ``state = (o, m, l)``, scores in base 2.

    16-bit tensors of one dtype are multiplied as they are, weights rounded to that dtype; others in float32.
    """
    o, m, l = state
    if q.dtype == k.dtype and q.dtype != tl.float32:
        s = dot16(q, k.T, tl.zeros([q.shape[0], k.shape[0]], tl.float32)) * scale_log2
    else:
        s = tl.dot(q.to(tl.float32), k.to(tl.float32).T, input_precision="tf32x3") * scale_log2
    if MASK:
        s = tl.where(visible, s, -float("inf"))
    new = tl.maximum(m, tl.max(s, 1))
    p = tl.exp2(s - new[:, None])
    decay = tl.exp2(m - new)
    o = o * decay[:, None]
    if v.dtype == tl.float32 or q.dtype == tl.float32:
        o = tl.dot(p, v.to(tl.float32), o, input_precision="tf32x3")
    else:
        o = dot16(p.to(v.dtype), v, o)
    return o, new, l * decay + tl.sum(p, 1)


@triton.jit(do_not_specialize=["rows", "first_row", "length", "exact_tokens", "num_slots"])
def exact_kernel(
    Q, K, V, Before, BeforeLse, ExactK, ExactV, ExactLen, Slots, Old, OldLse, rows, first_row, length, rows_room,
    exact_tokens, num_slots, stride_b, stride_h, stride_t, stride_kb, stride_kg, stride_kt, stride_vb, stride_vg,
    stride_vt, stride_ob, stride_oh, stride_ot, scale_log2, D: tl.constexpr, DP: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, PRIOR: tl.constexpr,
):  # fmt: skip
    """Partial output ``Old [B, G, rows_room, D]`` and base-2 log-sum-exp over exact tokens. Grid (row blocks, G, B).

    Row ``r * length + t`` of a kv head is token t of its r-th query head: it sees what the view stores exactly and the
    new tokens up to t. With PRIOR the new tokens' part is given: ``Before [B, H, T, D]``, ``BeforeLse [B, H, T]``.
    """
    g = tl.program_id(1)
    b = tl.program_id(2)
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    i = first_row + r
    q = load_queries(Q, b, g, i, rows, length, stride_b, stride_h, stride_t, D, DP)
    n = tl.arange(0, KEYS)
    if PRIOR:
        before = load_queries(Before, b, g, i, rows, length, stride_ob, stride_oh, stride_ot, D, DP).to(tl.float32)
        lse = tl.load(BeforeLse + (b * tl.num_programs(1) + g).to(tl.int64) * rows + i, mask=i < rows, other=0.0)
        state = (before, lse * LOG2E, tl.full([ROWS], 1.0, tl.float32))
    else:
        state = (
            tl.zeros([ROWS, DP], tl.float32), tl.full([ROWS], NEVER, tl.float32), tl.zeros([ROWS], tl.float32)
        )  # fmt: skip

    slot = tl.minimum(tl.maximum(tl.load(Slots + b), 0), num_slots - 1).to(tl.int64)
    stored = tl.minimum(tl.load(ExactLen + b), exact_tokens)
    at = (slot * tl.num_programs(1) + g) * exact_tokens * D
    for start in tl.range(0, stored, KEYS, num_stages=1):
        k = load_rows(ExactK + at, start + n, stored, D, D, DP, True)
        v = load_rows(ExactV + at, start + n, stored, D, D, DP, True)
        state = add_tile(q, k, v, (start + n < stored)[None, :], state, scale_log2, True)

    if not PRIOR:
        # Tokens of this block's rows: a run, unless it crosses from one query head to the next.
        first = (first_row + tl.program_id(0) * ROWS) % length
        crosses = first + ROWS > length
        whole = tl.where(crosses, 0, (first + 1) // KEYS * KEYS)
        stop = tl.where(crosses, length, first + ROWS)
        k_head = K + b.to(tl.int64) * stride_kb + g.to(tl.int64) * stride_kg
        v_head = V + b.to(tl.int64) * stride_vb + g.to(tl.int64) * stride_vg
        for start in tl.range(0, whole, KEYS):
            k = load_rows(k_head, start + n, length, stride_kt, D, DP, False)
            v = load_rows(v_head, start + n, length, stride_vt, D, DP, False)
            state = add_tile(q, k, v, True, state, scale_log2, False)
        for start in tl.range(whole, stop, KEYS):
            k = load_rows(k_head, start + n, length, stride_kt, D, DP, True)
            v = load_rows(v_head, start + n, length, stride_vt, D, DP, True)
            visible = (i % length)[:, None] >= (start + n)[None, :]
            state = add_tile(q, k, v, visible, state, scale_log2, True)

    o, m, l = state
    d = tl.arange(0, DP)
    at = (b * tl.num_programs(1) + g).to(tl.int64) * rows_room + r
    live = i < rows
    tl.store(OldLse + at, m + tl.log2(l), mask=live)
    tl.store(Old + at[:, None] * D + d[None, :], o / l[:, None], mask=live[:, None] & (d < D)[None, :])


def sdpa_partial(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, backend: str) -> Prior:
    """Causal attention with its log-sum-exp by torch's "cudnn" or "flash" kernel.

    Shapes and dtypes as in prefill.exact. Raises UnsupportedError if that backend does not take these tensors.
    """
    params = torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, True, q.shape[1] != k.shape[1])
    usable = {
        "cudnn": torch.backends.cuda.can_use_cudnn_attention,
        "flash": torch.backends.cuda.can_use_flash_attention,
    }
    if q.device.type != "cuda" or backend not in usable or not usable[backend](params):
        raise UnsupportedError(
            f"expected a backend of torch that takes {q.dtype} {tuple(q.shape)} on {q.device}, found {backend!r}; use "
            "'triton'"
        )
    if backend == "cudnn":
        run = torch.ops.aten._scaled_dot_product_cudnn_attention
        o, lse = run(q, k, v, None, True, 0.0, True, False, scale=softmax_scale)[:2]
    else:
        o, lse = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, False, scale=softmax_scale)[:2]
    return o, lse.reshape(q.shape[:3]).contiguous()
