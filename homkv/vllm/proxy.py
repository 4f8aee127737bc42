"""A small router for prefill and decode servers of vLLM: OpenAI's API in front, vLLM's two-step protocol behind.

1. The prompt goes to a prefill server with ``max_tokens=1`` and ``kv_transfer_params.do_remote_decode``; its answer
   says where the KV lies.
2. The request goes to a decode server with these ``kv_transfer_params``; NIXL fetches the KV, tokens stream back.

One request is one prompt and one answer: the first step's parameters are of one prompt's KV, with which a decode server
would answer others as well, and whose blocks are given back when it was fetched once. Anything else is refused.

Servers take turns. Nothing is retried: a failed step is an error to the client, and vLLM frees the prefill server's
blocks when its lease ends (30 s) if no decode server fetched them. Each request has its own connection: vLLM closes
one that was idle for five seconds, perhaps at the moment in which the next request is sent on it.
``vllm-router`` does the same with more policies.
"""

import argparse
import asyncio
import itertools
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

PATHS = ("/v1/completions", "/v1/chat/completions")
PREFILL_ONLY = {"stream": False, "min_tokens": 1}  # one token, no end of text: only then vLLM keeps the KV
KV_PARAMS = {"do_remote_decode": True, "do_remote_prefill": False}
HEALTH_TIMEOUT_S = 5
ONE_ANSWER = (
    "expected one prompt and one answer (n=1, no beam search) where prefill and decode are apart, found more; send a "
    "request for each"
)


def problem(status: int, message: str) -> JSONResponse:
    """An error in the shape of OpenAI's."""
    return JSONResponse({"error": {"message": message, "type": "upstream_error", "code": status}}, status)


def prefill_body(body: dict[str, Any]) -> dict[str, Any]:
    """The first step's request: one token, no stream, KV kept for a decode server."""
    rest = {key: value for key, value in body.items() if key not in ("stream_options", "max_completion_tokens")}
    limit = "max_completion_tokens" if "max_completion_tokens" in body else "max_tokens"
    return rest | PREFILL_ONLY | {limit: 1, "kv_transfer_params": KV_PARAMS}


def is_one_answer(body: dict[str, Any]) -> bool:
    """Whether a request asks for one answer to one prompt; a prompt may be a list of token ids."""
    prompt = body.get("prompt")
    prompts = len(prompt) if isinstance(prompt, list) and not all(isinstance(x, int) for x in prompt) else 1
    return prompts == 1 and not body.get("use_beam_search") and all(body.get(x) in (None, 1) for x in ("n", "best_of"))


class Proxy:
    """Sends each request to the prefill and decode servers whose turn it is, by :func:`make_client`'s client."""

    def __init__(self, prefill: list[str], decode: list[str], client: httpx.AsyncClient) -> None:
        self._client, self._prefill, self._decode = client, prefill, decode
        self._turns = zip(itertools.cycle(prefill), itertools.cycle(decode), strict=True)

    async def generate(self, request: Request) -> Response:
        """Both steps of one request."""
        try:
            body = await request.json()
        except ValueError:
            body = None
        if not isinstance(body, dict):
            return problem(400, "expected a JSON object")
        if not is_one_answer(body):
            return problem(400, ONE_ANSWER)
        try:
            return await self._both_steps(request.url.path, body)
        except httpx.TransportError as error:
            return problem(502, f"a server behind this proxy failed: {type(error).__name__}: {error}")

    async def _both_steps(self, path: str, body: dict[str, Any]) -> Response:
        first, second = next(self._turns)
        filled = await self._client.post(first + path, json=prefill_body(body))
        if not filled.is_success:
            return Response(filled.content, filled.status_code, media_type="application/json")
        params = filled.json().get("kv_transfer_params")
        if not params:
            return problem(502, f"expected kv_transfer_params from {first}, found none; is it a prefill server?")
        return await _decode(self._client, second + path, body | {"kv_transfer_params": params})

    async def models(self) -> Response:
        """What the first decode server serves."""
        found = await self._client.get(f"{self._decode[0]}/v1/models", timeout=HEALTH_TIMEOUT_S)
        return Response(found.content, found.status_code, media_type="application/json")

    async def health(self) -> Response:
        """200 if every server answers, else 503 with those that do not."""
        urls = [*self._prefill, *self._decode]
        answers = await asyncio.gather(*map(self._answers, urls))
        missing = [url for url, ok in zip(urls, answers, strict=True) if not ok]
        return problem(503, f"no answer from {', '.join(missing)}") if missing else Response("")

    async def _answers(self, url: str) -> bool:
        try:
            return (await self._client.get(f"{url}/health", timeout=HEALTH_TIMEOUT_S)).is_success
        except httpx.TransportError:
            return False


def make_client() -> httpx.AsyncClient:
    """Waits for answers as long as they take, and keeps no connection."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    return httpx.AsyncClient(timeout=httpx.Timeout(None, connect=10), limits=limits)


def make_app(prefill: list[str], decode: list[str], client: httpx.AsyncClient) -> FastAPI:
    """The proxy as an ASGI application."""
    app, proxy = FastAPI(title="homkv prefill/decode proxy"), Proxy(prefill, decode, client)
    for path in PATHS:
        app.add_api_route(path, proxy.generate, methods=["POST"])
    app.add_api_route("/v1/models", proxy.models)
    app.add_api_route("/health", proxy.health)
    return app


async def _decode(client: httpx.AsyncClient, url: str, body: dict[str, Any]) -> Response:
    upstream = await client.send(client.build_request("POST", url, json=body), stream=True)
    if not body.get("stream") or not upstream.is_success:
        content = await upstream.aread()
        await upstream.aclose()
        return Response(content, upstream.status_code, media_type="application/json")
    return StreamingResponse(_relay(upstream), media_type="text/event-stream")


async def _relay(upstream: httpx.Response) -> AsyncIterator[bytes]:
    """Pass a stream on. If it breaks, the client is told so instead of ``[DONE]``: a cut answer is not a full one."""
    try:
        async for chunk in upstream.aiter_raw():
            yield chunk
    except httpx.TransportError as error:
        message = f"the decode server failed in mid-answer: {type(error).__name__}"
        event = {"error": {"message": message, "type": "upstream_error", "code": 502}}
        yield f"data: {json.dumps(event)}\n\n".encode()
    finally:
        await upstream.aclose()


def main() -> None:
    """``python -m homkv.vllm.proxy --prefill URL --decode URL [--host HOST] [--port PORT]``; URLs may repeat."""
    parser = argparse.ArgumentParser(description="Route OpenAI requests through vLLM prefill and decode servers.")
    parser.add_argument("--prefill", action="append", required=True)
    parser.add_argument("--decode", action="append", required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()
    uvicorn.run(make_app(args.prefill, args.decode, make_client()), host=args.host, port=args.port, log_level="warning")


if __name__ == "__main__":
    main()
