"""One small model's numbers, and random layers of it."""

import random

import msgspec
from hypothesis import settings

from homkv.transport.assemble import SequencePlan
from homkv.transport.keys import KeyPair, Security, TrustStore
from homkv.transport.wire import Expectation

EXPECT = Expectation(
    format="balanced",
    layout_id="rows-1",
    model="ab" * 16,
    num_layers=3,
    num_kv_heads=2,
    head_dim=8,
    page_bytes=192,
    exact_dtype="float16",
)


no_deadline = settings(deadline=None)  # a busy machine is not a failure


class Finish(msgspec.Struct, tag=True, frozen=True):
    first_token: int


class Hello(msgspec.Struct, tag=True, frozen=True):
    name: str


Messages = Finish | Hello


def plan(num_pages: int = 5, num_exact: int = 6, **changes: object) -> SequencePlan:
    fields = {"expect": EXPECT, "sequence": "r1", "epoch": 7, "num_tokens": 64 * num_pages + num_exact}
    return SequencePlan(**(fields | changes), num_pages=num_pages, num_exact=num_exact)


def layer_bytes(p: SequencePlan, layer: int) -> tuple[list[bytes], bytes]:
    """Exact K, exact V and pages that no other layer has."""
    rng = random.Random(layer)
    return [rng.randbytes(p.exact_bytes) for _ in range(2)], rng.randbytes(p.num_pages * p.page_row_bytes(layer))


def secured() -> tuple[Security, Security, str]:
    """Security of a listener and of a peer that it trusts, and the listener's public key."""
    server, client = KeyPair.generate(), KeyPair.generate()
    return Security(server, TrustStore([client.public])), Security(client), server.public
