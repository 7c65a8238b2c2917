"""Control requests to an SGLang server, one at a time. Concurrent requests are `http_client`'s."""

import time
from collections.abc import Callable
from typing import Any

from megatron_bai.errors import UserError
from megatron_bai.rollout.servers.http_policy import TRANSPORT_ERRORS, describe_failure, request
from megatron_bai.utils.strict_json import parse

INSTANCE_PATH = "/megatron_bai/instance"  # of our own servers: the name that they were started with
_HEALTH_S = 30.0
_REPLY_BYTES = 64 << 20  # more than any control request's reply has


def get(url: str, path: str, timeout_s: float = 30.0) -> dict[str, Any]:
    """GET a JSON object; plain text is returned as {"text": …}.

    Args:
        url: of the server.
        path: of the request.
        timeout_s: of the request.

    Raises:
        UserError: names the server and the path.
    """
    return _call(url, path, None, timeout_s)


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
    return _call(url, path, body, timeout_s)


def is_healthy(url: str) -> bool:
    """Return whether the server generates: `/health` makes it sample one token."""
    try:
        reply = request(url, "/health", timeout_s=_HEALTH_S, reply_bytes=_REPLY_BYTES)
    except (ValueError, *TRANSPORT_ERRORS):
        return False
    return _succeeded(reply.status)


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


def _call(url: str, path: str, body: dict[str, Any] | None, timeout_s: float) -> dict[str, Any]:
    """Send a request and parse its reply."""
    try:
        reply = request(url, path, body, timeout_s=timeout_s, reply_bytes=_REPLY_BYTES)
    except TRANSPORT_ERRORS as error:
        raise UserError(f"SGLang at {url} does not answer {path}: {describe_failure(error)}") from error
    except ValueError as error:
        raise UserError(f"SGLang at {url} does not answer {path}: {error}") from error
    if not _succeeded(reply.status):
        raise UserError(f"SGLang at {url} refused {path} with {reply.status}: {reply.excerpt()}")
    text = reply.body.decode(errors="replace")
    try:
        content = parse(text)
    except ValueError:
        content = text
    return content if isinstance(content, dict) else {"text": text}


def _succeeded(status: int) -> bool:
    return 200 <= status < 300
