"""The routes beside OpenAI's: health, metrics, records of requests, and a page that shows all of it."""

import base64
import hashlib
import re
import time
from importlib import resources
from typing import Annotated, Any

import msgspec
from fastapi import FastAPI, Query
from fastapi.responses import HTMLResponse, JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from homkv.serve.dispatch import Dispatcher
from homkv.serve.metrics import Metrics
from homkv.serve.settings import ServeSettings
from homkv.serve.views import Overview, ServiceView, instance_views, link_views, view_of

NUM_LINKED = 200  # newest requests whose transfers a link's numbers are made of
Limit = Annotated[int, Query(ge=1, le=1000)]
NO_SNIFFING = {"x-content-type-options": "nosniff", "cache-control": "no-store"}


def add_service_routes(app: FastAPI, settings: ServeSettings, dispatcher: Dispatcher, metrics: Metrics) -> None:
    """Add them. Those with data need the API key as every other route does; the page itself holds none."""
    began_s = time.monotonic()

    @app.get("/health")
    async def health() -> JSONResponse:
        return _health(dispatcher)

    @app.get("/metrics")
    async def prometheus() -> Response:
        return Response(metrics.render(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/requests")
    async def records(limit: Limit = 20) -> Response:
        return _json([view_of(record) for record in dispatcher.records.newest(limit)])

    @app.get("/v1/requests/{request_id}")
    async def record(request_id: str) -> Response:
        found = dispatcher.records.get(request_id)
        if found is None:
            raise HTTPException(404, f"expected the id of a recent request, found {request_id!r}")
        return _json(view_of(found))

    @app.get("/v1/status")
    async def status(limit: Limit = 30) -> Response:
        return _json(_overview(settings, dispatcher, time.monotonic() - began_s, limit))

    page = resources.files("homkv.serve.gateway").joinpath("page.html").read_text(encoding="utf-8")
    headers = NO_SNIFFING | {"content-security-policy": _policy(page)}

    @app.get("/")
    async def status_page() -> HTMLResponse:
        return HTMLResponse(page, headers=headers)


def _health(dispatcher: Dispatcher) -> JSONResponse:
    members = dispatcher.members
    up = {role: sum(m.role == role and m.status is not None for m in members) for role in ("prefill", "decode")}
    instances = {m.name: "up" if m.status else m.last_error or "connecting" for m in members}
    is_whole = all(m.status for m in members)
    can_serve = dispatcher.is_running and all(up.values())
    status = "unavailable" if not can_serve else "ok" if is_whole else "degraded"
    return JSONResponse({"status": status, "instances": instances}, 503 if status == "unavailable" else 200)


def _overview(settings: ServeSettings, dispatcher: Dispatcher, up_s: float, limit: int) -> Overview:
    newest = dispatcher.records.newest(max(limit, NUM_LINKED))
    service = ServiceView(
        model=settings.served_name,
        kv_cache_dtype=settings.kv_cache_dtype[0],
        policy=settings.policy,
        up_s=up_s,
        num_queued=dispatcher.num_queued,
        num_accepted=dispatcher.num_accepted,
        max_requests=settings.max_requests,
    )
    links = link_views(newest[:NUM_LINKED])
    return Overview(service, instance_views(dispatcher), links, [view_of(record) for record in newest[:limit]])


def _json(view: Any) -> Response:
    return Response(msgspec.json.encode(view), media_type="application/json", headers=NO_SNIFFING)


def _policy(page: str) -> str:
    """Nothing runs on the page but its own script, and nothing is loaded from or sent to elsewhere."""
    digests = {
        tag: base64.b64encode(hashlib.sha256(re.findall(f"<{tag}>(.*?)</{tag}>", page, re.S)[0].encode()).digest())
        for tag in ("script", "style")
    }
    sources = "; ".join(f"{tag}-src 'sha256-{digest.decode()}'" for tag, digest in digests.items())
    nowhere = "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    return f"default-src 'none'; {sources}; connect-src 'self'; {nowhere}"
