"""Which message is passing: read on links without keys, told from length and place on encrypted ones."""

from typing import Protocol

import msgspec

from homkv.testing.faults import Where
from homkv.transport.endpoint import FRAME, MESSAGE, MESSAGE_DIGEST_BYTES, PROBE, RECEIPT


class Names(Protocol):
    """Names what passes on one connection; ``to_listener``: its direction."""

    def name(self, to_listener: bool, parts: list[bytes]) -> str:
        """The name by which a fault aims at a message; others for what no fault aims at."""


class _Tagged(msgspec.Struct):
    """What every control message begins with."""

    type: str


_tags = msgspec.msgpack.Decoder(_Tagged)


class PlainNames:
    """Without keys a message is what it says."""

    def __init__(self) -> None:
        self._has_frames = False

    def name(self, to_listener: bool, parts: list[bytes]) -> str:
        """See Names."""
        kind = parts[0] if parts else b""
        if kind == FRAME:
            self._has_frames = True
            return "frame"
        if kind == RECEIPT:
            return "frame-receipt" if self._has_frames else "receipt"
        if kind == MESSAGE:
            try:
                return _tags.decode(memoryview(parts[-1])[:-MESSAGE_DIGEST_BYTES]).type
            except msgspec.MsgspecError:
                return "unknown"
        return "probe" if kind == PROBE else "unknown"


SEAL_BYTES = 33  # that CURVE adds to each part: "\7MESSAGE", nonce 8, authenticator 16, flags 1
_ANY = 1 << 62
# (body bytes up to which a message has this name, name), by instance and by direction.
_TO: dict[Where, list[tuple[int, str]]] = {
    "prefill": [(45, "AskStatus"), (59, "Cancel"), (_ANY, "Prefill")],
    "decode": [(45, "AskStatus"), (59, "Cancel"), (200, "Renew"), (_ANY, "Reserve")],
}
_FROM: dict[Where, list[tuple[int, str]]] = {
    "prefill": [(60, "receipt"), (90, "Progress"), (280, "Failed"), (306, "PrefillDone"), (_ANY, "Status")],
    "decode": [
        (60, "receipt"),
        (130, "Ticket"),
        (160, "Failed"),
        (190, "Done"),
        (290, "Failed"),
        (850, "Status"),  # grows with what it has counted
        (_ANY, "Token"),
    ],
}
_FRAME_HEAD = range(150, 300)  # bytes: more than a Finish, less than a Reserve


class SealedNames:
    """With keys nobody on the path can read a message, but its length and place tell enough to aim at it.

    Each part of a message is sealed for itself. The first has one byte; towards the listener a number of 8 bytes
    follows; then comes the body, which gets the name. The bounds hold for prompts of 100 tokens and more whose tokens
    come with logits or evidence.
    """

    def __init__(self, where: Where) -> None:
        self._where: Where = where
        self._has_frames = self._in_frame = False
        self._place = {True: 0, False: 0}  # of the next part in its message, by direction

    def name(self, to_listener: bool, parts: list[bytes]) -> str:
        """See Names. ``parts`` is one sealed part."""
        size = len(parts[0]) - SEAL_BYTES
        place = 0 if size == 1 else self._place[to_listener]
        self._place[to_listener] = place + 1
        if place < 1 + to_listener:
            return "sealed"  # the beginning of a message
        if to_listener and self._where == "decode":
            return self._to_decode(size, place)
        return "frame-receipt" if self._has_frames else _lookup((_TO if to_listener else _FROM)[self._where], size)

    def _to_decode(self, size: int, place: int) -> str:
        if place == 2:
            self._in_frame = size in _FRAME_HEAD
            self._has_frames |= self._in_frame
        if self._in_frame:
            return "frame"
        return "Finish" if self._has_frames else _lookup(_TO["decode"], size)


def _lookup(bounds: list[tuple[int, str]], size: int) -> str:
    return next(name for bound, name in bounds if size <= bound)
