"""Requests of whole services and hand-fed ones, told apart by every byte that they leave."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from serve_cases import OPEN, OPTIONS, PATIENCE_S, Asked, Pair, RawRequest, prompt

from homkv.seal import LayerContent
from homkv.serve.dispatch import Dispatcher
from homkv.serve.engine import PagedEngine
from homkv.serve.fleet import Address
from homkv.serve.messages import Evidence
from homkv.serve.query import DispatchOptions, Policy, Query
from homkv.transport.sender import FrameSender

QUERY = Query(prompt(150, seed=70), "balanced", 6, return_evidence=True)


@contextmanager
def dispatching(
    pair: Pair, decode_endpoint: str | None = None, prefill_endpoint: str | None = None, policy: Policy = "fail"
) -> Iterator[Dispatcher]:
    prefill, decode = pair.prefill.address, pair.decode.address
    prefill, decode = (
        Address(prefill_endpoint or prefill.endpoint, None),
        Address(decode_endpoint or decode.endpoint, None),
    )
    with Dispatcher([prefill], [decode], OPEN, limits=DispatchOptions(policy), options=OPTIONS) as made:
        yield made


def answer(pair: Pair, query: Query = QUERY) -> tuple[list[int], Evidence | None]:
    with dispatching(pair) as dispatcher:
        asked = Asked(dispatcher, query)
        assert asked.end().error is None
    return asked.answer


class Kept(RawRequest):
    """A request that remembers what it sent, to compare it with what is held."""

    def feed(self, sender: FrameSender, layer: int) -> None:
        plan = self.plan
        shape = (1, plan.num_exact, self.codec.head_dim)
        torch.manual_seed(1000 * len(self.request_id) + layer)
        pages = torch.randint(0, 256, (plan.num_pages, 1, self.codec.page_bytes), dtype=torch.uint8)
        content = LayerContent(plan.num_tokens, pages, *(torch.randn(shape).half() for _ in "kv"))
        exact = [x.contiguous().view(torch.uint8).numpy().tobytes() for x in (content.exact_k, content.exact_v)]
        sender.send(layer, exact, pages.numpy().tobytes())
        self.__dict__.setdefault("sent", {})[layer] = content

    def assert_held(self) -> None:
        """Every byte that was sent is held, and nothing else."""
        request = self.pair.decoder._rooms._given[self.request_id]
        engine, seq = request.engine, request.seq
        assert isinstance(engine, PagedEngine)
        for layer, content in self.__dict__["sent"].items():
            held = engine.cache.export_layer(layer, seq)
            assert torch.equal(held.pages, content.pages)
            assert torch.equal(held.exact_k, content.exact_k)
            assert torch.equal(held.exact_v, content.exact_v)


def fill(request: Kept) -> None:
    with request.sender() as sender:
        for layer in range(2):
            request.feed(sender, layer)
        sender.finish(PATIENCE_S)
