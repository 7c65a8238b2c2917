"""Control requests to an SGLang server, one at a time. Concurrent requests are `http_client`'s."""

import json
import time
from collections.abc import Callable
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError
from urllib.request import HTTPRedirectHandler, ProxyHandler, Request, build_opener

from megatron_bai.errors import UserError
from megatron_bai.rollout.servers.auth import request_headers
from megatron_bai.utils.strict_json import parse

INSTANCE_PATH = "/megatron_bai/instance"  # of our own servers: the name that they were started with
_REPLY_BYTES = 64 << 20  # more than any control request's reply has


class _NoRedirect(HTTPRedirectHandler):
    """A handler that follows no redirect: requests carry the server's key."""

    def redirect_request(self, *_: Any) -> None:
        """Return None: the redirect is not followed."""
        return None


_open = build_opener(ProxyHandler({}), _NoRedirect).open  # the server is never behind a proxy


def get(url: str, path: str, timeout_s: float = 30.0) -> dict[str, Any]:
    """GET a JSON object; plain text is returned as {"text": …}.

    Args:
        url: of the server.
        path: of the request.
        timeout_s: of the request.

    Raises:
        UserError: names the server and the path.
    """
    return _call(Request(url + path, headers=request_headers(url)), url, path, timeout_s)


def post(url: str, path: str, body: dict[str, Any], timeout_s: float = 30.0) -> dict[str, Any]:
    """POST a JSON object; return the reply as `get` does.

    Args:
        url: of the server.
        path: of the request.
        body: JSON to send.
        timeout_s: of the request.

    Raises:
        UserError: names the server, the path and the server's reason.
    """
    content_type = {"Content-Type": "application/json"}
    request = Request(url + path, json.dumps(body).encode(), content_type | request_headers(url), method="POST")
    return _call(request, url, path, timeout_s)


def is_healthy(url: str) -> bool:
    """Return whether the server generates: `/health` makes it sample one token."""
    try:
        with _open(url + "/health", timeout=30.0):
            return True
    except (OSError, HTTPException):
        return False


def wait_until_healthy(url: str, within_s: float, on_poll: Callable[[], None] = lambda: None) -> bool:
    """Wait for a server that starts, and return whether it generates before the time is over.

    Args:
        url: of the server.
        within_s: seconds to wait.
        on_poll: called between two attempts; an exception of it ends the waiting.
    """
    deadline = time.monotonic() + within_s
    while not is_healthy(url):
        on_poll()
        if time.monotonic() > deadline:
            return False
        time.sleep(0.25)
    return True


def weight_version(url: str) -> str:
    """Return the version of the weights in use; `/server_info` has the version given at launch."""
    return str(get(url, "/model_info").get("weight_version"))


def instance(url: str) -> str | None:
    """Return the name that one of our own servers was started with (`server_main`); None for any other server."""
    try:
        name = get(url, INSTANCE_PATH).get("instance")
    except UserError:
        return None
    return name if isinstance(name, str) else None


def _call(request: Request, url: str, path: str, timeout_s: float) -> dict[str, Any]:
    """Send a request and parse its reply."""
    try:
        with _open(request, timeout=timeout_s) as reply:
            data = reply.read(_REPLY_BYTES + 1)
    except HTTPError as error:
        reason = error.read(1 << 16).decode(errors="replace").strip()
        raise UserError(f"SGLang at {url} refused {path} with {error.code}: {reason[:300]}") from error
    except (OSError, HTTPException) as error:  # URLError, a time-out, a broken connection
        raise UserError(f"SGLang at {url} does not answer {path}: {getattr(error, 'reason', error)}") from error
    if len(data) > _REPLY_BYTES:
        raise UserError(f"SGLang at {url} answers {path} with more than {_REPLY_BYTES} bytes")
    text = data.decode(errors="replace")
    try:
        content = parse(text)
    except ValueError:
        content = text
    return content if isinstance(content, dict) else {"text": text}
