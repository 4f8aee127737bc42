"""The decode loop: one step is a function of tensors on the device, so a CUDA graph can replay it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from homkv.errors import CapacityError, FormatError, ShapeError, UnsupportedError
from homkv.generate.kv import PagesKV, StepKV
from homkv.generate.sampling import GREEDY, Sampling, choose
from homkv.hf import AttendingCache, measure, switch_attention
from homkv.models.describe import refuse_sliding_windows, sliding_windows_of
from homkv.models.forward import forward_with_cache
from homkv.spec import DEFAULT_FORMAT

EAGER_STEPS = 2  # before the capture: kernels are compiled and libraries set up outside of it
CHECK_EVERY = 16  # steps between looks at the device: whether all sequences ended, and whether all values were good


class StepCache(AttendingCache):
    """transformers' view of a StepKV: whole prompts row by row, then one token for all rows at a time."""

    def __init__(self, kv: StepKV, num_layers: int) -> None:
        super().__init__(num_layers, None)
        self.kv = kv
        self.row: int | None = None  # whose prompt is being computed; None while decoding

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, real: Tensor | None) -> Tensor:
        """See AttendingCache.attend."""
        assert real is None  # prompts are computed without their padding
        if self.row is not None:
            return self.kv.prefill(layer, self.row, q, k, v, softmax_scale)
        return self.kv.attend(layer, q, k, v, softmax_scale)


@contextmanager
def attention_of(model: PreTrainedModel) -> Iterator[None]:
    """Let a model's caches compute its attention inside the block. Raises UnsupportedError if they do already."""
    before = switch_attention(model)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


class Decoder:
    """Decodes the sequences of a StepKV in step; after :meth:`prefill` or :meth:`begin`, :meth:`step` by step.

    On a GPU the third step is captured and replayed from then on. Everything a step needs lies on the device: nothing
    is read back but every ``CHECK_EVERY`` steps in :meth:`run`. Calls must run inside ``attention_of(model)``.

    ``max_new_tokens``: including the one that the prompt's last logits give. ``eos_token_ids``: sequences that met one
    of them go on as ``pad_token_id``. ``capture``: None where possible; True raises UnsupportedError where not.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        kv: StepKV,
        *,
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        eos_token_ids: Sequence[int] = (),
        pad_token_id: int = 0,
        capture: bool | None = None,
    ) -> None:
        if max_new_tokens < 1:
            raise CapacityError(f"expected max_new_tokens of at least 1, found {max_new_tokens}")
        possible = kv.is_capturable and has_fixed_rope(model)
        if capture and not possible:
            raise UnsupportedError(
                "expected a GPU, a rows format with impl='triton' and RoPE whose frequencies do not depend on the "
                "length, for a CUDA graph; use capture=None"
            )
        self.model, self.kv, self.sampling, self.max_new_tokens = model, kv, sampling, max_new_tokens
        self.is_captured = possible if capture is None else capture
        self.cache = StepCache(kv, model.config.get_text_config().num_hidden_layers)
        batch, device = kv.num_sequences, kv.device
        self.tokens = torch.zeros(batch, 1, dtype=torch.int64, device=device)  # fed by the next step
        self.positions = torch.zeros(batch, 1, dtype=torch.int64, device=device)  # of ``tokens``
        self.output = torch.full((batch, max_new_tokens), pad_token_id, dtype=torch.int64, device=device)
        self.logits = torch.empty(0)  # [B, V] float32 of the last step; the next one overwrites them
        self.num_tokens = 0  # columns of ``output`` so far
        self._num_steps = 0
        self._column = torch.zeros(1, dtype=torch.int64, device=device)  # the same on the device
        self._ended = torch.zeros(batch, dtype=torch.bool, device=device)
        self._is_finite = torch.ones((), dtype=torch.bool, device=device)
        self._eos = torch.tensor(list(eos_token_ids), dtype=torch.int64, device=device)
        self._pad = pad_token_id
        self._generator = torch.Generator(device).manual_seed(sampling.seed)
        self._graph: torch.cuda.CUDAGraph | None = None

    @torch.no_grad()
    def prefill(self, prompts: Sequence[Tensor]) -> None:
        """Compute the prompts ``[T_b] int64``, one after another, and choose their first new tokens.

        No padding is computed, and memory is that of the longest. Raises ShapeError.
        """
        if len(prompts) != self.kv.num_sequences or any(p.ndim != 1 or not len(p) for p in prompts):
            shapes = [tuple(p.shape) for p in prompts]
            raise ShapeError(f"expected {self.kv.num_sequences} prompts [T] of at least one token, found {shapes}")
        rows = []
        for row, prompt in enumerate(prompts):
            self.cache.row = row
            ids = prompt.to(self.kv.device)[None]
            positions = torch.arange(len(prompt), device=self.kv.device)[None]
            rows.append(self._forward(ids, positions, logits_to_keep=1))
        self.cache.row = None
        lengths = torch.tensor([[len(p)] for p in prompts], device=self.kv.device)
        self.kv.start()
        self.positions.copy_(lengths)
        self.logits = torch.cat(rows)
        self._emit()
        self.num_tokens = 1

    def begin(self, tokens: Tensor, positions: Tensor) -> None:
        """Start behind KV that was filled otherwise: ``tokens [B]``, at ``positions [B]``, are the first to be fed."""
        self.kv.start()
        self.tokens.copy_(tokens[:, None])
        self.positions.copy_(positions[:, None])

    @torch.no_grad()
    def step(self) -> None:
        """Feed ``tokens`` and choose the next. Raises CapacityError behind the last of ``max_new_tokens``."""
        if self.num_tokens == self.max_new_tokens:
            raise CapacityError(f"expected at most {self.max_new_tokens} new tokens, found one more; reserve more")
        if not self.is_captured or self._num_steps < EAGER_STEPS:
            self._step()
        else:
            if self._graph is None:
                self._graph = self._capture()
            self._graph.replay()
        self.num_tokens += 1
        self._num_steps += 1

    def run(self) -> Tensor:
        """Step until all sequences ended or ``max_new_tokens`` are there; returns the new tokens ``[B, N] int64``.

        Raises FormatError for values that the format cannot hold and for logits that are not finite.
        """
        try:
            while self.num_tokens < self.max_new_tokens:
                if self.num_tokens % CHECK_EVERY == 0 and self._look():
                    break
                self.step()
            self._look()
        finally:
            self.kv.finish()
        return self.output[:, : self._used_columns()]

    def _step(self) -> None:
        self.kv.advance()
        self.logits = self._forward(self.tokens, self.positions)
        self.positions += 1
        self._emit()

    def _forward(self, ids: Tensor, positions: Tensor, **options: Any) -> Tensor:
        out = forward_with_cache(self.model, ids, self.cache, position_ids=positions, **options)
        logits: Tensor = out.logits[:, -1]
        return logits.float()

    def _emit(self) -> None:
        """Choose the next tokens from ``logits`` and write them down."""
        self._is_finite &= torch.isfinite(self.logits.amax(-1)).all()  # amax passes NaN on; -inf elsewhere is a mask
        chosen = choose(self.logits, self.sampling, self._generator).masked_fill(self._ended, self._pad)
        self._ended |= (chosen[:, None] == self._eos).any(1)
        self.tokens.copy_(chosen[:, None])
        self.output.index_copy_(1, self._column, chosen[:, None])
        self._column += 1

    def _capture(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self._generator)
        with torch.cuda.graph(graph):
            self._step()
        return graph

    def _look(self) -> bool:
        """Wait for the device. Whether all sequences ended; raises what their values make necessary."""
        self.kv.check()
        if not bool(self._is_finite):
            raise FormatError("expected finite logits, found others; the model overflowed: load it in another dtype")
        return len(self._eos) > 0 and bool(self._ended.all())

    def _used_columns(self) -> int:
        """Columns up to the last end of a sequence."""
        if not len(self._eos):
            return self.num_tokens
        is_end = (self.output[:, : self.num_tokens, None] == self._eos).any(-1).long()
        lengths = torch.where(is_end.any(1), is_end.argmax(1) + 1, self.num_tokens)
        return int(lengths.max())


def has_fixed_rope(model: PreTrainedModel) -> bool:
    """Whether the frequencies of a model's RoPE are the same at every length, as a replayed step needs them."""
    parameters = str(getattr(model.config.get_text_config(), "rope_parameters", None) or {})
    return "dynamic" not in parameters and "longrope" not in parameters


def generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    kv_cache_dtype: str = DEFAULT_FORMAT,
    *,
    max_new_tokens: int,
    attention_mask: Tensor | None = None,
    sampling: Sampling = GREEDY,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    impl: str | None = None,
    exact_dtype: torch.dtype | None = None,
    capture: bool | None = None,
) -> Tensor:
    """Continue prompts on pages: exact prefill, then one CUDA graph per decode step where there is a GPU.

    ``input_ids [B, T]``; ``attention_mask [B, T]``: 0 marks padding, on either side. ``eos_token_id pad_token_id``:
    None takes the model's. ``impl exact_dtype``: as homkv.attach; ``capture``: as Decoder.
    Returns the new tokens ``[B, N] int64``, N <= max_new_tokens, padded behind a sequence's end. Raises as
    homkv.attach, and CapacityError, FormatError, ShapeError; the model is as before then.
    """
    codec, settings = measure(model, kv_cache_dtype, exact_dtype)
    refuse_sliding_windows(sliding_windows_of(model.config.get_text_config()), type(model).__name__, "generate()")
    prompts = split_prompts(input_ids, attention_mask)
    kv = PagesKV.reserve(codec, [len(p) + max_new_tokens for p in prompts], impl=impl, **settings)
    config = model.generation_config
    eos = config.eos_token_id if eos_token_id is None else eos_token_id
    pad = config.pad_token_id if pad_token_id is None else pad_token_id
    decoder = Decoder(
        model,
        kv,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        eos_token_ids=[eos] if isinstance(eos, int) else list(eos or ()),
        pad_token_id=pad or 0,
        capture=capture,
    )
    with attention_of(model):
        decoder.prefill(prompts)
        return decoder.run()


def split_prompts(input_ids: Tensor, attention_mask: Tensor | None) -> list[Tensor]:
    """Rows of ``input_ids [B, T]`` without their padding. Raises ShapeError for a row without a token."""
    if input_ids.ndim != 2 or (attention_mask is not None and attention_mask.shape != input_ids.shape):
        found = None if attention_mask is None else tuple(attention_mask.shape)
        raise ShapeError(f"expected input_ids [B, T] and a mask alike, found {tuple(input_ids.shape)} and {found}")
    if attention_mask is None:
        return list(input_ids)
    return [row[mask.bool()] for row, mask in zip(input_ids, attention_mask, strict=True)]
