"""Instances in threads of this process: quick to start, every message readable, every book open."""

import copy
import threading
import time
from dataclasses import dataclass, replace

from homkv.eval.chaos.service import KV_CACHE_DTYPE, MAX_TOKENS, Cell, Subject
from homkv.serve.decode import DecodeInstance
from homkv.serve.fleet import Address
from homkv.serve.prefill import PrefillInstance
from homkv.serve.query import Policy
from homkv.testing.faults import Where
from homkv.transport.keys import KeyPair, Security, TrustStore

ANYWHERE = "tcp://127.0.0.1:0"


@dataclass
class Clock:
    """The lease clock of a decode instance, which can jump."""

    offset_s: float = 0.0

    def __call__(self) -> float:
        """Seconds."""
        return time.monotonic() + self.offset_s


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


class ThreadCell(Cell):
    """``with_keys``: CURVE on every link, as `homkv serve` has it; without, faults reach what the keys would shield."""

    def __init__(
        self, subject: Subject, policy: Policy = "fail", *, with_keys: bool = False, is_slow: bool = True
    ) -> None:
        self._subject, self._link_gbps = subject, subject.link_gbps if is_slow else None
        self._keys = {name: KeyPair.generate() for name in ("client", "prefill", "decode")} if with_keys else {}
        self.clock = Clock()
        self.hosted: dict[Where, Hosted] = {"prefill": self._start("prefill"), "decode": self._start("decode")}
        reached = {where: self._address(where) for where in self.hosted}
        super().__init__(subject, reached, self._security_of("client"), policy)

    def _security_of(self, name: str) -> Security:
        if not self._keys:
            return Security(insecure=True)
        trusted = {"prefill": ("client",), "decode": ("client", "prefill"), "client": ()}[name]
        return Security(self._keys[name], TrustStore(self._keys[other].public for other in trusted))

    def _address(self, where: Where) -> Address:
        endpoint = self.hosted[where].instance.listener.endpoint
        return Address(endpoint, self._keys[where].public if self._keys else None)

    def _start(self, where: Where) -> Hosted:
        subject, security = self._subject, self._security_of(where)
        loaded = replace(subject.loaded, model=copy.deepcopy(subject.loaded.model))
        if where == "prefill":
            # Without kept prefixes: those are rounded to 16 bits, so that last bits would depend on what came before.
            return Hosted(
                PrefillInstance(
                    loaded,
                    ANYWHERE,
                    security,
                    prefix_bytes=0,
                    chunk_tokens=128,
                    link_gbps=self._link_gbps,
                    options=subject.options,
                )
            )
        return Hosted(
            DecodeInstance(
                loaded,
                [KV_CACHE_DTYPE],
                ANYWHERE,
                security,
                max_tokens=MAX_TOKENS,
                lease_s=subject.lease_s,
                max_lease_s=subject.request_timeout_s,
                options=subject.options,
                clock=self.clock,
            )
        )

    def check(self) -> None:
        """See Cell.check: books and stored bytes of every engine, and what ended a loop."""
        for hosted in self.hosted.values():
            if hosted.error is not None:
                raise hosted.error
        instance = self.hosted["decode"].instance
        assert isinstance(instance, DecodeInstance)
        for engine in instance.engines.values():
            engine.check()

    def kill(self, where: Where) -> None:
        """All connections of an instance end, and nobody can reach it."""
        self.links[where].retarget(None)
        self.links[where].sever()

    def revive(self, where: Where) -> None:
        """See Cell.revive."""
        self.hosted[where].close()
        self.hosted[where] = self._start(where)
        self._reached[where] = self._address(where)
        self.links[where].retarget(self._reached[where].endpoint)

    def pause(self, where: Where) -> None:
        """See Cell.pause. Its sockets go on, as those of a process that is stuck in a computation."""
        self.hosted[where].pause()

    def resume(self, where: Where) -> None:
        """See Cell.resume."""
        self.hosted[where].resume()

    def jump(self, seconds: float) -> None:
        """See Cell.jump."""
        self.clock.offset_s += seconds

    def close(self) -> None:
        """End everything."""
        super().close()
        for hosted in self.hosted.values():
            hosted.close()
