"""Tokens become text, as they come; stop strings end it and are never shown, not even in part."""

from typing import Any

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase

from homkv.errors import UnsupportedError


def backend_of(tokenizer: PreTrainedTokenizerBase) -> Any:
    """The tokenizer's fast half. Raises UnsupportedError if it has none."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UnsupportedError(
            f"expected a tokenizer with a tokenizer.json, found a {type(tokenizer).__name__}; save it as a fast one"
        )
    return backend


class TextStream:
    """One answer's text. ``is_stopped``: a stop string was met; nothing behind it is shown."""

    def __init__(self, backend: Any, stops: list[str]) -> None:
        self._backend, self._stops = backend, stops
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._held = ""  # could be the beginning of a stop string
        self.is_stopped = False

    def push(self, token: int) -> str:
        """Take a token; returns the text that is now certain."""
        self._held += self._step(token)
        if not self._stops:
            return self._release(len(self._held))
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.is_stopped, self._held = True, self._held[: min(found)]
            return self._release(len(self._held))
        return self._release(len(self._held) - self._longest_beginning())

    def _step(self, token: int) -> str:
        """What a token adds. tokenizers gives up where bytes that were no character become one with the next byte."""
        try:
            return self._decoder.step(self._backend, token) or ""
        except Exception as error:  # it has no class of its own
            if not str(error).startswith("Invalid prefix"):
                raise
            self._decoder = DecodeStream(skip_special_tokens=True)  # text goes on with this token, alone
            return self._decoder.step(self._backend, token) or ""

    def flush(self) -> str:
        """The answer is over: what was held back was no stop string."""
        return self._release(len(self._held))

    def _release(self, count: int) -> str:
        text, self._held = self._held[:count], self._held[count:]
        return text

    def _longest_beginning(self) -> int:
        """Characters at the end of the held text with which a stop string could begin."""
        longest = max(map(len, self._stops)) - 1
        for size in range(min(longest, len(self._held)), 0, -1):
            end = self._held[-size:]
            if any(stop.startswith(end) for stop in self._stops):
                return size
        return 0
