"""One request from the event loop's side: a stream of pieces that cancels the request when nobody listens any more."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Literal

from homkv.serve.dispatch import Dispatcher
from homkv.serve.gateway.text import TextStream
from homkv.serve.lifecycle import Record
from homkv.serve.messages import Choice, Progress, Token
from homkv.serve.query import Ended, Query

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Piece:
    """Some text, the tokens behind it, and at the end why it ended."""

    text: str
    choices: list[Choice] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    record: Record | None = None  # with the last piece


async def generate(
    dispatcher: Dispatcher, query: Query, text: TextStream, request_id: str, queue: "asyncio.Queue[Token | Ended]"
) -> AsyncIterator[Piece]:
    """Yield the answer of a request that was submitted. Raises the error that ended it.

    Closing the iterator early, as a disconnected client does, cancels the request.
    """
    has_ended, num_tokens = False, 0
    try:
        while True:
            event = await queue.get()
            if isinstance(event, Ended):
                has_ended = True
                if event.error is not None:
                    raise event.error
                yield Piece("" if text.is_stopped else text.flush(), [], event.reason or "stop", event.record)
                return
            num_tokens += 1
            if not text.is_stopped:  # else the tail that was under way when the request was finished
                shown = text.push(event.choice.token)
                if text.is_stopped:
                    dispatcher.finish(request_id)
                yield Piece(shown, [event.choice])
    finally:
        if not has_ended:
            dispatcher.cancel(request_id, "cancelled: its client has left")


def submit(dispatcher: Dispatcher, query: Query, request_id: str) -> "asyncio.Queue[Token | Ended]":
    """Hand a request in; its events arrive in the returned queue. Raises CapacityError."""
    loop, queue = asyncio.get_running_loop(), asyncio.Queue[Token | Ended]()

    def sink(event: Progress | Token | Ended) -> None:
        if not isinstance(event, Progress):
            with contextlib.suppress(RuntimeError):  # the loop was closed, at any moment: nobody listens any more
                loop.call_soon_threadsafe(queue.put_nowait, event)

    dispatcher.submit(query, sink, request_id)
    return queue
