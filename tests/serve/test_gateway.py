"""OpenAI's own client against the gateway: answers, streams, stops, log probabilities, errors, limits, departures."""

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from gateway_cases import Service, serving, text_of
from serve_cases import NAN_TOKEN, prompt, twin, wait_until

import homkv
from homkv.models import LoadedModel

PROMPT = text_of(prompt(150, seed=40))


@pytest.fixture(scope="module")
def shared(loaded: LoadedModel) -> Iterator[Service]:
    with serving(loaded, num_prefill=2, num_decode=2) as service:
        yield service


@pytest.fixture
def service(shared: Service) -> Iterator[Service]:
    yield shared
    shared.assert_free()


@pytest.fixture
def client(service: Service) -> Iterator[openai.OpenAI]:
    with connect(service) as made:
        yield made


def connect(service: Service, api_key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{service.url}/v1", api_key=api_key, max_retries=0, timeout=60)


def complete(client: openai.OpenAI, text: str = PROMPT, **options: Any) -> Any:
    return client.completions.create(model="m", prompt=text, **({"temperature": 0, "max_tokens": 12} | options))


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["m"]
    assert client.models.retrieve("m").owned_by == "homkv"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


def test_greedy_text_is_that_of_one_process(client: openai.OpenAI, loaded: LoadedModel) -> None:
    ids, model = prompt(150, seed=40), twin(loaded)
    with homkv.attach(model.model, "balanced"):
        inputs = torch.tensor([ids])
        out = model.model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=90,
            do_sample=False,
            pad_token_id=NAN_TOKEN,
        )
    answer = complete(client, max_tokens=90)
    assert answer.choices[0].text == text_of(out[0, len(ids) :].tolist())
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (150, 90)
    assert complete(client, ids, max_tokens=90).choices[0].text == answer.choices[0].text  # token ids as the prompt


def test_a_stream_says_the_same(client: openai.OpenAI) -> None:
    whole = complete(client, max_tokens=30)
    chunks = list(complete(client, max_tokens=30, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].usage.total_tokens == 180
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens == 128  # of 150: two pages
    assert len({c.id for c in chunks}) == 1
    assert len(chunks) >= 30


def test_a_chat_streams_a_role_and_its_text(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": [{"type": "text", "text": PROMPT}]}]
    options: Any = {"model": "m", "messages": messages, "temperature": 0, "max_completion_tokens": 8}
    whole = client.chat.completions.create(**options)
    assert whole.choices[0].message.role == "assistant"
    chunks = list(client.chat.completions.create(stream=True, **options))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.choices[0].message.content


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_answer_and_is_not_shown(client: openai.OpenAI, service: Service, stream: bool) -> None:
    text = complete(client, max_tokens=40).choices[0].text
    stop = text[20:31]  # across tokens
    got = complete(client, max_tokens=40, stop=["never", stop], stream=stream)
    choices = [c.choices[0] for c in got] if stream else [got.choices[0]]
    assert "".join(choice.text for choice in choices) == text[: text.index(stop)]
    assert choices[-1].finish_reason == "stop"


def test_log_probabilities(client: openai.OpenAI) -> None:
    found = complete(client, max_tokens=6, logprobs=3).choices[0]
    logprobs = found.logprobs
    assert "".join(logprobs.tokens) == found.text.replace(" ", "")
    for token, logprob, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert len(top) == 3
        assert logprob == max(top.values()) == top[token]  # greedy: the likeliest was chosen
        assert logprob < 0
    chunks = complete(client, max_tokens=6, logprobs=3, stream=True)
    streamed = [lp for c in chunks if (lp := c.choices[0].logprobs) is not None]
    assert [token for lp in streamed for token in lp.tokens] == logprobs.tokens
    assert [p for lp in streamed for p in lp.token_logprobs] == pytest.approx(logprobs.token_logprobs, abs=0.01)
    messages: Any = [{"role": "user", "content": PROMPT}]
    chat = client.chat.completions.create(
        model="m", messages=messages, temperature=0, max_tokens=6, logprobs=True, top_logprobs=2
    )
    assert chat.choices[0].logprobs is not None
    content = chat.choices[0].logprobs.content
    assert content is not None
    assert [len(entry.top_logprobs) for entry in content] == [2] * 6


def test_a_seed_fixes_the_answer(client: openai.OpenAI) -> None:
    def text(seed: int | None) -> str:
        return str(complete(client, temperature=1.5, seed=seed, max_tokens=20).choices[0].text)

    assert text(1) == text(1)
    assert text(1) != text(2)
    assert len({text(None) for _ in range(3)}) > 1


@pytest.mark.parametrize(
    ("options", "status", "says"),
    [
        ({"n": 2}, 400, "n:"),
        ({"model": "other"}, 404, "other"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": 5000}, 400, "shorten"),
        ({"prompt": text_of(prompt(2048))}, 400, "shorten"),
        ({"prompt": ""}, 400, "prompt"),
        ({"prompt": [199, 200]}, 400, "vocabulary"),
        ({"prompt": ["a", "b"]}, 400, "prompt"),
        ({"temperature": -1}, 400, "temperature"),
        ({"top_p": 0}, 400, "top_p"),
        ({"presence_penalty": 0.5}, 400, "presence_penalty"),
        ({"extra_body": {"grammar": "x"}}, 400, "grammar"),
        ({"stop": [""]}, 400, "stop"),
        ({"logprobs": 21}, 400, "logprobs"),
    ],
)
def test_what_cannot_be_answered_is_an_error_in_openais_shape(
    client: openai.OpenAI, options: dict[str, Any], status: int, says: str
) -> None:
    with pytest.raises(openai.APIStatusError, match=says) as caught:
        client.completions.create(**{"model": "m", "prompt": PROMPT, "max_tokens": 4} | options)
    assert caught.value.status_code == status
    assert isinstance(caught.value.body, dict)
    assert {"message", "type", "param", "code"} <= set(caught.value.body)


def test_bodies_that_are_no_json(service: Service) -> None:
    for body in (b"", b"{", b"[]", b'{"model": "m"}', b"\xff\xfe"):
        got = httpx.post(f"{service.url}/v1/completions", content=body)
        assert got.status_code == 400
        assert got.json()["error"]["message"]


def test_an_overflow_is_an_error_and_not_an_answer(client: openai.OpenAI) -> None:
    with pytest.raises(openai.InternalServerError, match="finite"):
        complete(client, [1, 2, NAN_TOKEN])


def test_many_clients_at_once(client: openai.OpenAI, service: Service) -> None:
    """Over both instances of each kind; every answer is what it is alone."""
    prompts = [text_of(prompt(20 + 13 * i, seed=60 + i)) for i in range(16)]
    alone = [complete(client, text, max_tokens=20).choices[0].text for text in prompts]
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(lambda text: complete(client, text, max_tokens=20).choices[0].text, prompts))
    assert together == alone
    steps = [decode.status.counters["tokens"] for decode in service.decodes]
    assert min(steps) > 0
    batched = sum(steps) / sum(decode.status.counters["steps"] for decode in service.decodes)
    assert batched > 1.05


def test_a_client_that_leaves_cancels_its_request(service: Service) -> None:
    body = {"model": "m", "prompt": PROMPT, "max_tokens": 1500, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{service.url}/v1/completions", json=body, timeout=30) as stream:
        request_id = stream.headers["x-request-id"]
        next(stream.iter_lines())
    wait_until(lambda: (found := service.dispatcher.records.get(request_id)) is not None and found.has_ended)
    record = service.dispatcher.records.get(request_id)
    assert record is not None
    assert record.state == "cancelled"
    assert record.num_tokens < 1500


def test_a_client_that_leaves_before_the_answer_cancels_it_too(service: Service) -> None:
    body = {"model": "m", "prompt": PROMPT, "max_tokens": 1500, "ignore_eos": True}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{service.url}/v1/completions", json=body, timeout=0.4)
    wait_until(lambda: service.dispatcher.records.newest(1)[0].state == "cancelled")


def test_a_request_can_be_looked_up(client: openai.OpenAI, service: Service) -> None:
    answer = complete(client, max_tokens=5)
    record = httpx.get(f"{service.url}/v1/requests/{answer.id}").json()
    assert (record["state"], record["num_tokens"], record["num_prompt_tokens"]) == ("done", 5, 150)
    names = [event["name"] for event in record["events"]]
    assert [n for n in names if n != "delivered"] == ["accepted", "reserving", "prefilling", "decoding", "done"]
    assert sum(record["phases_s"].values()) == pytest.approx(record["jct_s"], abs=1e-6)
    assert record["wire_bytes"] > 0
    assert httpx.get(f"{service.url}/v1/requests/nobody").status_code == 404


def metrics(service: Service) -> dict[str, float]:
    lines = httpx.get(f"{service.url}/metrics").text.splitlines()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}


def test_health_and_metrics(client: openai.OpenAI, service: Service) -> None:
    for prefill in service.prefills:
        prefill._num_begun = 0  # of every 16 prompts, the first is probed
    complete(client, text_of(prompt(300, seed=41)), max_tokens=5)
    health = httpx.get(f"{service.url}/health").json()
    assert health["status"] == "ok"
    assert list(health["instances"].values()) == ["up"] * 4

    def link_rate(values: dict[str, float]) -> float:
        return max(v for k, v in values.items() if k.startswith("homkv_link_bytes_per_second{"))

    wait_until(lambda: link_rate(metrics(service)) > 1000)  # instances are asked once a second
    values = metrics(service)
    done = values['homkv_requests_total{state="done"}']
    assert done >= 1
    assert values["homkv_ttft_seconds_count"] == values["homkv_jct_seconds_count"] == done
    for phase in ("queue", "wait", "turn", "prefill", "pack", "send", "verify", "first_token", "decode"):
        assert values[f'homkv_phase_seconds_count{{phase="{phase}"}}'] == done
    assert values['homkv_transfer_bytes_total{kind="raw"}'] > values['homkv_transfer_bytes_total{kind="wire"}'] > 0
    mean_error = values["homkv_reconstruction_error_sum"] / values["homkv_reconstruction_error_count"]
    assert 0.05 < mean_error < 0.5  # 4 and 2 bits of random keys and values
    assert sum(v for k, v in values.items() if k.startswith("homkv_page_blocks{")) == sum(
        engine.num_blocks for decode in service.decodes for engine in decode.engines.values()
    )
    names = ("leases_expired_total", "digest_mismatches_total", "leases_open", "page_blocks_free", "prefix_pages_found")
    times = ("instance_busy_seconds_total", "instance_up_seconds_total")
    counts = {name: sum(k.startswith(f"homkv_{name}{{") for k in values) for name in names + times}
    assert counts == dict.fromkeys(names + times, 4) | {"leases_open": 2, "page_blocks_free": 2}
    assert values["homkv_compression_ratio_count"] == values['homkv_busy_seconds_count{work="send"}'] > 0
    if Path("/proc/self/fd").exists():
        assert values["process_resident_memory_bytes"] > 1 << 20
        assert values["process_open_fds"] > 3
    assert sum(v for k, v in values.items() if k.startswith("homkv_prefix_pages_asked{")) > 0


def test_a_gateway_with_a_key_and_limits(loaded: LoadedModel) -> None:
    limited = {"api_key": "secret", "max_body_bytes": 2000, "max_requests": 1, "max_new_tokens": 300}
    with serving(loaded, **limited) as service:
        with connect(service, "wrong") as stranger, pytest.raises(openai.AuthenticationError):
            stranger.models.list()
        assert httpx.get(f"{service.url}/metrics").status_code == 401
        assert httpx.get(f"{service.url}/health").status_code == 200
        headers = {"authorization": "Bearer secret", "content-type": "application/json"}
        big = json.dumps({"model": "m", "prompt": "w1 " * 1000}).encode()
        for content in (big, iter([big[:1500], big[1500:]])):  # with a length, and in chunks without one
            got = httpx.post(f"{service.url}/v1/completions", content=content, headers=headers)
            assert (got.status_code, got.json()["error"]["code"]) == (413, "body_too_large")
        with connect(service, "secret") as client:
            with pytest.raises(openai.BadRequestError, match="300"):
                complete(client, "w1", max_tokens=301)
            busy = complete(client, "w1 w2", max_tokens=300, stream=True)
            next(iter(busy))
            with pytest.raises(openai.RateLimitError, match="more"):
                complete(client, "w1", max_tokens=2)
            busy.close()
            service.assert_free()
            assert complete(client, "w1", max_tokens=2).usage.completion_tokens == 2


def test_a_client_that_takes_no_bytes_is_cut_off(loaded: LoadedModel) -> None:
    """At the server's interface: a send that never returns."""
    import asyncio

    from homkv.serve.gateway.app import make_app

    with serving(loaded, send_timeout_s=0.3) as service:
        body = json.dumps({"model": "m", "prompt": "w1", "max_tokens": 1500, "stream": True, "ignore_eos": True})
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "path": "/v1/completions",
            "raw_path": b"/v1/completions",
            "query_string": b"",
            "headers": [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())],
        }
        messages = [{"type": "http.request", "body": body.encode(), "more_body": False}]

        async def receive() -> dict[str, Any]:
            if messages:
                return messages.pop()
            await asyncio.Event().wait()
            raise AssertionError

        async def send(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.body":
                await asyncio.Event().wait()

        asyncio.run(asyncio.wait_for(make_app(service.gateway)(scope, receive, send), 30))  # type: ignore[arg-type]
        service.assert_free()
        assert service.dispatcher.records.newest(1)[0].state == "cancelled"
        assert b"homkv_slow_clients_total 1.0" in service.gateway.metrics.render()


@pytest.mark.model
def test_smollm2_says_through_the_gateway_what_it_says_attached(smollm2: LoadedModel) -> None:
    messages: Any = [{"role": "user", "content": "Why is the sky blue? " + "Answer in one short sentence. " * 20}]
    ids = list(smollm2.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
    model = twin(smollm2)
    with homkv.attach(model.model, "balanced"):
        inputs = torch.tensor([ids])
        out = model.model.generate(
            inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=24, do_sample=False, pad_token_id=0
        )
    expected = smollm2.tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)
    with serving(smollm2, tokenizer=smollm2.tokenizer) as service, connect(service) as client:
        chat = client.chat.completions.create(model="m", messages=messages, temperature=0, max_tokens=24)
        assert chat.choices[0].message.content == expected
        service.assert_free()
        assert threading.active_count() < 60
