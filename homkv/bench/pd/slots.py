"""Where the KV of sequences lies while they decode together: one slot each, some of them empty.

Counters are tensors on the device, so that a CUDA graph of a step serves any mix of sequences. Rows without a sequence
compute on nothing: their lengths stay 0, and what they store goes where nobody looks.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from homkv.attention import api
from homkv.attention.view import LayerView
from homkv.bench.pd.forms import EXACT_DTYPE, DenseForm, Form, PagesForm, to_dense
from homkv.blocks import BlockPool
from homkv.errors import CapacityError
from homkv.formats.rows import RowsCodec
from homkv.seal import LayerContent, advance, append_one, check_status, seal_oldest
from homkv.upload import to_device

TABLE_STEP = 16  # columns of page tables: kernels are compiled for widths at multiples of it


class StepRows(ABC):
    """The first rows of a Slots object, as one step sees them."""

    @abstractmethod
    def advance(self) -> None:
        """Count one more token in every row that has a sequence."""

    @abstractmethod
    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> Tensor:
        """Store one token per row, ``k v [B, G, 1, D]``, attend with ``q [B, H, 1, D]``: as homkv.generate.StepKV."""


class Slots(ABC):
    """Room for ``count`` sequences of up to ``longest`` tokens, and for ``budget_bytes`` of KV in all.

    Raises CapacityError if the device has too little memory.
    """

    def __init__(self, form: Form, count: int, longest: int, budget_bytes: int, device: torch.device) -> None:
        self.form, self.count, self.longest, self.device = form, count, longest, device
        self.budget_bytes = budget_bytes or count * form.kv_bytes(longest)
        self.held_bytes = self.peak_bytes = 0
        self._tokens: dict[int, int] = {}  # slot -> tokens it has room for
        self._free = list(range(count - 1, -1, -1))
        self.active = torch.zeros(count, dtype=torch.int32, device=device)  # 1 where a row has a sequence

    def has_room(self, num_tokens: int) -> bool:
        """Whether :meth:`take` would succeed."""
        return bool(self._free) and self.held_bytes + self.form.kv_bytes(num_tokens) <= self.budget_bytes

    def fits(self, count: int, num_tokens: int) -> bool:
        """Whether this many sequences of one length would have room, all others gone."""
        needed = count * self.form.kv_bytes(num_tokens)
        return count <= self.count and num_tokens <= self.longest and needed <= self.budget_bytes

    def take(self, num_tokens: int) -> int:
        """Keep room for a sequence; returns its slot, the lowest free one. Raises CapacityError."""
        if not self.has_room(num_tokens):
            raise CapacityError(
                f"expected room for {num_tokens} tokens, found {len(self._free)} free slots and "
                f"{self.budget_bytes - self.held_bytes} bytes; wait for a sequence to end"
            )
        slot = min(self._free)
        self._free.remove(slot)
        self._tokens[slot] = num_tokens
        self.held_bytes += self.form.kv_bytes(num_tokens)
        self.peak_bytes = max(self.peak_bytes, self.held_bytes)
        return slot

    def begin(self, slot: int, num_tokens: int) -> None:
        """Let a loaded prompt take part from the next step on."""
        self.active[slot] = 1

    def end(self, slot: int) -> None:
        """Give a slot back."""
        self.active[slot] = 0
        self.held_bytes -= self.form.kv_bytes(self._tokens.pop(slot))
        self._free.append(slot)

    @property
    def sealed_tokens(self) -> int:
        """Tokens of a page that :meth:`settle` seals between steps; 0 if steps do so, or nothing is sealed."""
        return 0

    @abstractmethod
    def load(self, slot: int, layer: int, num_tokens: int, payload: Tensor) -> None:
        """Put one layer of a prompt in its place."""

    @abstractmethod
    def rows(self, count: int) -> StepRows:
        """The first ``count`` slots for one step."""

    def settle(self) -> None:
        """What the host has to do before a step."""
        return

    def check(self) -> None:
        """Raise FormatError if a step met values that cannot be stored."""
        return

    @property
    @abstractmethod
    def allocated_bytes(self) -> int:
        """Memory taken, whether sequences use it or not."""

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
        layers = self.form.shape.num_layers
        try:
            return [torch.zeros(shape, dtype=dtype, device=self.device) for _ in range(layers)]
        except torch.OutOfMemoryError as error:
            raise CapacityError(
                f"expected memory for {layers} x {list(shape)} {dtype} on {self.device}, found too little; use fewer "
                "slots or a smaller KV budget"
            ) from error


class CountedSlots(Slots):
    """Slots whose steps need one number of a sequence, its length: ``lengths [slots] int32``, 0 without a sequence."""

    def __init__(self, form: Form, count: int, longest: int, budget_bytes: int, device: torch.device) -> None:
        super().__init__(form, count, longest, budget_bytes, device)
        self.lengths = torch.zeros(count, dtype=torch.int32, device=device)

    def begin(self, slot: int, num_tokens: int) -> None:
        """See Slots."""
        super().begin(slot, num_tokens)
        self.lengths[slot] = num_tokens

    def end(self, slot: int) -> None:
        """See Slots."""
        super().end(slot)
        self.lengths[slot] = 0


class DenseSlots(CountedSlots):
    """Keys and values side by side, in 16 bits or e4m3: ``[slots, G, longest, D]`` per layer."""

    form: DenseForm

    def __init__(self, form: DenseForm, count: int, longest: int, budget_bytes: int, device: torch.device) -> None:
        super().__init__(form, count, longest, budget_bytes, device)
        shape = (count, form.shape.num_kv_heads, longest, form.shape.head_dim)
        self.k, self.v = self._empty(shape, form.dtype), self._empty(shape, form.dtype)

    def load(self, slot: int, layer: int, num_tokens: int, payload: Tensor) -> None:
        """See Slots."""
        for source, place in zip(self.form.split(payload), (self.k[layer], self.v[layer]), strict=True):
            place[slot, :, :num_tokens] = source

    def rows(self, count: int) -> StepRows:
        """See Slots."""
        return DenseRows(self, count)

    @property
    def allocated_bytes(self) -> int:
        """See Slots."""
        return sum(x.nbytes for x in (*self.k, *self.v))


class DenseRows(StepRows):
    """The fastest attention of homkv.bench.peers on a GPU, torch's on a CPU."""

    def __init__(self, slots: DenseSlots, count: int) -> None:
        self._k, self._v = [x[:count] for x in slots.k], [x[:count] for x in slots.v]
        self._lengths, self._active = slots.lengths[:count], slots.active[:count]
        scale = torch.ones(slots.form.shape.num_kv_heads, device=slots.device)
        self._scales = (scale, scale)
        self._is_fp8 = slots.form.dtype == torch.float8_e4m3fn

    def advance(self) -> None:
        """See StepRows."""
        self._lengths.add_(self._active)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> Tensor:
        """See StepRows."""
        keys, values, new = self._k[layer], self._v[layer], (k[:, :, 0], v[:, :, 0])
        if q.device.type == "cpu":
            return dense_step(q, *new, keys, values, self._lengths, softmax_scale)
        from homkv.bench.peers import fp8, fp16  # Triton is optional
        from homkv.bench.peers.store import store_token

        store_token(*new, keys, values, self._lengths, *self._scales)
        if self._is_fp8:
            return fp8.attend(q, keys, values, self._lengths, softmax_scale, *self._scales)
        return fp16.attend(q, keys, values, self._lengths, softmax_scale)


def dense_step(
    q: Tensor, new_k: Tensor, new_v: Tensor, k: Tensor, v: Tensor, lengths: Tensor, softmax_scale: float
) -> Tensor:
    """Store one token per row where the row has any, then attend: the CPU's side of :class:`DenseRows`."""
    rows = lengths.nonzero().flatten()
    at = lengths[rows].long() - 1
    for new, buffer in ((new_k, k), (new_v, v)):
        buffer[rows, :, at] = to_dense(new[rows], buffer.dtype)
    width = max(int(lengths.max()), 1)
    mask = torch.arange(width) < lengths[:, None, None, None]
    keys, values = (x[:, :, :width].to(q.dtype) for x in (k, v))
    return torch.nn.functional.scaled_dot_product_attention(
        q, keys, values, mask | (lengths == 0)[:, None, None, None], scale=softmax_scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip


@dataclass
class _Held:
    """Blocks of one slot, and how much its window holds, as far as the host knows."""

    blocks: list[int]
    num_pages: int = 0
    exact_len: int = 0  # of formats without a window also 0 behind whole pages
    begun: bool = False


class PageSlots(Slots):
    """Pages in one pool per layer; sinks and windows per slot, and one more row of them for rows without a sequence.

    Rows formats seal a full window inside the step; for others :meth:`settle` does so between steps.
    """

    form: PagesForm

    def __init__(self, form: PagesForm, count: int, longest: int, budget_bytes: int, device: torch.device) -> None:
        super().__init__(form, count, longest, budget_bytes, device)
        codec, heads = form.codec, form.shape.num_kv_heads
        self.impl = api.resolve_impl(codec, None, device)
        page_bytes = form.shape.num_layers * heads * codec.page_bytes
        most = min(count * codec.num_pages(longest), self.budget_bytes // page_bytes)
        self._blocks = BlockPool(max(most, 1))
        self.pools = self._empty((self._blocks.num_blocks, heads, codec.page_bytes), torch.uint8)
        exact = (count + 1, heads, codec.num_sinks + codec.max_window, form.shape.head_dim)
        self.exact_k, self.exact_v = self._empty(exact, EXACT_DTYPE), self._empty(exact, EXACT_DTYPE)
        width = -(-max(codec.num_pages(longest), 1) // TABLE_STEP) * TABLE_STEP

        def counters(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        self.table, self.num_pages, self.exact_len = counters(count, width), counters(count), counters(count)
        self.slots = torch.full((count,), count, dtype=torch.int32, device=device)
        self.status = counters(1)
        self.seals_in_step = self.impl == "triton" and isinstance(codec, RowsCodec)
        self._held: dict[int, _Held] = {}

    def has_room(self, num_tokens: int) -> bool:
        """See Slots."""
        return super().has_room(num_tokens) and self.form.codec.num_pages(num_tokens) <= self._blocks.num_free

    def fits(self, count: int, num_tokens: int) -> bool:
        """See Slots."""
        pages = count * self.form.codec.num_pages(num_tokens)
        return super().fits(count, num_tokens) and pages <= self._blocks.num_blocks

    @property
    def sealed_tokens(self) -> int:
        """See Slots."""
        return 0 if self.seals_in_step else self.form.codec.page_tokens

    def take(self, num_tokens: int) -> int:
        """See Slots."""
        slot = super().take(num_tokens)
        self._held[slot] = _Held(self._blocks.allocate(self.form.codec.num_pages(num_tokens)))
        return slot

    def load(self, slot: int, layer: int, num_tokens: int, payload: Tensor) -> None:
        """See Slots."""
        content: LayerContent = self.form.split(payload, num_tokens)
        blocks = torch.tensor(self._held[slot].blocks[: content.pages.shape[0]], dtype=torch.int64)
        if len(blocks):
            self.pools[layer][to_device(blocks, self.device)] = content.pages
        held = content.exact_k.shape[1]
        self.exact_k[layer][slot, :, :held] = content.exact_k
        self.exact_v[layer][slot, :, :held] = content.exact_v

    def begin(self, slot: int, num_tokens: int) -> None:
        """See Slots."""
        super().begin(slot, num_tokens)
        codec, held = self.form.codec, self._held[slot]
        held.begun = True
        held.num_pages, held.exact_len = codec.num_pages(num_tokens), codec.num_exact(num_tokens)
        self.table[slot, : len(held.blocks)] = to_device(torch.tensor(held.blocks, dtype=torch.int32), self.device)
        self.num_pages[slot], self.exact_len[slot], self.slots[slot] = held.num_pages, held.exact_len, slot

    def end(self, slot: int) -> None:
        """See Slots."""
        super().end(slot)
        self.num_pages[slot], self.exact_len[slot], self.slots[slot] = 0, 0, self.count
        self._blocks.release(self._held.pop(slot).blocks)

    def settle(self) -> None:
        """Seal what is full, unless the step does; called before every step, which adds one token to each sequence."""
        codec = self.form.codec
        for slot, held in self._held.items():
            if not held.begun:
                continue
            if held.exact_len == codec.num_sinks + codec.max_window:
                held.num_pages, held.exact_len = held.num_pages + 1, held.exact_len - codec.page_tokens
                if not self.seals_in_step:
                    self._seal(slot, held)
            held.exact_len += 1

    def _seal(self, slot: int, held: _Held) -> None:
        status = None if self.device.type == "cpu" else self.status
        self.num_pages[slot], self.exact_len[slot] = held.num_pages, held.exact_len
        for layer in range(self.form.shape.num_layers):
            seal_oldest(self.form.codec, self.view(layer, self.count), slot, self.impl, status)

    def rows(self, count: int) -> StepRows:
        """See Slots."""
        return PageRows(self, count)

    def view(self, layer: int, count: int) -> LayerView:
        """The first ``count`` slots of a layer."""
        return LayerView(
            pool=self.pools[layer],
            page_table=self.table[:count],
            num_pages=self.num_pages[:count],
            exact_k=self.exact_k[layer],
            exact_v=self.exact_v[layer],
            exact_len=self.exact_len[:count],
            slots=self.slots[:count],
        )

    def check(self) -> None:
        """See Slots."""
        check_status(self.status)

    @property
    def allocated_bytes(self) -> int:
        """See Slots."""
        return sum(x.nbytes for x in (*self.pools, *self.exact_k, *self.exact_v))


class PageRows(StepRows):
    """Attention on the pages."""

    def __init__(self, slots: PageSlots, count: int) -> None:
        self._slots, self._active = slots, slots.active[:count]
        self._views = [slots.view(layer, count) for layer in range(slots.form.shape.num_layers)]
        self._due = torch.zeros(count, dtype=torch.bool, device=slots.device)

    def advance(self) -> None:
        """See StepRows. A row without a sequence holds one token of the spare window: no kernel meets a length of 0."""
        view = self._views[0]
        if self._slots.seals_in_step:
            self._due = advance(self._slots.form.codec, view)
        else:
            view.exact_len.add_(1)
        view.num_pages.mul_(self._active)
        view.exact_len.mul_(self._active).clamp_(min=1)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float) -> Tensor:
        """See StepRows."""
        slots, view, new = self._slots, self._views[layer], (k[:, :, 0], v[:, :, 0])
        if slots.seals_in_step:
            append_one(slots.form.codec, view, self._due, *new, impl=slots.impl, status=slots.status)
        else:
            rows, at = view.slots.long(), view.exact_len.long() - 1
            for buffer, x in zip((view.exact_k, view.exact_v), new, strict=True):
                buffer[rows, :, at] = x.to(buffer.dtype)
        o, _ = api.attend(q, view, slots.form.codec, softmax_scale, impl=slots.impl)
        return o.to(q.dtype)
