"""Everything that `homkv bench attention` runs on a GPU: what it stores, how it is called, whether it is right.

A candidate is made without importing what it needs; what is missing or fails shows when it is checked, as a reason.
"""

import functools
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from homkv.attention import reference
from homkv.attention.view import LayerView
from homkv.bench.cpu import HeadShape
from homkv.formats import PageCodec, make_codec
from homkv.formats.rows import RowsCodec
from homkv.testing.inputs import make_view

DTYPE = torch.bfloat16  # of queries and of 16-bit caches
DISTINCT_PAGES = 32  # random pages, repeated in random order
CHECK_LENGTHS = (1000, 331)
FLOAT_TOLERANCE = 1e-2  # bfloat16 weights and output
INTEGER_TOLERANCE = 5e-2  # int8 queries and weights
MIN_SET_BYTES = 400_000_000  # several times any L2 cache
MAX_SETS = 64


@dataclass(frozen=True)
class Case:
    """One token for each of ``batch`` sequences of ``context`` tokens."""

    shape: HeadShape
    batch: int
    context: int

    @property
    def fields(self) -> dict[str, Any]:
        """The case in a record."""
        return {"shape": str(self.shape), "batch": self.batch, "context": self.context}

    def __str__(self) -> str:
        return f"{self.shape}, {self.batch} x {self.context:,}"


def num_sets(num_bytes: int) -> int:
    """Caches of ``num_bytes`` to go through so that none is still in L2 when its turn comes again."""
    return min(MAX_SETS, math.ceil(MIN_SET_BYTES / num_bytes))


class Candidate(ABC):
    """One way to attend. Candidates with equal ``store`` read the same caches."""

    name: str
    store: str
    tolerance = FLOAT_TOLERANCE
    compiles = True  # its kernels at the first call; such checks run side by side

    @abstractmethod
    def kv_bytes(self, case: Case) -> int:
        """Bytes of cache that one call must read."""

    @abstractmethod
    def make(self, case: Case, device: torch.device) -> Any:
        """A random cache."""

    @abstractmethod
    def attend(self, q: Tensor, kv: Any, softmax_scale: float) -> Tensor:
        """``q [B, H, 1, D]`` to ``o [B, H, 1, D]``, everything included."""

    @abstractmethod
    def error(self, shape: HeadShape, device: torch.device) -> float:
        """``|o - exact| / |exact|`` on a small case, against float64 attention on what is stored."""


def relative_norm(o: Tensor, exact: Tensor) -> float:
    """``|o - exact| / |exact|``, on the CPU in float64."""
    return float((o.double().cpu() - exact.double().cpu()).norm() / exact.double().cpu().norm())


def dense_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, softmax_scale: float) -> Tensor:
    """Attention in float64 on the CPU over the first ``lengths[b]`` tokens of ``k v [B, G, S, D]``."""
    out = []
    for b, n in enumerate(lengths.tolist()):
        rows = q[b, :, 0].double().cpu().unflatten(0, (k.shape[1], -1))
        keys, values = k[b, :, :n].double().cpu(), v[b, :, :n].double().cpu()
        out.append((torch.softmax(softmax_scale * rows @ keys.transpose(1, 2), -1) @ values).flatten(0, 1))
    return torch.stack(out).unsqueeze(2)


@dataclass(frozen=True)
class Contiguous:
    """A cache ``[B, G, S, D]`` and how many tokens of it each sequence has."""

    k: Tensor
    v: Tensor
    lengths: Tensor


class SixteenBit(Candidate):
    """A kernel on 16-bit keys and values."""

    store = "16 bit"
    takes_lengths = True

    def kv_bytes(self, case: Case) -> int:
        """See Candidate."""
        return 4 * case.batch * case.shape.num_kv_heads * case.context * case.shape.head_dim

    def make(self, case: Case, device: torch.device) -> Contiguous:
        """See Candidate."""
        shape = case.batch, case.shape.num_kv_heads, case.context, case.shape.head_dim
        k, v = (torch.empty(shape, dtype=DTYPE, device=device).normal_() for _ in "kv")
        return Contiguous(k, v, torch.full((case.batch,), case.context, dtype=torch.int32, device=device))

    def error(self, shape: HeadShape, device: torch.device) -> float:
        """See Candidate. PyTorch's backends take sequences of equal length only."""
        kv = self.make(Case(shape, len(CHECK_LENGTHS), CHECK_LENGTHS[0]), device)
        if self.takes_lengths:
            kv.lengths.copy_(torch.tensor(CHECK_LENGTHS))
        q, scale = random_queries(shape, len(CHECK_LENGTHS), device), shape.head_dim**-0.5
        return relative_norm(self.attend(q, kv, scale), dense_attention(q, kv.k, kv.v, kv.lengths, scale))


class Sdpa(SixteenBit):
    """One of PyTorch's backends."""

    takes_lengths = False
    compiles = False  # and a backend is chosen for the whole process

    def __init__(self, backend: str) -> None:
        self.name, self.backend = f"sdpa {backend}", backend

    def attend(self, q: Tensor, kv: Contiguous, softmax_scale: float) -> Tensor:
        """See Candidate."""
        from homkv.bench.peers import sdpa

        return sdpa.attend(q, kv.k, kv.v, softmax_scale, self.backend)


class OwnFp16(SixteenBit):
    """Our split-KV kernel."""

    name = "fp16"

    def attend(self, q: Tensor, kv: Contiguous, softmax_scale: float) -> Tensor:
        """See Candidate."""
        from homkv.bench.peers import fp16

        return fp16.attend(q, kv.k, kv.v, kv.lengths, softmax_scale)


class Fp8(Candidate):
    """e4m3 with one scale per kv head."""

    name = store = "fp8"

    def kv_bytes(self, case: Case) -> int:
        """See Candidate."""
        return 2 * case.batch * case.shape.num_kv_heads * case.context * case.shape.head_dim

    def make(self, case: Case, device: torch.device) -> tuple[Contiguous, Tensor]:
        """Random bytes: magnitudes below 2, so that there is no NaN among them."""
        shape = case.batch, case.shape.num_kv_heads, case.context, case.shape.head_dim
        k, v = (torch.empty(shape, dtype=torch.uint8, device=device).random_(0, 256).bitwise_and_(0xBF) for _ in "kv")
        lengths = torch.full((case.batch,), case.context, dtype=torch.int32, device=device)
        scales = torch.ones(case.shape.num_kv_heads, device=device)
        return Contiguous(k.view(torch.float8_e4m3fn), v.view(torch.float8_e4m3fn), lengths), scales

    def attend(self, q: Tensor, kv: tuple[Contiguous, Tensor], softmax_scale: float) -> Tensor:
        """See Candidate."""
        from homkv.bench.peers import fp8

        cache, scales = kv
        return fp8.attend(q, cache.k, cache.v, cache.lengths, softmax_scale, scales, scales)

    def error(self, shape: HeadShape, device: torch.device) -> float:
        """See Candidate."""
        kv, scales = self.make(Case(shape, len(CHECK_LENGTHS), CHECK_LENGTHS[0]), device)
        kv.lengths.copy_(torch.tensor(CHECK_LENGTHS))
        q, scale = random_queries(shape, len(CHECK_LENGTHS), device), shape.head_dim**-0.5
        exact = dense_attention(q, kv.k.float(), kv.v.float(), kv.lengths, scale)
        return relative_norm(self.attend(q, (kv, scales), scale), exact)


class Kivi(Candidate):
    """2 bits, dequantized the usual way."""

    name = store = "kivi"
    group = 32

    def kv_bytes(self, case: Case) -> int:
        """Codes; 4 bytes per channel and group of K; 16 bytes per token of V."""
        per_token = case.shape.head_dim // 2 + 4 * case.shape.head_dim / self.group + 16
        return int(case.batch * case.shape.num_kv_heads * case.context * per_token)

    def make(self, case: Case, device: torch.device) -> tuple[Any, Tensor]:
        """See Candidate."""
        from homkv.bench.peers.kivi_codes import KiviCache

        lead, dim = (case.batch, case.shape.num_kv_heads), case.shape.head_dim
        tokens = -(-case.context // self.group) * self.group

        def codes() -> Tensor:
            return torch.empty(*lead, tokens, dim // 4, dtype=torch.uint8, device=device).random_(0, 256)

        def normal(*shape: int) -> Tensor:
            return torch.empty(*lead, *shape, dtype=torch.float16, device=device).normal_()

        groups = tokens // self.group
        cache = KiviCache(
            codes(), normal(groups, dim), normal(groups, dim), codes(), normal(tokens, 4), normal(tokens, 4)
        )
        return cache, torch.full((case.batch,), case.context, dtype=torch.int32, device=device)

    def attend(self, q: Tensor, kv: tuple[Any, Tensor], softmax_scale: float) -> Tensor:
        """See Candidate."""
        from homkv.bench.peers import kivi

        return kivi.attend(q, kv[0], kv[1], softmax_scale)

    def error(self, shape: HeadShape, device: torch.device) -> float:
        """See Candidate."""
        from homkv.bench.peers.kivi_codes import dequantize

        cache, lengths = self.make(Case(shape, len(CHECK_LENGTHS), CHECK_LENGTHS[0]), device)
        lengths.copy_(torch.tensor(CHECK_LENGTHS))
        q, scale = random_queries(shape, len(CHECK_LENGTHS), device), shape.head_dim**-0.5
        exact = dense_attention(q, *dequantize(cache), lengths, scale)
        return relative_norm(self.attend(q, (cache, lengths), scale), exact)


class OnPages(Candidate):
    """Our kernels on pages of any codec: sinks and window, query rotation and merge included."""

    tolerance = INTEGER_TOLERANCE

    def __init__(self, name: str, format_name: str) -> None:
        self.name, self.format_name, self.store = name, format_name, f"pages {format_name}"

    def codec(self, shape: HeadShape) -> PageCodec:
        """The format bound to this head_dim, channels in their natural order."""
        return codec_for(self.format_name, shape.head_dim)

    def kv_bytes(self, case: Case) -> int:
        """Pages, sinks and window."""
        return case.batch * case.shape.num_kv_heads * self.codec(case.shape).kv_bytes(case.context)

    def make(self, case: Case, device: torch.device) -> LayerView:
        """See Candidate."""
        return random_view(self.codec(case.shape), case, device)

    def attend(self, q: Tensor, kv: LayerView, softmax_scale: float) -> Tensor:
        """See Candidate."""
        from homkv.attention import triton as kernels

        return kernels.attend(q, kv, codec_for(self.format_name, q.shape[3]), softmax_scale)[0]

    def error(self, shape: HeadShape, device: torch.device) -> float:
        """See Candidate."""
        codec = self.codec(shape)
        view = make_view(codec, list(CHECK_LENGTHS), shape.num_kv_heads, exact_dtype=DTYPE)
        q, scale = random_queries(shape, len(CHECK_LENGTHS), device), shape.head_dim**-0.5
        there = LayerView(**{name: tensor.to(device) for name, tensor in vars(view).items()})
        return relative_norm(self.attend(q, there, scale), reference.oracle(q.cpu(), view, codec, scale)[0])


@functools.cache
def codec_for(format_name: str, head_dim: int) -> PageCodec:
    """The same codec object for every call, as in a cache: kernels keep a device copy of its channel order."""
    return make_codec(format_name, head_dim)


class Dequant(OnPages):
    """The tuned dequantizing kernel on the same pages."""

    tolerance = FLOAT_TOLERANCE

    def attend(self, q: Tensor, kv: LayerView, softmax_scale: float) -> Tensor:
        """See Candidate."""
        from homkv.bench.peers import dequant

        codec = codec_for(self.format_name, q.shape[3])
        assert isinstance(codec, RowsCodec)  # only rows formats are given to it
        return dequant.attend(q, kv, codec, softmax_scale)


def random_queries(shape: HeadShape, batch: int, device: torch.device) -> Tensor:
    """``[B, H, 1, D]`` standard normal."""
    return torch.randn(batch, shape.num_q_heads, 1, shape.head_dim, device=device).to(DTYPE)


def random_view(codec: PageCodec, case: Case, device: torch.device) -> LayerView:
    """Sequences of random pages in random places of the pool, with the sinks and window that the format keeps."""
    heads, dim = case.shape.num_kv_heads, case.shape.head_dim
    pages, exact = codec.num_pages(case.context), codec.num_exact(case.context)
    some = distinct_pages(codec.name, dim, heads).to(device)
    blocks = case.batch * pages
    room = (case.batch, heads, codec.num_sinks + codec.max_window, dim)
    return LayerView(
        pool=some[torch.randint(DISTINCT_PAGES, (blocks,), device=device)],
        page_table=torch.randperm(blocks, device=device).to(torch.int32).view(case.batch, pages).contiguous(),
        num_pages=torch.full((case.batch,), pages, dtype=torch.int32, device=device),
        exact_k=torch.randn(room, device=device).to(DTYPE),
        exact_v=torch.randn(room, device=device).to(DTYPE),
        exact_len=torch.full((case.batch,), exact, dtype=torch.int32, device=device),
        slots=torch.arange(case.batch, dtype=torch.int32, device=device),
    )


@functools.cache
def distinct_pages(format_name: str, head_dim: int, heads: int) -> Tensor:
    """Pages of standard normal keys and values, ``[DISTINCT_PAGES, G, P]`` on the CPU; made once."""
    codec = codec_for(format_name, head_dim)
    k, v = (torch.randn(heads, DISTINCT_PAGES * codec.page_tokens, head_dim) for _ in "kv")
    return codec.encode(k, v, codec.num_sinks).transpose(0, 1).contiguous()


def sixteen_bit_peers() -> list[Candidate]:
    """Every kernel on an uncompressed cache."""
    return [Sdpa("flash"), Sdpa("cudnn"), OwnFp16()]


def compressed_peers(formats: tuple[str, ...]) -> list[Candidate]:
    """Every other peer; the dequantizing kernel for every format that is measured."""
    dequantizing = [Dequant(f"dequant {name}", name) for name in formats]
    return [Fp8(), *dequantizing, Kivi(), OnPages("hack", "hack"), OnPages("hack-2026", "hack-2026")]


def our_formats(formats: tuple[str, ...]) -> list[Candidate]:
    """homkv itself."""
    return [OnPages(f"homkv {name}", name) for name in formats]
