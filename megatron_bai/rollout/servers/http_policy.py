"""How a request to any server is sent: the one HTTP client, aiohttp, with the same policy for one request and for many.

- A request has one time limit, from the connection to the last byte of its reply.
- It carries its server's key, so that no redirect is followed, no proxy is used, whatever the environment names, and no
  cookie is kept.
- A reply is read to a number of bytes and no further. A compressed one is refused: what it becomes could be any size.

What is sent again after a failure is the caller's choice: samples are (`http_client`), weights are not (`control`).
"""

import asyncio
import io
import json
import os
import ssl
from dataclasses import dataclass
from typing import Any

import aiohttp

from megatron_bai.rollout.servers.auth import request_headers

# What sending a request raises where there is no reply, a time-out among them.
TRANSPORT_ERRORS = (aiohttp.ClientError, OSError)
_LARGE_BYTES = 1 << 20  # a body from here on is written in chunks, not copied whole into the transport's buffer
_EXCERPT_BYTES = 300


@dataclass(frozen=True)
class HttpReply:
    """A reply.

    Attributes:
        status: HTTP's status code.
        body: its bytes.
    """

    status: int
    body: bytes

    def excerpt(self) -> str:
        """Return the beginning of the body, for a message."""
        return self.body[:_EXCERPT_BYTES].decode(errors="replace").strip()


def open_session(timeout_s: float) -> aiohttp.ClientSession:
    """Open a session, without a limit of connections; to be closed by an `async with`.

    Args:
        timeout_s: of each of its requests.
    """
    return aiohttp.ClientSession(
        timeout=aiohttp.ClientTimeout(total=timeout_s),
        connector=aiohttp.TCPConnector(limit=0),  # callers limit, so that waiting is in no request's time
        auto_decompress=False,
        cookie_jar=aiohttp.DummyCookieJar(),
        trust_env=False,
    )


async def send(
    session: aiohttp.ClientSession, url: str, path: str, body: dict[str, Any] | None, reply_bytes: int
) -> HttpReply:
    """Send one request and read its reply, of any status.

    Args:
        session: that `open_session` made.
        url: of the server, whose key is sent.
        path: of the request.
        body: JSON to POST; None: GET.
        reply_bytes: the most that the reply may have.

    Raises:
        ValueError: the reply is longer, or compressed.
        aiohttp.ClientError, OSError: there is no reply; TimeoutError: not in time.
    """
    headers, data = request_headers(url), None
    if body is not None:
        headers["Content-Type"] = "application/json"
        encoded = json.dumps(body).encode()
        data = encoded if len(encoded) < _LARGE_BYTES else io.BytesIO(encoded)
    method = "GET" if body is None else "POST"
    async with session.request(method, url + path, data=data, headers=headers, allow_redirects=False) as reply:
        return HttpReply(reply.status, await _read(reply, reply_bytes))


def request(
    url: str, path: str, body: dict[str, Any] | None = None, *, timeout_s: float, reply_bytes: int
) -> HttpReply:
    """Send one request and wait for its reply. Call it where no event loop runs.

    Args:
        url: as for `send`.
        path: likewise.
        body: likewise.
        timeout_s: of the request.
        reply_bytes: as for `send`.

    Raises:
        ValueError, aiohttp.ClientError, OSError: as `send`.
    """

    async def run() -> HttpReply:
        async with open_session(timeout_s) as session:
            return await send(session, url, path, body, reply_bytes)

    return asyncio.run(run())


def describe_failure(error: BaseException) -> str:
    """Return in a few words why there is no reply; for one of `TRANSPORT_ERRORS`."""
    if isinstance(error, TimeoutError):
        return "timed out"
    reason = str(error)
    if isinstance(error, aiohttp.ClientConnectorError) and not isinstance(error, ssl.SSLError | ssl.CertificateError):
        cause = error.os_error
        reason = os.strerror(cause.errno) if cause.errno and cause.errno > 0 else str(cause)
    return f"{type(error).__name__} {reason}".strip()


async def _read(reply: aiohttp.ClientResponse, limit: int) -> bytes:
    """Read the body of a reply; raise ValueError where it has more than `limit` bytes or is compressed."""
    encoding = reply.headers.get("Content-Encoding", "identity")
    if encoding.lower() != "identity":
        raise ValueError(f"the reply is compressed ({encoding[:20]}), which was not asked for")
    chunks, num_bytes = [], 0
    async for chunk in reply.content.iter_any():
        chunks.append(chunk)
        num_bytes += len(chunk)
        if num_bytes > limit:
            raise ValueError(f"the reply is longer than {limit} bytes, more than any answer to the request")
    return b"".join(chunks)
