"""The status endpoint and the page that shows it: what is on it, who may see it, and that nothing said there runs."""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import msgspec
import pytest
from gateway_cases import Service, serving, text_of
from serve_cases import prompt, wait_until
from test_gateway import complete, connect

from homkv.cli.trace import COLOURS
from homkv.models import LoadedModel
from homkv.serve.messages import Sampling
from homkv.serve.query import Query
from homkv.serve.views import Overview, RequestView

HOSTILE = '"><img src=x onerror=document.title=1><!--'
PROMPT = text_of(prompt(200, seed=90))


@pytest.fixture(scope="module")
def service(loaded: LoadedModel) -> Iterator[Service]:
    """A service that has answered a request with a hostile id, as an embedding program could have named it."""
    with serving(loaded, num_decode=2) as made:
        with connect(made) as client:
            complete(client, PROMPT, max_tokens=4)
        made.dispatcher.submit(
            Query(prompt(90, seed=91), "balanced", 3, Sampling(), ignore_eos=True), lambda _: None, HOSTILE
        )
        wait_until(lambda: made.dispatcher.num_accepted == 0)
        yield made


def test_the_status_has_a_schema(service: Service) -> None:
    answer = httpx.get(f"{service.url}/v1/status")
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cache-control"] == "no-store"
    found = msgspec.json.decode(answer.content, type=Overview)
    assert (found.service.model, found.service.kv_cache_dtype, found.service.num_accepted) == ("m", "balanced", 0)
    assert [i.role for i in found.instances] == ["prefill", "decode", "decode"]
    for instance in found.instances:
        assert instance.is_up
        assert instance.gauges["resident_memory_bytes"] > 1 << 20
        assert instance.gauges["open_fds"] > 3
        assert 0 <= instance.counters["busy_seconds"] <= instance.counters["up_seconds"]
        assert instance.round_trip_s is None or instance.round_trip_s > 0
    assert sum(link.num_transfers for link in found.links) == 2
    assert all(link.raw_bytes > 0 < link.wire_bytes and link.send_s > 0 for link in found.links)
    assert found.requests[0].request_id == HOSTILE
    assert {r.state for r in found.requests} == {"done"}


def test_newest_requests_and_single_ones_have_one_form(service: Service) -> None:
    listed = msgspec.json.decode(httpx.get(f"{service.url}/v1/requests?limit=1").content, type=list[RequestView])
    assert [r.request_id for r in listed] == [HOSTILE]
    newest = msgspec.json.decode(httpx.get(f"{service.url}/v1/requests?limit=2").content, type=list[RequestView])
    single = httpx.get(f"{service.url}/v1/requests/{newest[1].request_id}")
    assert msgspec.json.decode(single.content, type=RequestView) == newest[1]


@pytest.mark.parametrize("limit", ["0", "1001", "-1", "x", "1e9"])
def test_limits_are_checked(service: Service, limit: str) -> None:
    for path in ("/v1/status", "/v1/requests"):
        answer = httpx.get(f"{service.url}{path}?limit={limit}")
        assert answer.status_code == 400
        assert "limit" in answer.json()["error"]["message"]


def test_neither_prompts_nor_answers_are_shown(service: Service) -> None:
    for path in ("/v1/status", "/v1/requests", "/metrics", "/"):
        text = httpx.get(f"{service.url}{path}").text
        assert PROMPT[:40] not in text
        assert not re.search(r"prompt_ids|token_ids|\bw\d+ w\d+", text)


def test_hostile_ids_stay_text(service: Service) -> None:
    answer = httpx.get(f"{service.url}/v1/requests/{HOSTILE.replace('/', '')}")
    assert answer.status_code == 200
    assert answer.json()["request_id"] == HOSTILE
    missing = httpx.get(f"{service.url}/v1/requests/<script>alert(1)</script>x".replace("</", "<"))
    assert missing.status_code == 404
    assert missing.headers["content-type"] == "application/json"


def test_the_page_is_whole_and_needs_nothing_else(service: Service) -> None:
    answer = httpx.get(f"{service.url}/")
    page, policy = answer.text, answer.headers["content-security-policy"]
    assert answer.headers["content-type"].startswith("text/html")
    assert not re.search(r"""(src|href|action)\s*=|@import|url\(|https?://(?!www\.w3\.org/2000/svg)""", page)
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert len(re.findall(r"(script|style)-src 'sha256-[\w+/]{43}='", policy)) == 2
    assert not re.search(r"\b(innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval)\b", page)
    for phase, colour in COLOURS.items():  # those of `homkv trace`
        assert f'{phase}: "{colour}"' in page
    assert "prefers-color-scheme: dark" in page


def test_with_a_key_the_page_is_open_and_its_data_is_not(loaded: LoadedModel) -> None:
    with serving(loaded, api_key="secret") as locked:
        assert httpx.get(f"{locked.url}/").status_code == 200
        for path in ("/v1/status", "/v1/requests", "/v1/requests/x", "/metrics", "//", "/index.html"):
            assert httpx.get(f"{locked.url}{path}").status_code == 401
        headers = {"authorization": "Bearer secret"}
        assert httpx.get(f"{locked.url}/v1/status", headers=headers).status_code == 200
        assert "secret" not in httpx.get(f"{locked.url}/v1/status", headers=headers).text


# -- in a browser ----------------------------------------------------------------------------------------------------

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync"]


@contextmanager
def opened(url: str, scheme: str = "light") -> Iterator[Any]:
    """A page in headless Chromium; whatever its console says fails the test."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    if CHROMIUM is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    flags = [*FLAGS, *(["--no-sandbox"] if os.geteuid() == 0 else [])]
    said: list[str] = []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=flags)
        page = browser.new_context(color_scheme=scheme, viewport={"width": 1200, "height": 900}).new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(url)
        yield page
        browser.close()
    assert [text for text in said if "401" not in text] == []


def until(condition: Callable[[], bool]) -> None:
    wait_until(condition, 30.0)


def test_chromium_shows_instances_links_and_waterfalls(service: Service) -> None:
    with opened(f"{service.url}/") as page:
        page.wait_for_selector(".request")
        assert page.locator("#instances tbody tr").count() == 3
        assert page.locator("#links tbody tr").count() == len(httpx.get(f"{service.url}/v1/status").json()["links"])
        assert page.locator("#state").inner_text().startswith("all instances up")
        assert page.locator(".request .chart i").count() >= 6
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        bar = page.locator(".request .chart").last
        assert "decode" in bar.get_attribute("aria-label")
        page.locator(".request").last.focus()
        page.keyboard.press("Enter")
        detail = page.locator(".detail pre").inner_text()
        assert "accepted" in detail
        assert "own times" in detail
        assert PROMPT[:20] not in page.content()


def test_chromium_shows_hostile_ids_as_text(service: Service) -> None:
    with opened(f"{service.url}/") as page:
        page.wait_for_selector(".request")
        assert HOSTILE in page.locator(".request").first.inner_text()
        page.locator(".request").first.click()
        assert page.locator("img").count() == 0
        assert page.title() == "homkv"


def test_chromium_in_the_dark(service: Service) -> None:
    grounds = []
    for scheme in ("light", "dark"):
        with opened(f"{service.url}/", scheme) as page:
            colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
            grounds.append(sum(map(int, re.findall(r"\d+", colour))) / 3)
    assert grounds[0] > 200
    assert grounds[1] < 60


def test_chromium_asks_for_the_key(loaded: LoadedModel) -> None:
    with serving(loaded, api_key="secret") as locked, opened(f"{locked.url}/") as page:
        page.wait_for_selector("#key", state="visible")
        assert not page.locator("#content").is_visible()
        for key, is_right in (("wrong", False), ("secret", True)):
            page.fill("#key", key)
            page.click("#unlock button")
            until(lambda is_right=is_right: page.locator("#content").is_visible() == is_right)  # type: ignore[misc]
        until(lambda: not page.locator("#locked").is_visible())
        assert "secret" not in json.dumps(page.evaluate("document.body.innerText"))
