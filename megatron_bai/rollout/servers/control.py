"""Control requests to an SGLang server, one at a time. Rollouts, many at a time, are the client's."""

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

_REPLY_BYTES = 64 << 20  # more than any server has to say of itself


class _NoRedirect(HTTPRedirectHandler):
    """What a server is sent, its key with it, goes nowhere else."""

    def redirect_request(self, *_: Any) -> None:
        return None


_open = build_opener(ProxyHandler({}), _NoRedirect).open  # the server is never behind a proxy


def get(url: str, path: str, timeout_s: float = 30.0) -> dict[str, Any]:
    """GET a JSON object; plain text comes as {"text": …}. Raises a UserError that names the server and the path."""
    return _call(Request(url + path, headers=request_headers(url)), url, path, timeout_s)


def post(url: str, path: str, body: dict[str, Any], timeout_s: float = 30.0) -> dict[str, Any]:
    """POST a JSON object, read one. Raises a UserError that names the server, the path and the server's reason."""
    kind = {"Content-Type": "application/json"}
    request = Request(url + path, json.dumps(body).encode(), kind | request_headers(url), method="POST")
    return _call(request, url, path, timeout_s)


def is_healthy(url: str) -> bool:
    """Whether the server generates: `/health` makes it sample one token."""
    try:
        with _open(url + "/health", timeout=30.0):
            return True
    except (OSError, HTTPException):
        return False


def wait_until_healthy(url: str, within_s: float, on_poll: Callable[[], None] = lambda: None) -> bool:
    """Wait for a server that starts; returns whether it generates before the time is over.

    Args:
        on_poll: called between two attempts; what it raises ends the waiting.
    """
    deadline = time.monotonic() + within_s
    while not is_healthy(url):
        on_poll()
        if time.monotonic() > deadline:
            return False
        time.sleep(0.25)
    return True


def weight_version(url: str) -> str:
    """Of the weights in use: `/server_info` would tell the one given at launch."""
    return str(get(url, "/model_info").get("weight_version"))


def _call(request: Request, url: str, path: str, timeout_s: float) -> dict[str, Any]:
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
