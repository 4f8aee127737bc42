"""From a computed layer to the link, in the background: pack, convert, send, in order."""

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor

from homkv.formats import PageCodec
from homkv.seal import LayerContent, seal, to_exact
from homkv.serve.convert import EXACT_DTYPE, convert, dense
from homkv.serve.kept import KeptPage, restore
from homkv.serve.messages import Finish
from homkv.transport.sender import FrameSender, FrameTiming


@dataclass
class LayerPipe:
    """One prompt's way out. Owns the sender: closes it first.

    ``source``: the format in which the prompt is kept here; ``target``: the one on the wire, whose first
    ``first_page`` pages the receiver has; ``kept``: pages that were restored instead of computed. ``overlap``: a layer
    leaves while the next ones are computed; else all wait for the last.
    """

    source: PageCodec
    target: PageCodec
    num_layers: int
    sender: FrameSender
    first_page: int = 0
    kept: Sequence[KeptPage] = ()
    probe_layer: int | None = None  # whose reconstruction error is measured
    overlap: bool = True
    _held: list[tuple[int, Tensor, Tensor]] = field(default_factory=list)
    _worker: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="pack"))
    _jobs: "list[Future[tuple[LayerContent, LayerContent]]]" = field(default_factory=list)
    _last: Finish | None = None
    _is_posted: bool = False
    busy_s: float = 0.0
    packed_s: float = 0.0
    error: float | None = None  # |x - dense(x)| / |x| over the probed layer

    def put(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Pack and send one layer ``k v [G, T, D]``; returns at once. Raises what an earlier layer failed with."""
        self._raise_early()
        if self.overlap:
            self._jobs.append(self._worker.submit(self._pack, layer, k, v))
        else:
            self._held.append((layer, k, v))

    def _pack(self, layer: int, k: Tensor, v: Tensor) -> tuple[LayerContent, LayerContent]:
        start_s = time.monotonic()
        ours = self._in_source(layer, k, v)
        theirs = convert(ours, self.source, self.target.at_layer(layer, self.num_layers), self.first_page)
        exact = theirs.exact_k.contiguous(), theirs.exact_v.contiguous()
        theirs = LayerContent(theirs.num_tokens, theirs.pages.contiguous(), *exact)
        self.packed_s = time.monotonic()
        self.busy_s += self.packed_s - start_s
        views = [x.view(torch.uint8).numpy().data for x in exact]
        self.sender.send(layer, views, theirs.pages.numpy().data)
        if layer == self.probe_layer and not self.first_page and theirs.pages.shape[0]:
            self.error = _relative_error(self.target.at_layer(layer, self.num_layers), theirs, k, v)
        return ours, theirs  # kept by the future: the sender's buffers must live until it is done

    def _in_source(self, layer: int, k: Tensor, v: Tensor) -> LayerContent:
        """The layer as it is kept here; restored pages are taken as they are, never quantized again."""
        codec, count = self.source, len(self.kept)
        k, v = to_exact(k, EXACT_DTYPE, "keys"), to_exact(v, EXACT_DTYPE, "values")
        if not count:
            return seal(codec, k, v, 0)
        sinks, behind = codec.num_sinks, codec.num_sinks + count * codec.page_tokens
        k, v = (torch.cat((x[:, :sinks], x[:, behind:]), 1) for x in (k, v))
        new = seal(codec, k, v, count)
        pages = torch.cat((restore(codec, self.kept, layer).pages, new.pages))
        return LayerContent(new.num_tokens, pages, new.exact_k, new.exact_v)

    def finish(self, last: Finish) -> None:
        """Every layer was put: send ``last`` behind them. Then call :meth:`poll` until it returns the times."""
        self._last = last
        self._jobs += [self._worker.submit(self._pack, *layer) for layer in self._held]
        self._held.clear()

    def poll(self) -> tuple[FrameTiming, ...] | None:
        """The frames' times if every layer was packed, sent and used; None if not yet. Raises what went wrong."""
        self._raise_early()
        assert self._last is not None
        if not all(job.done() for job in self._jobs):
            return None
        if not self._is_posted:
            self._is_posted = True
            self.sender.post(self._last)
        return self.sender.timings()

    def layers(self) -> list[LayerContent]:
        """The prompt as it is kept here, when :meth:`poll` has said that all is done."""
        return [job.result()[0] for job in self._jobs]

    def _raise_early(self) -> None:
        for job in self._jobs:
            if job.done():
                job.result()

    def close(self) -> None:
        """Drop layers that have not left. A layer that waits for room in the sender's queue is dropped as well."""
        try:
            self.sender.close()
        finally:
            self._worker.shutdown(cancel_futures=True)


def _relative_error(codec: PageCodec, content: LayerContent, k: Tensor, v: Tensor) -> float:
    """``|x - dense(x)| / |x|`` over keys and values of one layer."""
    found = torch.stack(dense(content, codec)).double()
    exact = torch.stack((k, v)).double()
    return float((found - exact).norm() / exact.norm().clamp_min(1e-30))
