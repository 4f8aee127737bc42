"""What stands before the routes: the API key, the size of bodies, and errors in OpenAI's shape."""

import hmac
from collections.abc import Mapping
from typing import Any

from fastapi import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from homkv.errors import CapacityError, FormatError, HomkvError, ShapeError, TransferError, UnsupportedError
from homkv.serve.logs import get_logger
from homkv.serve.metrics import Metrics

log = get_logger(__name__)

OPEN_PATHS = frozenset({"/health", "/"})  # the page at / is empty: its data is behind the key


def error_body(message: str, kind: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """OpenAI's error object."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def report(error: Exception, request_id: str | None) -> tuple[int, dict[str, Any]]:
    """HTTP status and body of an error that ended a request; a 500 is logged with its traceback."""
    status, body = describe(error)
    if status == 500:
        log.error("answers 500", request_id=request_id, error=type(error).__name__, exc_info=error)
    return status, body


def describe(error: Exception) -> tuple[int, dict[str, Any]]:
    """HTTP status and body of an error that ended a request. What is not ours is a bug, whose text nobody is told."""
    if not isinstance(error, HomkvError):
        bug = "expected an answer, found a bug in the gateway; its log has the traceback under this request's id"
        return 500, error_body(bug, "internal_error")
    text = str(error)
    if isinstance(error, CapacityError):
        return 429, error_body(text, "rate_limit_error", "overloaded")
    if isinstance(error, ShapeError | UnsupportedError):
        return 400, error_body(text, "invalid_request_error")
    if isinstance(error, TransferError):
        return 503, error_body(text, "service_unavailable_error", "instance_failed")
    kind = "format_error" if isinstance(error, FormatError) else "internal_error"
    return 500, error_body(text, kind)


def request_headers(state: Mapping[str, Any]) -> dict[str, str]:
    """The header that names a request, if it got as far as having an id."""
    return {"x-request-id": state["request_id"]} if "request_id" in state else {}


class Guard:
    """Refuses requests without the API key and bodies above a limit, before anything is read of them."""

    def __init__(self, app: ASGIApp, api_key: str | None, max_body_bytes: int, metrics: Metrics) -> None:
        self._app, self._api_key, self._max_body_bytes, self._metrics = app, api_key, max_body_bytes, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        if scope["path"] not in OPEN_PATHS and not self._is_authorized(headers.get(b"authorization", b"")):
            self._metrics.refused("unauthorized")
            text = "expected a valid API key, found another or none; send Authorization: Bearer KEY"
            body = error_body(text, "authentication_error", "invalid_api_key")
            await JSONResponse(body, 401)(scope, receive, send)
            return
        declared = headers.get(b"content-length", b"0")
        if not declared.isdigit() or int(declared) > self._max_body_bytes:
            self._metrics.refused("body_too_large")
            refusal = error_body(self._too_large_text, "invalid_request_error", "body_too_large")
            await JSONResponse(refusal, 413)(scope, receive, send)
            return
        await self._limited(scope, receive, send)

    def _is_authorized(self, header: bytes) -> bool:
        if self._api_key is None:
            return True
        return hmac.compare_digest(header, b"Bearer " + self._api_key.encode())

    async def _limited(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Count what a body that declares no length brings; cut it off at the limit. A bug's answer is JSON as well."""
        seen, has_begun = 0, False

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._max_body_bytes:
                self._metrics.refused("body_too_large")
                raise HTTPException(413, self._too_large_text)
            return message

        async def watched(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        state = scope.setdefault("state", {})  # where the routes leave the request's id
        try:
            await self._app(scope, counted, watched)
        except Exception as error:
            status, body = report(error, state.get("request_id"))
            if has_begun:
                raise  # the server ends the connection
            await JSONResponse(body, status, request_headers(state))(scope, receive, send)

    @property
    def _too_large_text(self) -> str:
        return f"expected a body of at most {self._max_body_bytes} bytes, found more; shorten the prompt"
