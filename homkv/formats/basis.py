"""Rows in a balanced eigenbasis of keys and queries: a quarter of K at 4 bits, the rest at 2, one scale per token.

    q . k = (q B) . (k A),   A B^T = 1,   chosen so that both sides have the same, diagonal covariance

The tables A, B and the mean come from a calibration run (homkv.eval.basis) and are the model's, not the request's:
pages stay self-contained. The derivation: docs/rivals.md.
"""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from homkv.errors import FormatError, ShapeError, UnsupportedError
from homkv.formats.base import EIGHT_BIT, PageCodec, Rounding
from homkv.formats.minmax import SMALLEST_SCALE, cut
from homkv.formats.record import PageRecord, Section, codes
from homkv.formats.rows import integer_matmul
from homkv.quant import code_rows, decode_scales, fit_rows, hadamard, require_finite
from homkv.spec import MIN_WINDOW, NUM_SINKS, PAGE_TOKENS

STEP = {4: 0.3352 / 16, 2: 0.9957 / 64}  # best uniform step for a normal variable, in lane units per rms
RIDGE = 1e-3  # of the mean variance, added to both covariances
FIT_STEPS = 2


@dataclass(frozen=True)
class BasisTables:
    """What a calibration gives, for all layers: ``mean [L, G, D]``, ``key_side query_side [L, G, D, D]`` (A and B),
    ``weight [L, G, D]``: mean square of ``q B`` in a slot's class. float32.
    """

    mean: Tensor
    key_side: Tensor
    query_side: Tensor
    weight: Tensor

    def save(self, path: Path) -> None:
        """Write a safetensors file."""
        save_file({name: x.contiguous() for name, x in vars(self).items()}, path)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what :meth:`save` wrote. Raises FormatError for anything else."""
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise FormatError(
                f"expected the tables of a basis in {path}, found {error}; make them with `homkv basis`"
            ) from error
        lead = tensors["mean"].shape if "mean" in tensors else ()
        square = (*lead, *lead[-1:])
        shapes = {"mean": lead, "weight": lead, "key_side": square, "query_side": square}
        found = {name: tuple(x.shape) for name, x in tensors.items()}
        if len(lead) != 3 or found != shapes or not all(bool(torch.isfinite(x).all()) for x in tensors.values()):
            raise FormatError(
                f"expected finite tables mean, weight [L, G, D] and key_side, query_side [L, G, D, D] in {path}, found "
                f"{found}; make them with `homkv basis`"
            )
        return cls(**{name: x.to(torch.float32) for name, x in tensors.items()})

    @property
    def digest(self) -> str:
        """16 hex digits of the tables' bytes."""
        state = xxhash.xxh3_64()
        for x in vars(self).values():
            state.update(x.contiguous().numpy().tobytes())
        return state.hexdigest()


def class_bits(head_dim: int) -> Tensor:
    """Bits of each slot: the quarter of largest variance 4, the others 2."""
    return torch.tensor([4] * (head_dim // 4) + [2] * (head_dim - head_dim // 4))


def class_rotation(head_dim: int) -> Tensor:
    """Hadamard within the classes ``D/4 | D/4 | D/2``, ``[D, D]``: symmetric and its own inverse."""
    quarter = head_dim // 4
    blocks = [hadamard(torch.eye(w, dtype=torch.float64), w & -w) for w in (quarter, quarter, 2 * quarter)]
    rotation: Tensor = torch.block_diag(*blocks)
    return rotation


def balance(mean: Tensor, key_cov: Tensor, query_square: Tensor) -> BasisTables:
    """Tables of one layer, leading dimension 1, from ``mean [G, D]`` and ``key_cov query_square [G, D, D]``.

    With ``W = E[q q^T]`` and ``C = cov(k)``: ``W^1/2 C W^1/2 = U diag(l) U^T``, ``A = W^1/2 U diag(l^-1/4)``,
    ``B = W^-1/2 U diag(l^1/4)``; then the Hadamard of each class, and its mean square as lane units.
    """
    dim = mean.shape[-1]
    eye = torch.eye(dim, dtype=torch.float64)

    def ridged(x: Tensor) -> Tensor:
        variance = x.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-12)
        return x + RIDGE * variance[..., None, None] * eye

    w, c = ridged(query_square.double()), ridged(key_cov.double())
    square, turn = torch.linalg.eigh(w)
    root = turn * square.sqrt().unsqueeze(-2) @ turn.transpose(-1, -2)
    inverse = turn / square.sqrt().unsqueeze(-2) @ turn.transpose(-1, -2)
    length, axes = torch.linalg.eigh(root @ c @ root)
    length, axes = length.flip(-1).clamp_min(1e-24), axes.flip(-1)
    rotation = class_rotation(dim)
    a = root @ axes * length.unsqueeze(-2) ** -0.25 @ rotation
    b = inverse @ axes * length.unsqueeze(-2) ** 0.25 @ rotation
    variance = _class_mean((a.transpose(-1, -2) @ c @ a).diagonal(dim1=-2, dim2=-1))
    step = torch.tensor([STEP[int(bits)] for bits in class_bits(dim)], dtype=torch.float64)
    ratio = (variance.sqrt() * step).unsqueeze(-2)
    a, b = a / ratio, b * ratio
    weight = _class_mean((b.transpose(-1, -2) @ w @ b).diagonal(dim1=-2, dim2=-1))
    weight = weight / weight.mean(-1, keepdim=True)
    return BasisTables(*(x.float().unsqueeze(0) for x in (mean, a, b, weight)))


def _class_mean(x: Tensor) -> Tensor:
    """``x [..., D]`` averaged over each class ``D/4 | D/4 | D/2``."""
    quarter = x.shape[-1] // 4
    parts = x.split((quarter, quarter, 2 * quarter), -1)
    return torch.cat([part.mean(-1, keepdim=True).expand_as(part) for part in parts], -1)


class BasisCodec(PageCodec):
    """Rows in a balanced basis, bound to a layer by :meth:`at_layer`; tensors are ``[..., G, T, D]``, all kv heads.

    ``k[t] ~ mean + k_scale[t] lane[t] B^T``; ``score = k_scale q_scale (q_int . lane) + q . mean`` with
    ``q_int = round(q B / q_scale)``. Values as in the rows formats: Hadamard, 2 bits, one scale. Scales of K are fp16.
    """

    page_tokens = PAGE_TOKENS
    num_sinks = NUM_SINKS
    min_window = MIN_WINDOW

    def __init__(self, head_dim: int, tables: BasisTables) -> None:
        super().__init__(head_dim)
        if tables.mean.shape[-1] != head_dim or head_dim % 16:
            raise UnsupportedError(
                f"expected a basis for head_dim {head_dim}, a multiple of 16, found one for {tables.mean.shape[-1]}; "
                "calibrate this model"
            )
        self.tables, self._layer = tables, -1
        self.name = f"basis:id={tables.digest}"
        self._bits, self._block = class_bits(head_dim), head_dim & -head_dim
        quarter = head_dim // 4
        self.record = PageRecord(
            [
                codes("k_code4", PAGE_TOKENS, quarter, 4),
                codes("k_code2", PAGE_TOKENS, 3 * quarter, 2),
                codes("v_code", PAGE_TOKENS, head_dim, 2),
                Section("k_scale", (PAGE_TOKENS,), torch.float16),
                Section("v_scale", (PAGE_TOKENS,), torch.uint8),
            ]
        )
        self.page_bytes = self.record.num_bytes
        self.layout_id = f"basis/1 {tables.digest} D={head_dim}"

    def at_layer(self, layer: int, num_layers: int) -> Self:
        """See PageCodec.at_layer. Raises UnsupportedError if the tables are those of another model."""
        if num_layers != self.tables.mean.shape[0]:
            raise UnsupportedError(
                f"expected a basis of {num_layers} layers, found {self.tables.mean.shape[0]}; calibrate this model"
            )
        bound = copy.copy(self)
        bound._layer = layer
        return bound

    def _table(self, name: str, like: Tensor, dtype: torch.dtype) -> Tensor:
        """One table of the layer, ``[G, ...]``, for tensors ``like [..., G, any, any]``. Raises ShapeError."""
        table: Tensor = getattr(self.tables, name)[self._layer]
        if self._layer < 0 or like.ndim < 3 or like.shape[-3] != table.shape[0]:
            raise ShapeError(
                f"expected a codec bound to a layer and tensors of {table.shape[0]} kv heads, [..., G, T, D], found "
                f"layer {self._layer} and {tuple(like.shape)}; call at_layer() and pass all heads"
            )
        return table.to(like.device, dtype)

    def encode(self, k: Tensor, v: Tensor, first_position: int = 0) -> Tensor:
        """Quantize and pack whole pages; see PageCodec.encode. Raises FormatError for unstorable values."""
        self.check_tokens(k, v)
        k, v = k.to(torch.float32), v.to(torch.float32)
        require_finite(k, "keys")
        require_finite(v, "values")
        x = (k - self._table("mean", k, torch.float32).unsqueeze(-2)) @ self._table("key_side", k, torch.float32)
        lane, scale = self._fit(x, self._table("weight", k, torch.float32).unsqueeze(-2))
        v_lane, v_scale = fit_rows(hadamard(v, self._block), 2)
        quarter = self.head_dim // 4
        fields = {
            "k_code4": (lane[..., :quarter] + 120) / 16,
            "k_code2": (lane[..., quarter:] + 96) / 64,
            "v_code": (v_lane + 96) / 64,
            "k_scale": scale.unsqueeze(-1),
            "v_scale": v_scale.unsqueeze(-1),
        }
        pages = {name: cut(part, -2, PAGE_TOKENS) for name, part in fields.items()}
        return self.record.write({name: part.squeeze(-1) if "scale" in name else part for name, part in pages.items()})

    def _fit(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Lanes of ``x [..., T, D]`` and one scale per token: weighted least squares from the weighted rms."""
        four = (self._bits == 4).to(x.device)

        def lanes(scale: Tensor) -> Tensor:
            return torch.where(four, code_rows(x, scale, 4), code_rows(x, scale, 2))

        expected = torch.where(four, STEP[4] ** -2, STEP[2] ** -2)  # mean square of a class at scale 1
        scale = ((weight * x * x).sum(-1) / (weight * expected).sum(-1)).sqrt().clamp_min(SMALLEST_SCALE)
        for _ in range(FIT_STEPS):
            lane = lanes(scale)
            scale = ((weight * x * lane).sum(-1) / (weight * lane * lane).sum(-1)).clamp_min(SMALLEST_SCALE)
        stored = scale.to(torch.float16)
        if not bool(torch.isfinite(stored).all()):
            raise FormatError(f"expected row scales within fp16, found {float(scale.max()):.4g}; use bf16")
        return lanes(stored.to(torch.float32)), stored

    def _lanes(self, pages: Tensor) -> tuple[Tensor, Tensor]:
        """K's lanes ``[..., N * T, D] int8`` and scales ``[..., N * T] float16``."""
        four = self.record.read(pages, "k_code4").to(torch.int16) * 16 - 120
        two = self.record.read(pages, "k_code2").to(torch.int16) * 64 - 96
        lane = torch.cat((four, two), -1).to(torch.int8)
        return lane.flatten(-3, -2), self.record.read(pages, "k_scale").flatten(-2)

    def _value_lanes(self, pages: Tensor) -> tuple[Tensor, Tensor]:
        """V's lanes ``[..., N, T, D] int8`` and scales ``[..., N, T] uint8``."""
        lane = (self.record.read(pages, "v_code").to(torch.int16) * 64 - 96).to(torch.int8)
        return lane, self.record.read(pages, "v_scale")

    def dense(self, pages: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Keys and values that the pages ``[..., G, N, P]`` stand for, ``[..., G, N * 64, D]``."""
        self.check_pages(pages)
        lane, scale = self._lanes(pages)
        x = lane.to(dtype) * scale.to(dtype).unsqueeze(-1)
        k = x @ self._table("query_side", pages, dtype).transpose(-1, -2)
        k = k + self._table("mean", pages, dtype).unsqueeze(-2)
        v_lane, v_scale = self._value_lanes(pages)
        v = hadamard(v_lane.to(dtype) * decode_scales(v_scale, dtype).unsqueeze(-1), self._block)
        return k, v.flatten(-3, -2)

    def scores(
        self, q: Tensor, pages: Tensor, rounding: Rounding = EIGHT_BIT, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """``k_scale q_scale (q_int . lane) + q . mean``, ``[..., G, R, N * 64]``."""
        self.check_pages(pages)
        lane, scale = self._lanes(pages)
        q, lanes = q.to(dtype), lane.transpose(-1, -2)
        constant = (q * self._table("mean", pages, dtype).unsqueeze(-2)).sum(-1, keepdim=True)
        turned = q @ self._table("query_side", pages, dtype)
        if not rounding.q:
            return turned @ lanes.to(dtype) * scale.to(dtype).unsqueeze(-2) + constant
        largest = turned.abs().amax(-1, keepdim=True)
        acc = integer_matmul((turned * torch.where(largest > 0, 127 / largest, 0)).round(), lanes)
        return acc.to(dtype) * (scale.to(dtype).unsqueeze(-2) * (largest / 127)) + constant

    def weigh(
        self, p: Tensor, pages: Tensor, rounding: Rounding = EIGHT_BIT, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """``H^T sum_t (p[t] v_scale[t]) lane[t]``; the bracket becomes uint8 per page."""
        self.check_pages(pages)
        lane, scale = self._value_lanes(pages)
        weight = cut(p.to(dtype) * decode_scales(scale, dtype).flatten(-2).unsqueeze(-2), -1, PAGE_TOKENS)
        tiles = weight.transpose(-2, -3)  # [..., N, R, T]
        if not rounding.p:
            return hadamard((tiles @ lane.to(dtype)).sum(-3), self._block)
        largest = tiles.amax(-1, keepdim=True)
        acc = integer_matmul((tiles * torch.where(largest > 0, 255 / largest, 0)).round(), lane)
        return hadamard((acc.to(dtype) * (largest / 255)).sum(-3), self._block)
