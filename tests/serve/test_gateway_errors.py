"""What goes wrong between a client and the dispatcher: the right status, in OpenAI's shape, and a trace in the log."""

import json
import logging
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from gateway_cases import Service, serving, text_of, words
from serve_cases import NAN_TOKEN, prompt

from homkv.models import LoadedModel
from homkv.serve.gateway.app import Gateway

TEMPLATE = """
{%- for m in messages %}
{%- if m.role == 'assistant' and loop.first %}{{ raise_exception('roles must alternate') }}{% endif %}
{%- if m.name %}{{ unknown.name }}{% endif %}
{{- m.content }} {% endfor %}
{%- if messages | length > 3 %}{{ messages[0].content + 1 }}{% endif %}"""


@pytest.fixture(scope="module")
def service(loaded: LoadedModel) -> Iterator[Service]:
    tokenizer = words(loaded.vocab_size)
    tokenizer.chat_template = TEMPLATE
    with serving(loaded, tokenizer=tokenizer, decode_options={"max_tokens": 640}) as made:
        yield made
        made.assert_free()


def post(service: Service, what: str = "completions", body: str | None = None, **options: Any) -> httpx.Response:
    content = body or json.dumps({"model": "m", "max_tokens": 4, "temperature": 0} | options)
    headers = {"content-type": "application/json"}
    return httpx.post(f"{service.url}/v1/{what}", content=content, headers=headers, timeout=60)


def chat(*roles: str) -> list[dict[str, str]]:
    return [{"role": role, "content": "w1 w2"} for role in roles]


@pytest.mark.parametrize(
    ("options", "says", "param"),
    [
        ({"body": '{"model": "m", "prompt": "w1 \\ud800"}'}, "surrogates", "prompt"),
        ({"body": '{"model": "m", "prompt": ["\\ud800"]}'}, "^prompt: Input", "prompt"),
        ({"body": '{"model": "m", "prompt": "w1", "stop": "\\ud800"}'}, "unicode", "stop"),
        ({"body": '{"model": "m", "prompt": '}, "expected JSON, found Expecting value at character", None),
        ({"body": '"w1"'}, "send a JSON object", None),
        ({"prompt": 5}, "^prompt: Input", "prompt"),
        ({"prompt": "w1", "frequency-penalty": 1}, "^frequency-penalty: Extra", "frequency-penalty"),
        ({"prompt": []}, "at least one token", None),
        ({"prompt": [1] * 900}, "page blocks", None),  # it would never fit: no 429, to try again
        ({"what": "chat/completions", "messages": chat("user", "nobody")}, "^messages.1.role: Input", "messages"),
        ({"what": "chat/completions", "messages": chat("assistant")}, "roles must alternate", None),
    ],
)
def test_a_request_that_cannot_be_answered_is_the_clients(
    service: Service, options: dict[str, Any], says: str, param: str | None
) -> None:
    answer = post(service, **options)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param)
    with pytest.raises(ValueError, match=says):
        raise ValueError(error["message"])


@pytest.fixture(autouse=True)
def errors_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    """A command that ran in this process before may have silenced its logs: ``homkv chaos`` does."""
    caplog.set_level(logging.ERROR)


def logged(caplog: pytest.LogCaptureFixture, request_id: str) -> logging.LogRecord:
    (record,) = [r for r in caplog.records if r.name.startswith("homkv.serve.gateway") and r.levelno == logging.ERROR]
    assert record.__dict__["request_id"] == request_id
    assert record.exc_info is not None
    assert record.exc_info[2] is not None  # where it was raised
    return record


def test_an_overflow_is_logged_under_the_requests_id(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    answer = post(service, prompt=[1, 2, NAN_TOKEN])
    assert (answer.status_code, answer.json()["error"]["type"]) == (500, "format_error")
    assert logged(caplog, answer.headers["x-request-id"]).__dict__["error"] == "FormatError"


def test_a_bug_is_answered_in_json_and_logged(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    """Here of a chat template, which adds a number to a text."""
    answer = post(service, "chat/completions", messages=chat("user", "assistant", "user", "assistant"))
    assert (answer.status_code, answer.json()["error"]["type"]) == (500, "internal_error")
    assert "concatenate" not in answer.text
    record = logged(caplog, answer.headers["x-request-id"])
    assert record.__dict__["error"] == "TypeError"


def test_a_bug_behind_the_first_token_is_the_streams_last_event(
    service: Service, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(gateway: Gateway, token: int) -> str:
        raise LookupError(token)

    monkeypatch.setattr(Gateway, "token_text", broken)
    answer = post(service, prompt=text_of(prompt(20)), stream=True, logprobs=1)
    events = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
    assert answer.status_code == 200
    assert json.loads(events[-1])["error"]["type"] == "internal_error"
    assert logged(caplog, answer.headers["x-request-id"]).__dict__["error"] == "LookupError"
