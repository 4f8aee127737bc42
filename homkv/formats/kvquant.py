"""KVQuant: non-uniform levels and exact outliers; keys as they are before RoPE.

Source: arXiv 2401.18079, sections 3.1 to 3.5. What the paper calibrates per model is fitted per page here, and its
bytes are counted: see docs/rivals.md.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from homkv.errors import FormatError, UnsupportedError
from homkv.formats.minmax import SMALLEST_SCALE, cut
from homkv.formats.options import Options, Switch, numbers
from homkv.formats.record import PageRecord, Section, codes
from homkv.formats.restored import RestoredCodec
from homkv.formats.rotary import Rotation
from homkv.quant import require_finite
from homkv.rope import RopeSpec, no_rope

KMEANS_STEPS = 50  # as in the authors' code; most pages settle after 10


@dataclass(frozen=True)
class KvquantOptions(Options):
    """Switches of ``kvquant``; names as ``kvquant:bits=3,outliers=0,rope=after``.

    ``bits``: 2, 3 or 4. ``outliers``: per cent of each vector that stays exact, at least one element if not 0.
    ``rope``: keys as they are "before" it, or "after". ``page``: tokens of a page. Raises FormatError for any other
    value.
    """

    base = "kvquant"
    switches = (
        Switch("bits", "bits", numbers(2, 3, 4)),
        Switch("outliers", "outliers", numbers(0, 1, 2)),
        Switch("rope", "rope", {"before": "before", "after": "after"}),
        Switch("page", "page", numbers(64, 128, 256)),
    )

    bits: int = 2
    outliers: int = 1
    rope: str = "before"
    page: int = 128


@dataclass(frozen=True)
class SparseVectors:
    """Vectors ``[..., R, S]`` as ``offset + radius * level[code]``, and ``outlier`` where ``index`` says.

    ``code [..., R, S] uint8``; ``offset radius [..., R] float16``; ``level [..., 2^bits] float16``, one set for all
    vectors of a page; ``outlier index [..., R, n]``, float16 and uint8.
    """

    code: Tensor
    offset: Tensor
    radius: Tensor
    level: Tensor
    outlier: Tensor
    index: Tensor

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The values that are stood for, ``[..., R, S]``."""
        flat = self.code.flatten(-2).to(torch.int64)
        value = torch.gather(self.level.to(dtype), -1, flat).unflatten(-1, self.code.shape[-2:])
        x = self.offset.to(dtype).unsqueeze(-1) + self.radius.to(dtype).unsqueeze(-1) * value
        return torch.scatter(x, -1, self.index.to(torch.int64), self.outlier.to(dtype))


def quantize_vectors(x: Tensor, bits: int, num_outliers: int) -> SparseVectors:
    """Quantize vectors ``x [..., R, S] float32``: outliers apart, the rest scaled to [-1, 1] and set to levels.

    The outliers of a vector are its elements farthest from the median. Levels minimise the squared error of the whole
    page, so a vector counts as its ``radius^2``. ``|x - dense| <= radius * (distance to the nearest level)`` plus what
    fp16 took. Raises FormatError for values that are not finite or beyond fp16.
    """
    require_finite(x, "keys and values")
    distance = (x - x.median(-1, keepdim=True).values).abs()
    index = distance.topk(num_outliers, -1).indices
    is_outlier = torch.zeros_like(x, dtype=torch.bool).scatter(-1, index, True)
    low = x.masked_fill(is_outlier, torch.inf).amin(-1)
    high = x.masked_fill(is_outlier, -torch.inf).amax(-1)
    offset = ((low + high) / 2).to(torch.float16)
    radius = ((high - low) / 2).clamp_min(SMALLEST_SCALE).to(torch.float16)
    outlier = torch.gather(x, -1, index).to(torch.float16)
    if not all(bool(torch.isfinite(part).all()) for part in (offset, radius, outlier)):
        raise FormatError(
            f"expected keys and values within fp16 (65504), found {float(x.abs().max()):.4g}; use --kv-cache-dtype bf16"
        )
    z = ((x - offset.float().unsqueeze(-1)) / radius.float().unsqueeze(-1)).clamp(-1, 1)
    weight = (radius.float() ** 2).unsqueeze(-1).masked_fill(is_outlier, 0)
    level = fit_levels(z.flatten(-2), weight.flatten(-2), bits).to(torch.float16)
    edge = (level[..., 1:].float() + level[..., :-1].float()) / 2
    code = torch.searchsorted(edge, z.flatten(-2)).to(torch.uint8).unflatten(-1, x.shape[-2:])
    return SparseVectors(code, offset, radius, level, outlier, index.to(torch.uint8))


def fit_levels(z: Tensor, weight: Tensor, bits: int) -> Tensor:
    """Levels ``[..., 2^bits]``, rising, of least weighted squared error: Lloyd's steps on sorted ``z [..., n]``.

    Starts at the middles of equal parts of the weight. A level to which nothing is nearest stays where it is.
    """
    z, order = z.to(torch.float64).sort(-1)
    weight = torch.gather(weight.to(torch.float64), -1, order)
    zero = torch.zeros_like(z[..., :1])
    mass, moment = (torch.cat((zero, x.cumsum(-1)), -1) for x in (weight, weight * z))
    share = (torch.arange(1 << bits, dtype=torch.float64, device=z.device) + 0.5) / (1 << bits)
    at = torch.searchsorted(mass, share * mass[..., -1:]).clamp(1, z.shape[-1]) - 1
    level = torch.gather(z, -1, at)
    first, last = torch.zeros_like(at[..., :1]), torch.full_like(at[..., :1], z.shape[-1])
    for _ in range(KMEANS_STEPS):
        edge = torch.searchsorted(z, (level[..., 1:] + level[..., :-1]) / 2)
        cuts = torch.cat((first, edge, last), -1)
        part, total = (torch.gather(x, -1, cuts).diff(dim=-1) for x in (mass, moment))
        new = torch.where(part > 0, total / part.clamp_min(1e-300), level)
        if torch.equal(new, level):
            break
        level = new
    return level


class KvquantCodec(RestoredCodec):
    """KVQuant bound to a head: a page has one set of levels for K and one for V.

    Keys are turned back to before RoPE and quantized per channel over the page's tokens, values per token; the first
    token stays exact (the paper's attention sink). ``rope``: how the model rotates its keys.
    Raises UnsupportedError for a head_dim that does not pack.
    """

    num_sinks = 1
    min_window = 0

    def __init__(self, head_dim: int, options: KvquantOptions | None = None, rope: RopeSpec | None = None) -> None:
        super().__init__(head_dim)
        options = options or KvquantOptions()
        if head_dim <= 0 or head_dim % 8 or head_dim > 256:
            raise UnsupportedError(
                f"expected a head_dim up to 256 that 8 divides, found {head_dim}; use another format"
            )
        self.options, self.name, self.page_tokens = options, options.name, options.page
        self.rotation = Rotation(rope or no_rope(head_dim)) if options.rope == "before" else None
        self.num_outliers = {"k": self._share(self.page_tokens), "v": self._share(head_dim)}
        self.record = PageRecord(self._sections())
        self.page_bytes = self.record.num_bytes
        turned = self.rotation.digest if self.rotation else "none"
        self.layout_id = f"kvquant/1 {options.name} rope={turned} D={head_dim}"

    def _share(self, size: int) -> int:
        """Outliers of a vector of ``size`` elements."""
        return max(1, round(size * self.options.outliers / 100)) if self.options.outliers else 0

    def _sections(self) -> list[Section]:
        bits, half = self.options.bits, torch.float16
        sections = [Section("position", (1,), torch.int32)]
        for x, rows, size in (("k", self.head_dim, self.page_tokens), ("v", self.page_tokens, self.head_dim)):
            outliers = (rows, self.num_outliers[x])
            sections += [
                codes(f"{x}_code", rows, size, bits),
                Section(f"{x}_offset", (rows,), half),
                Section(f"{x}_radius", (rows,), half),
                Section(f"{x}_level", (1 << bits,), half),
                Section(f"{x}_outlier", outliers, half),
                Section(f"{x}_index", outliers, torch.uint8),
            ]
        return sections

    def _positions(self, first: Tensor) -> Tensor:
        """Positions ``[..., T]`` of the tokens of pages that begin at ``first [...]``."""
        return first.unsqueeze(-1) + torch.arange(self.page_tokens, device=first.device)

    def encode(self, k: Tensor, v: Tensor, first_position: int = 0) -> Tensor:
        """Quantize and pack whole pages; see PageCodec.encode. Raises FormatError for unstorable values."""
        self.check_tokens(k, v)
        k, v = (cut(x.to(torch.float32), -2, self.page_tokens) for x in (k, v))
        first = first_position + self.page_tokens * torch.arange(k.shape[-3], device=k.device)
        if self.rotation is not None:
            k = self.rotation.apply(k, self._positions(first), inverse=True)
        fields = {"position": first.expand(k.shape[:-2]).unsqueeze(-1)}
        for name, x in (("k", k.transpose(-1, -2)), ("v", v)):
            vectors = quantize_vectors(x, self.options.bits, self.num_outliers[name])
            fields |= {f"{name}_{field}": part for field, part in vars(vectors).items()}
        return self.record.write(fields)

    def _vectors(self, pages: Tensor, name: str) -> SparseVectors:
        fields = SparseVectors.__dataclass_fields__
        return SparseVectors(**{field: self.record.read(pages, f"{name}_{field}") for field in fields})

    def dense(self, pages: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Keys, after RoPE, and values that the pages stand for, ``[..., N * T, D]``."""
        self.check_pages(pages)
        k = self._vectors(pages, "k").dense(dtype).transpose(-1, -2)
        if self.rotation is not None:
            k = self.rotation.apply(k, self._positions(self.record.read(pages, "position").squeeze(-1)))
        return k.flatten(-3, -2), self._vectors(pages, "v").dense(dtype).flatten(-3, -2)
