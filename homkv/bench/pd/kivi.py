"""Slots of KIVI's form: codes side by side, the newest tokens in a ring."""

import torch
from torch import Tensor

from homkv.bench.pd.forms import EXACT_DTYPE, KIVI, KiviForm, code_on_cpu
from homkv.bench.pd.slots import CountedSlots, StepRows
from homkv.bench.peers.kivi_codes import KiviCache, KiviWindow, dequantize
from homkv.seal import check_status

RING = KIVI.residual + KIVI.group_size


class KiviSlots(CountedSlots):
    """Codes ``[slots, G, room, .]`` and a ring of exact tokens ``[slots, G, RING, D]`` per layer."""

    form: KiviForm

    def __init__(self, form: KiviForm, count: int, longest: int, budget_bytes: int, device: torch.device) -> None:
        super().__init__(form, count, longest, budget_bytes, device)
        heads, dim = form.shape.num_kv_heads, form.shape.head_dim
        codes = form.parts(max(longest, RING))[:6]  # at least one group
        parts = [self._empty((count, heads, rows, width), dtype) for dtype, rows, width in codes]
        self.caches = [KiviCache(*layer) for layer in zip(*parts, strict=True)]
        ring = (count, heads, RING, dim)
        self.ring_k, self.ring_v = self._empty(ring, EXACT_DTYPE), self._empty(ring, EXACT_DTYPE)
        self.status = torch.zeros(1, dtype=torch.int32, device=device)

    def load(self, slot: int, layer: int, num_tokens: int, payload: Tensor) -> None:
        """See Slots."""
        cache, k, v = self.form.split(payload, num_tokens)
        for place, source in zip(self.caches[layer].tensors, cache.tensors, strict=True):
            place[slot, :, : source.shape[2]] = source[0]
        at = torch.arange(self.form.num_coded(num_tokens), num_tokens, device=self.device) % RING
        self.ring_k[layer][slot, :, at], self.ring_v[layer][slot, :, at] = k, v

    def rows(self, count: int) -> StepRows:
        """See Slots."""
        return KiviRows(self, count)

    def check(self) -> None:
        """See Slots."""
        check_status(self.status)

    @property
    def allocated_bytes(self) -> int:
        """See Slots."""
        codes = (x for cache in self.caches for x in cache.tensors)
        return sum(x.nbytes for x in (*codes, *self.ring_k, *self.ring_v))


class KiviRows(StepRows):
    """On a GPU the kernel of homkv.bench.peers.kivi dequantizes what it reads; on a CPU all is restored first."""

    def __init__(self, slots: KiviSlots, count: int) -> None:
        self._lengths, self._active = slots.lengths[:count], slots.active[:count]
        self._coded, self._status = torch.zeros_like(self._lengths), slots.status
        self._caches = [KiviCache(*(x[:count] for x in cache.tensors)) for cache in slots.caches]
        self._windows = [
            KiviWindow(k[:count], v[:count], self._lengths)
            for k, v in zip(slots.ring_k, slots.ring_v, strict=True)
        ]  # fmt: skip

    def advance(self) -> None:
        """See StepRows."""
        self._lengths.add_(self._active)
        older = (self._lengths - KIVI.residual).clamp_(min=0)
        self._coded.copy_(older - older % KIVI.group_size)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> Tensor:
        """See StepRows."""
        cache, window, new = self._caches[layer], self._windows[layer], (k[:, :, 0], v[:, :, 0])
        if q.device.type == "cpu":
            store_on_cpu(*new, cache, window)
            return restored_step(q, cache, window, self._coded, softmax_scale)
        from homkv.bench.peers import kivi, kivi_store  # Triton is optional

        kivi_store.append(*new, cache, window, self._status)
        return kivi.attend(q, cache, self._coded, softmax_scale, window=window)


def store_on_cpu(k: Tensor, v: Tensor, cache: KiviCache, window: KiviWindow) -> None:
    """What homkv.bench.peers.kivi_store.append does. Raises FormatError for values that codes cannot hold."""
    for b, length in enumerate(window.lengths.tolist()):
        if not length:
            continue
        for ring, new in ((window.k, k), (window.v, v)):
            ring[b, :, (length - 1) % RING] = new[b].to(ring.dtype)
        first = length - RING
        if first >= 0 and first % KIVI.group_size == 0:
            at = slice(first % RING, first % RING + KIVI.group_size)
            row = KiviCache(*(x[b : b + 1] for x in cache.tensors))
            code_on_cpu(window.k[b : b + 1, :, at], window.v[b : b + 1, :, at], row, first)


def restored_step(q: Tensor, cache: KiviCache, window: KiviWindow, coded: Tensor, softmax_scale: float) -> Tensor:
    """Attention on what the codes stand for and on the window, by torch; rows without tokens give anything finite."""
    k, v = (
        torch.cat((old.to(q.dtype), new.to(q.dtype)), 2)
        for old, new in zip(dequantize(cache), (window.k, window.v), strict=True)
    )
    old = torch.arange(cache.k_codes.shape[2], device=q.device) < coded[:, None]
    mask = torch.cat((old, window.holds(coded)), 1) | (window.lengths == 0)[:, None]
    return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, mask[:, None, None], scale=softmax_scale, enable_gqa=q.shape[1] != k.shape[1]
    )
