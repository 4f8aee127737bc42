"""The application: OpenAI's routes, and how errors are answered."""

import asyncio
import contextlib
import json
import secrets
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from jinja2 import TemplateError
from sse_starlette.sse import EventSourceResponse, SendTimeoutError
from starlette.exceptions import HTTPException
from transformers import PreTrainedTokenizerBase

from homkv.errors import HomkvError, ShapeError, UnsupportedError
from homkv.serve.dispatch import Dispatcher
from homkv.serve.gateway.answers import ChatShape, CompletionShape, Shape, usage
from homkv.serve.gateway.generate import Piece, generate, submit
from homkv.serve.gateway.limits import Guard, error_body, report, request_headers
from homkv.serve.gateway.schema import ChatRequest, CompletionRequest
from homkv.serve.gateway.service import add_service_routes
from homkv.serve.gateway.text import TextStream, backend_of
from homkv.serve.logs import get_logger
from homkv.serve.messages import Sampling
from homkv.serve.metrics import Metrics
from homkv.serve.query import Query
from homkv.serve.settings import ServeSettings

log = get_logger(__name__)
DEFAULT_MAX_TOKENS = 16  # OpenAI's for completions
Ask = CompletionRequest | ChatRequest
Result = TypeVar("Result")


@dataclass
class Gateway:
    """What the routes need."""

    settings: ServeSettings
    tokenizer: PreTrainedTokenizerBase
    context_length: int
    dispatcher: Dispatcher
    metrics: Metrics

    def __post_init__(self) -> None:
        self.backend = backend_of(self.tokenizer)
        self.kv_cache_dtype = self.settings.kv_cache_dtype[0]
        self.metrics.watch(self.dispatcher)

    def prompt_ids(self, ask: Ask) -> list[int]:
        """Tokens of a prompt or chat. Raises UnsupportedError for a chat that the model has no template for."""
        if isinstance(ask, ChatRequest):
            return self._chat_ids([message.plain() for message in ask.messages])
        prompt: str | list[Any] = ask.prompt
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], str):
            prompt = prompt[0]
        return list(self.tokenizer.encode(prompt)) if isinstance(prompt, str) else list(prompt)

    def _chat_ids(self, messages: list[dict[str, str]]) -> list[int]:
        if self.tokenizer.chat_template is None:
            raise UnsupportedError("expected a model with a chat template, found one without; use /v1/completions")
        try:
            return list(self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
        except TemplateError as error:  # templates refuse roles, and their order, by raising
            raise UnsupportedError(
                f"expected messages that the model's chat template takes, found them refused ({error}); change their "
                "roles or order"
            ) from error

    def query(self, ask: Ask) -> Query:
        """What the instances are asked. Raises ShapeError for lengths beyond the limits."""
        ids = self.prompt_ids(ask)
        if not ids:
            raise ShapeError("expected a prompt of at least one token, found an empty one; send some text")
        left = min(self.context_length - len(ids), self.settings.max_new_tokens)
        if isinstance(ask, ChatRequest):
            wanted = ask.max_completion_tokens or ask.max_tokens or left
        else:
            wanted = ask.max_tokens or min(DEFAULT_MAX_TOKENS, left)
        if left < 1 or wanted > left:
            raise ShapeError(
                f"expected a prompt and max_tokens within {self.context_length} tokens, at most "
                f"{self.settings.max_new_tokens} of them new, found {len(ids)} and {wanted}; shorten one of them"
            )
        seed = secrets.randbits(31) if ask.seed is None else ask.seed % 2**31
        sampling = Sampling(ask.temperature, ask.top_p, seed, ask.num_logprobs)
        return Query(ids, self.kv_cache_dtype, wanted, sampling, ignore_eos=ask.ignore_eos)

    def token_text(self, token: int) -> str:
        """One token as text."""
        return str(self.backend.decode([token], skip_special_tokens=False))


def make_app(gateway: Gateway, on_close: Callable[[], None] = lambda: None) -> FastAPI:
    """Build the application. ``on_close`` runs when it shuts down, behind the last response."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(on_close)

    app = FastAPI(title="homkv", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    settings = gateway.settings
    app.add_middleware(
        Guard,
        api_key=settings.read_api_key(),
        max_body_bytes=settings.max_body_bytes,
        metrics=gateway.metrics,
    )
    _handle_errors(app, gateway.metrics)
    _openai_routes(app, gateway)
    add_service_routes(app, settings, gateway.dispatcher, gateway.metrics)
    return app


def _openai_routes(app: FastAPI, gateway: Gateway) -> None:
    name = gateway.settings.served_name

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(gateway)]}

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> dict[str, Any]:
        _check_model(model, name)
        return _model(gateway)

    @app.post("/v1/completions")
    async def completions(ask: CompletionRequest, request: Request) -> Response:
        request_id = f"cmpl-{secrets.token_hex(12)}"
        shape = CompletionShape(request_id, name, gateway.token_text, ask.logprobs is not None)
        return await _answer(gateway, ask, request, shape)

    @app.post("/v1/chat/completions")
    async def chat(ask: ChatRequest, request: Request) -> Response:
        request_id = f"chatcmpl-{secrets.token_hex(12)}"
        return await _answer(gateway, ask, request, ChatShape(request_id, name, gateway.token_text, bool(ask.logprobs)))


def _model(gateway: Gateway) -> dict[str, Any]:
    return {
        "id": gateway.settings.served_name,
        "object": "model",
        "created": 0,
        "owned_by": "homkv",
        "max_model_len": gateway.context_length,
        "kv_cache_dtype": gateway.kv_cache_dtype,
    }


def _check_model(asked: str, served: str) -> None:
    if asked != served:
        raise HTTPException(404, f"expected the model {served!r}, found {asked!r}; see /v1/models")


async def _answer(gateway: Gateway, ask: Ask, request: Request, shape: Shape) -> Response:
    """Submit a request and answer it whole or as a stream."""
    request.state.request_id = shape.request_id
    _check_model(ask.model, gateway.settings.served_name)
    query = await asyncio.to_thread(gateway.query, ask)  # a long prompt takes a while to tokenize
    queue = submit(gateway.dispatcher, query, shape.request_id)
    log.info("accepted", request_id=shape.request_id, prompt_tokens=len(query.prompt_ids), stream=ask.stream)
    text = TextStream(gateway.backend, ask.stops)
    pieces = generate(gateway.dispatcher, query, text, shape.request_id, queue)
    headers = {"x-request-id": shape.request_id}
    if not ask.stream:
        whole = await _unless_gone(_collect(pieces), request)
        record = whole[-1].record
        assert record is not None  # the last piece's
        return JSONResponse(shape.whole(whole, usage(record)), headers=headers)
    first = await _unless_gone(_first(pieces), request)  # an error before the first token still has its status
    with_usage = ask.stream_options is not None and ask.stream_options.include_usage
    return _Stream(
        _events(gateway, shape, first, pieces, with_usage),
        headers=headers,
        send_timeout=gateway.settings.send_timeout_s,
        shutdown_grace_period=gateway.settings.drain_s,
        on_slow=gateway.metrics.slow_clients.inc,
    )


async def _first(pieces: AsyncIterator[Piece]) -> Piece:
    return await anext(pieces)


async def _collect(pieces: AsyncIterator[Piece]) -> list[Piece]:
    return [piece async for piece in pieces]


async def _unless_gone(work: Coroutine[Any, Any, Result], request: Request) -> Result:
    """Do something while the client waits; if it leaves, the work is cancelled, and with it the request."""

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            continue

    working, left = asyncio.ensure_future(work), asyncio.ensure_future(watch())
    try:
        await asyncio.wait([working, left], return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise HTTPException(499, "expected the client to wait, found it gone")
        return working.result()
    finally:
        for task in (working, left):
            task.cancel()


async def _events(
    gateway: Gateway, shape: Shape, first: Piece, pieces: AsyncIterator[Piece], with_usage: bool
) -> AsyncIterator[dict[str, str]]:
    """Server-sent events of a stream; an error behind the first token is one as well."""
    try:
        if isinstance(shape, ChatShape):
            yield {"data": shape.first_chunk()}
        yield {"data": shape.chunk(first)}
        last = first
        async for piece in pieces:
            last = piece
            if piece.text or piece.finish_reason or shape.wants_logprobs:
                yield {"data": shape.chunk(piece)}
        if with_usage and last.record is not None:
            yield {"data": shape.usage_chunk(usage(last.record))}
        yield {"data": "[DONE]"}
    except Exception as error:  # one of ours, or a bug: the client is told either way
        yield {"data": json.dumps(report(error, shape.request_id)[1])}
    finally:
        aclose = getattr(pieces, "aclose", None)
        if aclose is not None:
            await aclose()


class _Stream(EventSourceResponse):
    """Counts clients that were cut off because they took no bytes."""

    def __init__(self, *args: Any, on_slow: Callable[[], None], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._on_slow = on_slow

    async def __call__(self, *args: Any) -> None:
        try:
            await super().__call__(*args)
        except* SendTimeoutError:
            self._on_slow()


def _handle_errors(app: FastAPI, metrics: Metrics) -> None:
    @app.exception_handler(HomkvError)
    async def ours(request: Request, error: HomkvError) -> JSONResponse:
        named = request_headers(request.scope["state"])
        status, body = report(error, named.get("x-request-id"))
        if status < 500:
            metrics.refused(type(error).__name__)
        return JSONResponse(body, status, named | ({"Retry-After": "1"} if status in (429, 503) else {}))

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        metrics.refused("invalid")
        text, param = _explain(error.errors()[0])
        return JSONResponse(error_body(text, "invalid_request_error", None, param), 400)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        code = {404: "not_found", 405: "method_not_allowed", 413: "body_too_large"}.get(error.status_code)
        headers = request_headers(request.scope["state"]) | dict(error.headers or {})
        return JSONResponse(error_body(str(error.detail), "invalid_request_error", code), error.status_code, headers)


def _explain(problem: Mapping[str, Any]) -> tuple[str, str | None]:
    """What is wrong with a request, and with which parameter; None for the body as a whole."""
    if problem["type"] == "json_invalid":
        return f"body: expected JSON, found {problem['ctx']['error']} at character {problem['loc'][-1]}", None
    path: list[str | int] = [*problem["loc"][1:]]  # behind "body", "query" or "path"
    if not path:
        return f"body: {problem['msg']}; send a JSON object as application/json", None
    # The members of a union are named, too, as "str" or "list[int]": the client knows them by no such name.
    inner = [str(part) for part in path[1:] if isinstance(part, int) or (part.isidentifier() and part != "str")]
    return f"{'.'.join([str(path[0]), *inner])}: {problem['msg']}", str(path[0])
