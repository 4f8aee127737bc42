"""Continuous batching: sequences join and leave between steps; one CUDA graph per number of rows."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from homkv.bench.pd.forms import DenseForm, Form, KiviForm, PagesForm
from homkv.bench.pd.kivi import KiviSlots
from homkv.bench.pd.slots import DenseSlots, PageSlots, Slots, StepRows
from homkv.generate.loop import EAGER_STEPS
from homkv.hf import AttendingCache
from homkv.models.forward import forward_with_cache


class _RowsCache(AttendingCache):
    """transformers' view of the rows of one step."""

    def __init__(self, rows: StepRows, num_layers: int) -> None:
        super().__init__(num_layers, None)
        self._rows = rows

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, real: Tensor | None) -> Tensor:
        """See AttendingCache."""
        return self._rows.attend(layer, q, k, v, softmax_scale)


class Batch:
    """Greedy decoding of the sequences in some slots. Use inside ``homkv.generate.loop.attention_of(model)``."""

    def __init__(self, model: PreTrainedModel, slots: Slots) -> None:
        self.model, self.slots = model, slots
        device, count = slots.device, slots.count
        self._tokens = torch.zeros(count, 1, dtype=torch.int64, device=device)  # fed by the next step
        self._positions = torch.zeros(count, 1, dtype=torch.int64, device=device)
        layers = slots.form.shape.num_layers
        self._rows = {n: slots.rows(n) for n in bucket_sizes(count)}
        self._caches = {n: _RowsCache(rows, layers) for n, rows in self._rows.items()}
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._host = torch.zeros(count, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._done = torch.cuda.Event() if device.type == "cuda" else None

    @torch.no_grad()
    def warm_up(self) -> None:
        """Compile kernels and, on a GPU, capture a step of every size. No slot may be in use."""
        pool = None
        for n in sorted(self._rows, reverse=True):
            for _ in range(EAGER_STEPS):
                self._forward(n)
            if self.slots.device.type == "cuda":
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                    self._forward(n)
                pool, self._graphs[n] = graph.pool(), graph

    def join(self, slot: int, num_tokens: int, first_token: int) -> None:
        """Let a loaded prompt take part; its first token is fed by the next step."""
        self.slots.begin(slot, num_tokens)
        self._tokens[slot], self._positions[slot] = first_token, num_tokens

    def leave(self, slot: int) -> None:
        """End a sequence."""
        self.slots.end(slot)
        self._positions[slot] = 0

    @torch.no_grad()
    def step(self, slots: Sequence[int]) -> list[int]:
        """One token for every sequence, in the order of ``slots``. Waits for the device, as streaming needs it."""
        n = next(size for size in self._rows if size > max(slots))
        self.slots.settle()
        if n in self._graphs:
            self._graphs[n].replay()
        else:
            self._forward(n)
        tokens = self._fetch(n)
        return [tokens[slot] for slot in slots]

    def _fetch(self, n: int) -> list[int]:
        """The newest tokens of the first rows.

        Waits on an event: a copy to unpinned memory waits inside the driver, and threads that move layers with it.
        """
        self._host[:n].copy_(self._tokens[:n, 0], non_blocking=True)
        if self._done is not None:
            self._done.record()
            self._done.synchronize()
        tokens: list[int] = self._host[:n].tolist()
        return tokens

    def _forward(self, n: int) -> None:
        self._rows[n].advance()
        ids, positions = self._tokens[:n], self._positions[:n]
        logits = forward_with_cache(self.model, ids, self._caches[n], position_ids=positions).logits[:, -1]
        ids.copy_(logits.argmax(-1, keepdim=True))
        positions.add_(self.slots.active[:n, None])


def bucket_sizes(count: int) -> list[int]:
    """Numbers of rows that steps are made for: powers of two, and all."""
    return sorted({min(1 << i, count) for i in range(count.bit_length() + 1)})


def make_slots(form: Form, count: int, longest: int, budget_bytes: int, device: torch.device) -> Slots:
    """Slots of a form. Raises CapacityError, UnsupportedError."""
    if isinstance(form, DenseForm):
        return DenseSlots(form, count, longest, budget_bytes, device)
    if isinstance(form, KiviForm):
        return KiviSlots(form, count, longest, budget_bytes, device)
    assert isinstance(form, PagesForm)
    return PageSlots(form, count, longest, budget_bytes, device)
