"""Pieces of an answer in OpenAI's shapes: objects for whole answers, chunks for streams."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from homkv.serve.gateway.generate import Piece
from homkv.serve.lifecycle import Record
from homkv.serve.messages import Choice


def usage(record: Record) -> dict[str, Any]:
    """Token counts. ``cached_tokens``: of the prompt, restored by the prefill instance instead of computed."""
    return {
        "prompt_tokens": record.num_prompt_tokens,
        "completion_tokens": record.num_tokens,
        "total_tokens": record.num_prompt_tokens + record.num_tokens,
        "prompt_tokens_details": {"cached_tokens": record.num_cached_tokens},
    }


@dataclass
class Shape:
    """How one endpoint writes answers. ``token_text``: a single token as text, special ones included."""

    request_id: str
    model: str
    token_text: Callable[[int], str]
    wants_logprobs: bool
    created: int = field(default_factory=lambda: int(time.time()))
    kind: str = ""
    chunk_kind: str = ""

    def whole(self, pieces: list[Piece], counts: dict[str, Any]) -> dict[str, Any]:
        """The answer to a request without ``stream``."""
        text = "".join(piece.text for piece in pieces)
        tokens = [choice for piece in pieces for choice in piece.choices]
        choice = self.content(text) | {
            "index": 0,
            "finish_reason": pieces[-1].finish_reason,
            "logprobs": self.logprobs(tokens),
        }
        return self._object(self.kind, [choice]) | {"usage": counts}

    def chunk(self, piece: Piece) -> str:
        """One event of a stream."""
        body = self.delta(piece.text, piece.finish_reason is not None)
        choice = body | {
            "index": 0,
            "finish_reason": piece.finish_reason,
            "logprobs": self.logprobs(piece.choices) if piece.choices else None,
        }
        return json.dumps(self._object(self.chunk_kind, [choice]))

    def usage_chunk(self, counts: dict[str, Any]) -> str:
        """The last event of a stream that asked for it."""
        return json.dumps(self._object(self.chunk_kind, []) | {"usage": counts})

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.request_id, "object": kind, "created": self.created, "model": self.model, "choices": choices}

    def content(self, text: str) -> dict[str, Any]:
        """The text of a whole answer."""
        raise NotImplementedError

    def delta(self, text: str, is_last: bool) -> dict[str, Any]:
        """Some text of a stream."""
        raise NotImplementedError

    def logprobs(self, tokens: list[Choice]) -> dict[str, Any] | None:
        """Log probabilities of tokens, if they were asked for."""
        raise NotImplementedError


@dataclass
class CompletionShape(Shape):
    """/v1/completions."""

    kind: str = "text_completion"
    chunk_kind: str = "text_completion"
    _offset: int = 0

    def content(self, text: str) -> dict[str, Any]:
        """See Shape.content."""
        return {"text": text}

    def delta(self, text: str, is_last: bool) -> dict[str, Any]:
        """See Shape.delta."""
        return {"text": text}

    def logprobs(self, tokens: list[Choice]) -> dict[str, Any] | None:
        """See Shape.logprobs."""
        if not self.wants_logprobs:
            return None
        texts, offsets = [self.token_text(choice.token) for choice in tokens], []
        for text in texts:
            offsets.append(self._offset)
            self._offset += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [choice.logprob for choice in tokens],
            "top_logprobs": [{self.token_text(t): p for t, p in choice.top} for choice in tokens],
            "text_offset": offsets,
        }


@dataclass
class ChatShape(Shape):
    """/v1/chat/completions."""

    kind: str = "chat.completion"
    chunk_kind: str = "chat.completion.chunk"

    def content(self, text: str) -> dict[str, Any]:
        """See Shape.content."""
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def delta(self, text: str, is_last: bool) -> dict[str, Any]:
        """See Shape.delta."""
        return {"delta": {} if is_last and not text else {"content": text}}

    def first_chunk(self) -> str:
        """Who speaks: the first event of a stream."""
        choice = {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None, "logprobs": None}
        return json.dumps(self._object(self.chunk_kind, [choice]))

    def logprobs(self, tokens: list[Choice]) -> dict[str, Any] | None:
        """See Shape.logprobs."""
        if not self.wants_logprobs:
            return None
        return {"content": [self._token(c.token, c.logprob) | {"top_logprobs": self._top(c)} for c in tokens]}

    def _top(self, choice: Choice) -> list[dict[str, Any]]:
        return [self._token(token, logprob) for token, logprob in choice.top]

    def _token(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = self.token_text(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}
