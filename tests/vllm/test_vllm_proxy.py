"""The two-step protocol of the proxy, against servers that answer as vLLM's do."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest

from homkv.vllm.proxy import make_app, make_client

PARAMS = {"do_remote_prefill": True, "remote_block_ids": [[1], [2, 3, 4]]}
Handler = Callable[[httpx.Request], httpx.Response]


class Cut(httpx.AsyncByteStream):
    """A stream that breaks behind its first event."""

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield b'data: {"text": "a"}\n\n'
        raise httpx.ReadError("connection reset")


class Servers:
    """Records every request; ``decode`` answers those to decode servers."""

    def __init__(self, decode: Handler, prefill: Handler | None = None) -> None:
        self.seen: list[tuple[str, dict[str, Any]]] = []
        self._decode = decode
        self._prefill = prefill or (lambda _: httpx.Response(200, json={"kv_transfer_params": PARAMS}))

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/health":
            return httpx.Response(200 if request.url.host != "d2" else 503)
        self.seen.append((str(request.url.host), json.loads(request.content)))
        return (self._prefill if request.url.host.startswith("p") else self._decode)(request)


def ask(servers: Servers, *bodies: dict[str, Any], path: str = "/v1/completions") -> list[httpx.Response]:
    async def run() -> list[httpx.Response]:
        upstream = httpx.AsyncClient(transport=httpx.MockTransport(servers))
        app = make_app(["http://p1"], ["http://d1", "http://d2"], upstream)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://proxy") as client:
            return [await (client.post(path, json=body) if body else client.get(path)) for body in bodies]

    return asyncio.run(run())


def full(_: httpx.Request) -> httpx.Response:
    return httpx.Response(200, json={"choices": [{"text": "full"}]})


def test_prefill_makes_one_token_and_decode_gets_its_parameters() -> None:
    servers = Servers(full)
    (answer,) = ask(servers, {"prompt": "x", "max_tokens": 9, "stream": False, "stream_options": {"a": 1}})
    assert answer.json() == {"choices": [{"text": "full"}]}
    (first, prefill), (second, decode) = servers.seen
    assert (first, second) == ("p1", "d1")
    assert prefill["max_tokens"] == 1
    assert prefill["kv_transfer_params"]["do_remote_decode"] is True
    assert "stream_options" not in prefill
    assert decode["max_tokens"] == 9
    assert decode["kv_transfer_params"] == PARAMS


def test_chat_requests_with_the_newer_name_of_the_limit() -> None:
    servers = Servers(full)
    ask(servers, {"messages": [], "max_completion_tokens": 9}, path="/v1/chat/completions")
    assert servers.seen[0][1]["max_completion_tokens"] == 1
    assert servers.seen[0][1]["min_tokens"] == 1
    assert "max_tokens" not in servers.seen[0][1]


@pytest.mark.parametrize(
    "more", [{"prompt": ["x", "y"]}, {"prompt": [[1, 2], [3]]}, {"n": 2}, {"best_of": 3}, {"use_beam_search": True}]
)
def test_more_than_one_answer_is_refused(more: dict[str, Any]) -> None:
    """The KV parameters are those of one prompt: a decode server would answer all others with that one's KV."""
    servers = Servers(full)
    (answer,) = ask(servers, {"prompt": "x", **more})
    assert answer.status_code == 400
    assert "one prompt and one answer" in answer.json()["error"]["message"]
    assert not servers.seen


@pytest.mark.parametrize("prompt", [["x"], [1, 2, 3], [[1, 2]]])
def test_one_prompt_may_come_in_a_list(prompt: list[Any]) -> None:
    (answer,) = ask(Servers(full), {"prompt": prompt, "n": 1, "best_of": None})
    assert answer.status_code == 200


def test_decode_servers_take_turns() -> None:
    servers = Servers(full)
    ask(servers, *[{"prompt": "x"}] * 3)
    assert [host for host, _ in servers.seen if host.startswith("d")] == ["d1", "d2", "d1"]


def test_a_refused_prompt_reaches_the_client_and_no_decode_server() -> None:
    servers = Servers(full, prefill=lambda _: httpx.Response(400, json={"error": {"message": "too long"}}))
    (answer,) = ask(servers, {"prompt": "x"})
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, "too long")
    assert len(servers.seen) == 1


def test_a_server_that_keeps_no_kv_is_no_prefill_server() -> None:
    (answer,) = ask(Servers(full, prefill=lambda _: httpx.Response(200, json={})), {"prompt": "x"})
    assert answer.status_code == 502
    assert "is it a prefill server" in answer.json()["error"]["message"]


def test_a_decode_server_that_is_gone_is_an_error() -> None:
    def gone(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused", request=request)

    (answer,) = ask(Servers(gone), {"prompt": "x"})
    assert answer.status_code == 502


def test_a_broken_stream_ends_in_an_error_and_not_in_done() -> None:
    cut = Servers(lambda _: httpx.Response(200, stream=Cut()))
    (answer,) = ask(cut, {"prompt": "x", "stream": True})
    events = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert json.loads(events[0]) == {"text": "a"}
    assert json.loads(events[-1])["error"]["type"] == "upstream_error"
    assert "[DONE]" not in answer.text


def test_what_is_no_json_object_is_refused() -> None:
    (answer,) = ask(Servers(full), [1])  # type: ignore[arg-type]
    assert answer.status_code == 400


def test_health_names_who_does_not_answer() -> None:
    (answer,) = ask(Servers(full), {}, path="/health")
    assert answer.status_code == 503
    assert "http://d2" in answer.json()["error"]["message"]


class ClosesWhenAskedAgain:
    """A server that lets a client keep its connection, and closes it as the next request arrives on it."""

    def __init__(self) -> None:
        self.requests = 0

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(int(head.lower().split(b"content-length:")[1].split()[0]))
        self.requests += 1
        answer = json.dumps({"kv_transfer_params": PARAMS}).encode()
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(answer), answer))
        await reader.read(1)
        writer.transport.abort()


def test_no_request_is_sent_on_a_connection_that_a_server_may_close() -> None:
    """vLLM closes idle ones after five seconds; a request on its way at that moment got 502."""

    async def run() -> tuple[list[int], int]:
        closes = ClosesWhenAskedAgain()
        server = await asyncio.start_server(closes, "127.0.0.1")
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with server, make_client() as upstream:
            app = make_app([url], [url], upstream)
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://proxy") as client:
                found = [await client.post("/v1/completions", json={"prompt": "x"}) for _ in range(3)]
        return [answer.status_code for answer in found], closes.requests

    assert asyncio.run(run()) == ([200] * 3, 6)
