"""Screen variants of the rows format on one model: KL at equal bytes, without kernels or page bytes.

    python benchmarks/format_search.py smollm2 k4420v2222 k4420v2222,a=0.4 k4420v2222,vs=2 --json out.jsonl

A variant is ``kDIGITSvDIGITS[,key=value...]``: any number of digits per side (4: quarters, 8: eighths; 3 bits allowed).
Keys: ``a`` error diffusion along V's tokens, ``ak`` the same for K, ``vs ks`` least number of classes of V and K (so
that a run of equal digits has several scales), ``w`` shortest window, ``fit`` least-squares steps, ``fb`` 1: the
errors of K's coarser classes are fed forward into the finer ones by the covariance of the prompt's queries, ``vo`` 1:
V's channels in falling order of their mean square, 2: V in the eigenvectors of its second moments, largest first (both
for each head, from a calibration text that is not scored), ``c8`` K's centre as int8: 1 with one fp16 scale per page, 4
with one per quarter.

The model reads a prefix exactly (on a CPU in bfloat16 products), then 64 tokens at a time on dequantized pages: the
same sinks, pages and window as decoding token by token. Queries and weights are not rounded to 8 bits, which changes
nothing that is measured here. Every variant sees the same texts; KL is the mean over all tokens behind the prefix.
"""

import argparse
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

from homkv.models import LoadedModel, load_model
from homkv.models.describe import refuse_sliding_windows
from homkv.quant import SMALLEST_SCALE, decode_scales, encode_scales, hadamard
from homkv.texts import essays, token_ids

PAGE, SINKS = 64, 4
STEP = {
    1: 1.596 / 128,
    2: 0.9957 / 64,
    3: 0.5860 / 32,
    4: 0.3352 / 16,
}  # best uniform step per rms of a normal variable


@dataclass(frozen=True)
class Variant:
    """One line of the table; see the module's docstring."""

    name: str
    k: tuple[int, ...]
    v: tuple[int, ...]
    options: dict[str, float] = field(default_factory=dict)

    @classmethod
    def parse(cls, name: str) -> "Variant":
        """Read ``k4420v2222,a=0.4``."""
        digits, *pairs = name.split(",")
        k, v = digits[1:].split("v")
        options = {key: float(value) for key, value in (p.split("=") for p in pairs)}
        return cls(name, tuple(map(int, k)), tuple(map(int, v)), options)

    def get(self, key: str, default: float) -> float:
        """An option's value."""
        return self.options.get(key, default)

    @property
    def window(self) -> int:
        """Shortest window."""
        return int(self.get("w", 64))

    def classes(self, side: str, head_dim: int) -> list[tuple[int, int, int]]:
        """``(start, width, bits)`` of one side, 0-bit ones included, as homkv.spec cuts them."""
        digits = self.k if side == "k" else self.v
        unit, widest = head_dim // len(digits), head_dim // int(self.get(side + "s", 1))
        out, at = [], 0
        while at < len(digits):
            run = 1
            while at + run < len(digits) and digits[at + run] == digits[at]:
                run += 1
            size = 1 << (run.bit_length() - 1)
            while size * unit > widest:
                size //= 2
            out.append((at * unit, size * unit, digits[at]))
            at += size
        return out

    def bits_per_element(self, head_dim: int, num_tokens: int) -> float:
        """Everything stored at ``num_tokens``: codes, scales, centre, sinks and window; pages padded to 64 bytes."""
        classes = [c for side in "kv" for c in self.classes(side, head_dim) if c[2]]
        scales = int(self.get("c8", 0))
        page = sum(PAGE * w * b // 8 + PAGE for _, w, b in classes) + (
            head_dim + 2 * scales if scales else 2 * head_dim
        )
        pages = max(num_tokens - SINKS - self.window, 0) // PAGE
        stored = pages * (-(-page // 64) * 64) + (num_tokens - pages * PAGE) * 4 * head_dim
        return 4 * stored / (head_dim * num_tokens)


def code(y: Tensor, s: Tensor, bits: int) -> Tensor:
    """Lane values of rows ``y [..., w]`` at scale ``s [..., 1]``."""
    if bits == 8:
        return (y / s).round().clamp(-127, 127)
    step, half = 1 << (8 - bits), 1 << (bits - 1)
    return ((y / (s * step)).floor().clamp(-half, half - 1) + 0.5) * step


def quantize(y: Tensor, bits: int, fit: int = 2) -> Tensor:
    """Rows ``y [..., w]`` as a page holds them: fitted E5M3 scale times lane values."""
    if bits == 0:
        return torch.zeros_like(y)
    if bits == 8:
        s = (y.abs().amax(-1) / 127).clamp_min(SMALLEST_SCALE)
        s = decode_scales(encode_scales(s, up=True)).unsqueeze(-1)
        return code(y, s, bits) * s
    s = (y.square().mean(-1, keepdim=True).sqrt() * STEP[bits]).clamp_min(SMALLEST_SCALE)
    for _ in range(fit):
        lane = code(y, s, bits)
        s = ((lane * y).sum(-1, keepdim=True) / lane.square().sum(-1, keepdim=True)).clamp_min(SMALLEST_SCALE)
    s = decode_scales(encode_scales(s[..., 0], up=False)).unsqueeze(-1)
    return code(y, s, bits) * s


def diffused(x: Tensor, bits: int, share: float, fit: int) -> Tensor:
    """Rows ``x [..., 64, w]``; each token takes over ``share`` of its predecessor's error."""
    if share == 0 or bits == 0:
        return quantize(x, bits, fit)
    out, error = [], torch.zeros_like(x[..., 0, :])
    for t in range(x.shape[-2]):
        y = x[..., t, :] + share * error
        out.append(quantize(y, bits, fit))
        error = y - out[-1]
    return torch.stack(out, -2)


def value_basis(v: Tensor, kind: int) -> Tensor:
    """Orthonormal columns ``[L, G, D, D]`` in which V's channels are ordered, from values ``[L, G, S, D]``."""
    moments = v.double().transpose(-1, -2) @ v.double() / v.shape[-2]
    if kind == 2:
        vectors: Tensor = torch.linalg.eigh(moments).eigenvectors
        return vectors.flip(-1).to(v.dtype)
    order = moments.diagonal(dim1=-2, dim2=-1).argsort(-1, descending=True)
    return torch.nn.functional.one_hot(order, v.shape[-1]).transpose(-1, -2).to(v.dtype)


def restore_values(v: Tensor, variant: Variant, basis: Tensor | None) -> Tensor:
    """``v [L, B, G, N, 64, D]`` through a page and back, in ``basis [L, G, D, D]`` unless None."""
    if basis is not None:
        basis = basis[:, None, :, None]
        return restore_values(v @ basis, variant, None) @ basis.transpose(-1, -2)
    out = torch.empty_like(v)
    for start, width, bits in variant.classes("v", v.shape[-1]):
        block = width & -width
        rotated = hadamard(v[..., start : start + width], block)
        rotated = diffused(rotated, bits, variant.get("a", 0.25), int(variant.get("fit", 2)))
        out[..., start : start + width] = hadamard(rotated, block)
    return out


def restore_centre(centre: Tensor, scales: int) -> Tensor:
    """``[..., 1, D]`` as fp16, or as int8 with ``scales`` fp16 scales."""
    if not scales:
        return centre.half().float()
    parts = centre.unflatten(-1, (scales, -1))
    scale = (parts.abs().amax(-1, keepdim=True) / 127).clamp_min(1e-6).half().float()
    restored: Tensor = (parts / scale).round().clamp(-127, 127) * scale
    return restored.flatten(-2)


def restore_keys(k: Tensor, order: Tensor, variant: Variant, w: Tensor) -> Tensor:
    """``k [L, B, G, N, 64, D]`` through a page and back; ``w [L, B, G, D, D]`` = E[q q^T] of the prompt."""
    x = k[..., order]
    centre = restore_centre(x.mean(-2, keepdim=True), int(variant.get("c8", 0)))
    residual = x - centre
    classes = variant.classes("k", k.shape[-1])
    feed = variant.get("fb", 0) > 0
    if feed:
        w = w[..., order, :][..., :, order]
        w = w + 0.01 * w.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None] * torch.eye(k.shape[-1], device=k.device)
        residual = residual.clone()
    got = torch.zeros_like(residual)
    left = torch.ones(k.shape[-1], dtype=torch.bool, device=k.device)
    for start, width, bits in sorted(classes, key=lambda c: c[2]):  # coarse first: fine classes absorb their errors
        span, block = slice(start, start + width), width & -width
        rotated = hadamard(residual[..., span], block)
        rotated = diffused(rotated, bits, variant.get("ak", 0), int(variant.get("fit", 2)))
        got[..., span] = hadamard(rotated, block)
        left[span] = False
        if feed and bool(left.any()):
            error = residual[..., span] - got[..., span]
            rest = left.nonzero().flatten()
            gain = torch.linalg.solve(w[..., rest, :][..., :, rest], w[..., rest, span])  # [L, B, G, R, width]
            residual[..., rest] += error @ gain.unsqueeze(-3).transpose(-1, -2)
    out = torch.empty_like(x)
    out[..., order] = got + centre
    return out


class Tape:
    """KV of all layers during one run, ``k v [L, B, G, S, D]``: sealed tokens replaced by what pages hold."""

    def __init__(self, k: Tensor, v: Tensor, room: int) -> None:
        grow = (*k.shape[:3], k.shape[3] + room, k.shape[4])
        self.k, self.v, self.length, self.sealed = k.new_zeros(grow), v.new_zeros(grow), k.shape[3], SINKS
        self.k[..., : self.length, :], self.v[..., : self.length, :] = k, v

    def seal(self, variant: Variant, order: Tensor, w: Tensor, basis: Tensor | None) -> None:
        """Replace whatever has left the window; ``basis [L, G, D, D]`` of values, if any."""
        pages = max(self.length - self.sealed - variant.window, 0) // PAGE
        if not pages:
            return
        span = slice(self.sealed, self.sealed + pages * PAGE)
        num_layers, step = self.k.shape[0], 8 if self.k.is_cuda else 1  # the rows of one fit a processor's cache
        for at in (slice(i, i + step) for i in range(0, num_layers, step)):
            k, v = (x[at][..., span, :].unflatten(-2, (pages, PAGE)) for x in (self.k, self.v))
            self.k[at][..., span, :] = restore_keys(k, order, variant, w[at]).flatten(-3, -2)
            here = None if basis is None else basis[at]
            self.v[at][..., span, :] = restore_values(v, variant, here).flatten(-3, -2)
        self.sealed = span.stop


STATE: dict[str, Any] = {}


def attention(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **kw: Any) -> tuple[Tensor, None]:
    """Attend to the tape and to the new tokens; without a tape plain causal attention, keeping keys and values."""
    layer, tape, count = module.layer_idx, STATE.get("tape"), q.shape[2]
    if tape is None:
        STATE["k"].append(k.float())
        STATE["v"].append(v.float())
        grouped = q.float().reshape(q.shape[0], k.shape[1], -1, q.shape[-1])
        STATE["w"].append(grouped.transpose(-1, -2) @ grouped / grouped.shape[2])
        o = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return o.transpose(1, 2).contiguous(), None
    end = tape.length + count
    tape.k[layer, ..., tape.length : end, :], tape.v[layer, ..., tape.length : end, :] = k, v
    seen = torch.ones(count, end, dtype=torch.bool, device=q.device).tril(tape.length)
    keys, values = tape.k[layer, ..., :end, :], tape.v[layer, ..., :end, :]
    o = torch.nn.functional.scaled_dot_product_attention(q, keys, values, attn_mask=seen, enable_gqa=True)
    return o.transpose(1, 2).contiguous(), None


@dataclass
class Texts:
    """Exact prefixes and the exact model's predictions behind them; ``bases``: of values, by kind."""

    ids: Tensor
    prefix: int
    k: Tensor
    v: Tensor
    w: Tensor
    bases: dict[int, Tensor]
    logp: list[Tensor]


def run(loaded: LoadedModel, texts: Texts, variant: Variant | None) -> list[Tensor]:
    """Log probabilities ``[B, 64, V]`` of every chunk behind the prefix; of a variant KL and top-1, ``[B, 64, 2]``."""
    order = torch.tensor(loaded.rope.channel_order(), device=texts.k.device)
    basis = None if variant is None else texts.bases.get(int(variant.get("vo", 0)))
    tape = STATE["tape"] = Tape(texts.k, texts.v, texts.ids.shape[1] - texts.prefix)
    out = []
    for start in range(texts.prefix, texts.ids.shape[1], PAGE):
        if variant is not None:
            tape.seal(variant, order, texts.w, basis)
        ids = texts.ids[:, start : start + PAGE]
        positions = torch.arange(start, start + PAGE, device=ids.device)[None]
        logits = loaded.model(ids, position_ids=positions, use_cache=False).logits
        tape.length += PAGE
        out.append(logits.float().log_softmax(-1))
        if variant is not None:
            p = texts.logp[len(out) - 1]
            top = (p.argmax(-1) == out[-1].argmax(-1)).float()
            out[-1] = torch.stack(((p.exp() * (p - out[-1])).sum(-1), top), -1)
    STATE["tape"] = None
    return out


def prepare(loaded: LoadedModel, count: int, prefix: int, scored: int) -> Texts:
    """Spread ``count`` texts and one to calibrate on over the essays, read their prefixes and predict behind them."""
    all_ids = torch.tensor(token_ids(loaded.tokenizer, essays()))
    stride = (len(all_ids) - prefix - scored) // count
    ids = torch.stack([all_ids[i * stride : i * stride + prefix + scored] for i in range(count + 1)])
    ids, rows = ids.to(loaded.model.device), []
    for row in ids:
        STATE.update(k=[], v=[], w=[], tape=None)
        with torch.autocast("cpu", dtype=torch.bfloat16):  # on a GPU float32 is fast enough
            loaded.model.base_model(row[None, :prefix], use_cache=False)
        rows.append([torch.stack(STATE[name]) for name in "kvw"])
    k, v, w = (torch.cat(parts, 1) for parts in zip(*rows, strict=True))
    bases = {kind: value_basis(v[:, -1], kind) for kind in (1, 2)}
    texts = Texts(ids[:-1], prefix, k[:, :-1], v[:, :-1], w[:, :-1], bases, [])
    texts.logp = run(loaded, texts, None)
    return texts


@torch.no_grad()
def main() -> None:
    """Measure the variants of the command line, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("variants", nargs="+")
    parser.add_argument("--texts", type=int, default=8)
    parser.add_argument("--prefix", type=int, default=SINKS + 16 * PAGE)
    parser.add_argument("--scored", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    if args.scored < PAGE or args.scored % PAGE or args.prefix < SINKS or (args.prefix - SINKS) % PAGE:
        parser.error(
            f"expected a --prefix of {SINKS} tokens and whole pages of {PAGE}, and --scored of whole pages, found "
            f"{args.prefix} and {args.scored}"
        )
    loaded = load_model(args.model, device=args.device, num_threads=args.threads)
    refuse_sliding_windows(loaded.sliding_windows, loaded.name, "this search")
    AttentionInterface.register("search", attention)
    AttentionMaskInterface.register("search", flash_attention_mask)
    loaded.model.set_attn_implementation("search")
    start_s = time.monotonic()
    texts = prepare(loaded, args.texts, args.prefix, args.scored)
    print(f"exact model: {time.monotonic() - start_s:.0f} s", flush=True)
    for name in args.variants:
        start_s, variant = time.monotonic(), Variant.parse(name)
        found = torch.cat(run(loaded, texts, variant), 1)
        per_text = found[..., 0].mean(1)
        line = {
            "model": loaded.name,
            "variant": name,
            "kl": float(per_text.mean()),
            "top1": float(found[..., 1].mean()),
            "tokens": found[..., 0].numel(),
            "prefix": args.prefix,
            "bits_32k_d128": variant.bits_per_element(128, 32768),
            "bits_32k": variant.bits_per_element(loaded.head_dim, 32768),
            "kl_per_text": per_text.tolist(),
            "seconds": time.monotonic() - start_s,
        }
        with args.json.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print({**line, "kl_per_text": [round(x, 4) for x in line["kl_per_text"]]}, flush=True)


if __name__ == "__main__":
    main()
