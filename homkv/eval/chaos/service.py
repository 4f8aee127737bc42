"""A small service in threads, with a faulty link in front of each instance."""

import copy
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Self

import msgspec
import xxhash
from torch import Tensor, uint8

from homkv.errors import TransferError
from homkv.models import LoadedModel
from homkv.serve.decode import DecodeInstance
from homkv.serve.dispatch import Dispatcher
from homkv.serve.engine import PagedEngine
from homkv.serve.fleet import Address
from homkv.serve.links import SERVING
from homkv.serve.messages import Cancel, FromDecode, Reserve, Ticket
from homkv.serve.prefill import PrefillInstance
from homkv.serve.query import DispatchOptions, Policy
from homkv.testing.faults import Where
from homkv.testing.models import random_ids
from homkv.testing.proxy import FaultyLink
from homkv.transport.keys import Security
from homkv.transport.link import Peer

KV_CACHE_DTYPE = "balanced"
OPEN = Security(insecure=True)  # what is encrypted cannot be harmed message by message
OPTIONS = replace(SERVING, peer_timeout_s=1.5, ack_timeout_s=2.0, linger_s=0.2)
ANYWHERE = "tcp://127.0.0.1:0"
MAX_TOKENS, LEASE_S, MAX_LEASE_S = 1792, 1.0, 6.0
REQUEST_TIMEOUT_S = 6.0
LINK_GBPS = 0.0006  # a layer takes a third of a second: faults find transfers under way
PromptKey = tuple[bytes, int]  # key of the last full page, and the number of tokens


@dataclass
class Clock:
    """The lease clock of a decode instance, which can jump."""

    offset_s: float = 0.0

    def __call__(self) -> float:
        """Seconds."""
        return time.monotonic() + self.offset_s


@dataclass
class Digests:
    """Digest of the KV that decode instances held when a prompt was complete, by prompt."""

    seen: list[tuple[PromptKey, str]] = field(default_factory=list)

    def watch(self, instance: DecodeInstance) -> None:
        """Digest every prompt at the moment when it is complete, before its first token is told."""
        for engine in instance.engines.values():
            if isinstance(engine, PagedEngine):
                engine.publish = self._watching(engine, engine.publish)  # type: ignore[method-assign, assignment]

    def _watching(
        self, engine: PagedEngine, publish: "Callable[[int, list[bytes]], None]"
    ) -> "Callable[[int, list[bytes]], None]":
        def watched(seq: int, keys: list[bytes]) -> None:
            digest = xxhash.xxh3_128()
            for layer in range(engine.cache.num_layers):
                content = engine.cache.export_layer(layer, seq)
                for part in (content.pages, content.exact_k, content.exact_v):
                    digest.update(_bytes(part))
            self.seen.append(((keys[-1], engine.cache.num_tokens(seq)), digest.hexdigest()))
            publish(seq, keys)

        return watched


def _bytes(x: Tensor) -> bytes:
    data: bytes = x.contiguous().view(uint8).numpy().tobytes()
    return data


class Hosted:
    """An instance with its loop in a thread that can be stopped and let go on, as a process can."""

    def __init__(self, instance: DecodeInstance | PrefillInstance) -> None:
        self.instance = instance
        self.error: BaseException | None = None
        self._goes_on, self._stop = threading.Event(), threading.Event()
        self._goes_on.set()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                self._goes_on.wait()
                self.instance.turn(idle_s=0.05)
        except BaseException as error:  # nothing that a peer does may end the loop: the judge must know
            self.error = error

    def pause(self) -> None:
        """Stop between two turns."""
        self._goes_on.clear()

    def resume(self) -> None:
        """Go on."""
        self._goes_on.set()

    def close(self) -> None:
        """End the loop and close the instance."""
        self._stop.set()
        self.resume()
        self._thread.join()
        self.instance.close()


class Cell:
    """One prefill and one decode instance behind faulty links, and a dispatcher. A context manager."""

    def __init__(self, loaded: LoadedModel, policy: Policy = "fail", link_gbps: float | None = LINK_GBPS) -> None:
        self._loaded, self._link_gbps = loaded, link_gbps
        self.clock, self.digests = Clock(), Digests()
        self.hosted: dict[Where, Hosted] = {"prefill": self._start("prefill"), "decode": self._start("decode")}
        self.num_free = self.free_blocks
        self.links: dict[Where, FaultyLink] = {
            where: FaultyLink(hosted.instance.listener.endpoint) for where, hosted in self.hosted.items()
        }
        limits = DispatchOptions(policy, request_timeout_s=REQUEST_TIMEOUT_S, no_instance_timeout_s=4.0)
        prefill, decode = ([Address(self.links[where].endpoint, None)] for where in ("prefill", "decode"))
        self.dispatcher = Dispatcher(prefill, decode, OPEN, limits=limits, options=OPTIONS)

    def _start(self, where: Where) -> Hosted:
        model = copy.deepcopy(self._loaded.model)
        loaded = LoadedModel(**{**vars(self._loaded), "model": model})
        if where == "prefill":
            # Without kept prefixes: those are rounded to 16 bits, so that last bits would depend on what came before.
            return Hosted(
                PrefillInstance(
                    loaded, ANYWHERE, OPEN, prefix_bytes=0, chunk_tokens=128, link_gbps=self._link_gbps, options=OPTIONS
                )
            )
        decode = DecodeInstance(
            loaded,
            [KV_CACHE_DTYPE],
            ANYWHERE,
            OPEN,
            max_tokens=MAX_TOKENS,
            lease_s=LEASE_S,
            max_lease_s=MAX_LEASE_S,
            options=OPTIONS,
            clock=self.clock,
        )
        self.digests.watch(decode)
        return Hosted(decode)

    # -- what is held ------------------------------------------------------------------------------------------

    @property
    def decoder(self) -> DecodeInstance:
        """The decode instance of now."""
        instance = self.hosted["decode"].instance
        assert isinstance(instance, DecodeInstance)
        return instance

    @property
    def free_blocks(self) -> int:
        """Blocks of the pool that a request could have."""
        return sum(engine.num_free_blocks for engine in self.decoder.engines.values())

    @property
    def is_empty(self) -> bool:
        """Whether no request is left anywhere and every block is free."""
        idle = not any(hosted.instance.num_requests for hosted in self.hosted.values())
        loads = any(member.load for member in self.dispatcher.members)
        return idle and not loads and self.dispatcher.num_accepted == 0 and self.free_blocks == self.num_free

    def check(self) -> None:
        """Raise HomkvError unless books and stored bytes are intact, and what ended a loop."""
        for hosted in self.hosted.values():
            if hosted.error is not None:
                raise hosted.error
        for engine in self.decoder.engines.values():
            engine.check()

    @property
    def is_connected(self) -> bool:
        """Whether the dispatcher has heard of both instances."""
        return self.dispatcher.is_running and all(member.status is not None for member in self.dispatcher.members)

    # -- faults of processes -----------------------------------------------------------------------------------

    def kill(self, where: Where) -> None:
        """All connections of an instance end without a word, and nobody can reach it."""
        self.links[where].retarget(None)
        self.links[where].sever()

    def revive(self, where: Where) -> None:
        """Another process in the place of one that was killed: it knows nothing of before."""
        self.hosted[where].close()
        self.hosted[where] = self._start(where)
        self.links[where].retarget(self.hosted[where].instance.listener.endpoint)

    def fill_pool(self) -> Peer:
        """Reserve all room for somebody who sends nothing. Close what is returned, after :meth:`empty_pool`."""
        hog = Peer(self.decoder.listener.endpoint, FromDecode, OPEN, None, OPTIONS)
        hog.send(Reserve("hog", KV_CACHE_DTYPE, random_ids(MAX_TOKENS - 8, seed=1), 8))
        said: msgspec.Struct = hog.recv(2.0)
        if not isinstance(said, Ticket):
            raise TransferError(f"expected a ticket for all room, found {said}")
        return hog

    def empty_pool(self, hog: Peer) -> None:
        """Give back what :meth:`fill_pool` took."""
        hog.send(Cancel("hog"))
        hog.recv(2.0)
        hog.close()

    def close(self) -> None:
        """End everything."""
        self.dispatcher.close()
        for link in self.links.values():
            link.close()
        for hosted in self.hosted.values():
            hosted.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
