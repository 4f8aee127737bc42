"""Ask a running gateway about itself, from any machine."""

from typing import TypeVar
from urllib.parse import quote

import httpx
import msgspec

from homkv.errors import TransferError, UnsupportedError
from homkv.serve.views import Overview, RequestView

T = TypeVar("T")


class Lookup:
    """Answers of the service at ``url``, which is given without /v1.

    Every method raises TransferError if the service does not answer or wants another key, and UnsupportedError if what
    answers is no gateway of this version.
    """

    def __init__(self, url: str, api_key: str | None = None, timeout_s: float = 30.0) -> None:
        self._url, self._timeout_s = url.rstrip("/"), timeout_s
        self._headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}

    def overview(self, limit: int = 30) -> Overview:
        """Instances, links, and the newest requests."""
        return self._decoded(f"/v1/status?limit={limit}", Overview)

    def requests(self, limit: int) -> list[RequestView]:
        """The newest requests, newest first."""
        return self._decoded(f"/v1/requests?limit={limit}", list[RequestView])

    def request(self, request_id: str) -> RequestView:
        """One request. Raises UnsupportedError for one that is unknown or forgotten."""
        return self._decoded(f"/v1/requests/{quote(request_id, safe='')}", RequestView)

    def metrics(self) -> str:
        """Prometheus' text."""
        return self._get("/metrics").text

    def _decoded(self, path: str, kind: type[T]) -> T:
        try:
            return msgspec.json.decode(self._get(path).content, type=kind)
        except msgspec.MsgspecError as error:
            why = f"expected {path} of a homkv gateway of this version at {self._url}, found something else: {error}"
            raise UnsupportedError(why) from error

    def _get(self, path: str) -> httpx.Response:
        try:
            response = httpx.get(f"{self._url}{path}", headers=self._headers, timeout=self._timeout_s)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise TransferError(f"expected a service at {self._url}, found {error!r}; start `homkv serve`") from error
        if response.status_code == 401:
            raise TransferError(f"expected {self._url} to accept our API key, found it refused; give --api-key")
        if response.status_code != 200:
            raise UnsupportedError(_reason(response, f"{self._url}{path}"))
        return response


def _reason(response: httpx.Response, url: str) -> str:
    """What an error's body says, whole if it is a message of a gateway, or its status."""
    try:
        said = str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        said = f"HTTP {response.status_code}"
    if said.startswith("expected"):
        return f"{said}; asked {url}"
    return f"expected an answer at {url}, found {said}; name the service without /v1"
