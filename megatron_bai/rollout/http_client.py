"""Many requests to SGLang servers at once, each repeated, by another server in turn, while its failure may pass."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import aiohttp

from megatron_bai.errors import UserError
from megatron_bai.rollout.servers.auth import request_headers
from megatron_bai.utils.strict_json import parse

T = TypeVar("T")
HttpRequest: TypeAlias = tuple[int, dict[str, Any], Callable[[Any], T]]  # whose turn, what to send, what reads the reply
_BACKOFF_S = 0.5  # before the first retry; doubles


@dataclass(frozen=True)
class RequestLimits:
    """How a server is asked.

    Attributes:
        concurrency: requests in flight.
        timeout_s: of one attempt; `setting` names it in messages.
        retries: of one request.
        reply_bytes: of one reply's body; nothing beyond them is read.
    """

    concurrency: int
    timeout_s: float
    retries: int
    setting: str
    reply_bytes: int = 1 << 20


def post_all(
    urls: Sequence[str], path: str, requests: Sequence[HttpRequest[T]], limits: RequestLimits, max_failures: int = 0
) -> list[T | UserError]:
    """Post every request; results in order. Holds no connection. Call it where no event loop runs.

    Args:
        urls: of servers that answer alike.
        requests: the first part of each is the place in `urls`, counted round, of the server that is asked first, and
            of the others after it where that fails; the last part raises ValueError for a reply that it cannot take.
        max_failures: how many requests may fail for good. When one more has, nobody waits for the rest.

    Returns:
        What each became. A request that failed, or that nobody waited for, has a UserError in its place, which names
        the server and what went wrong last.
    """

    async def run() -> list[T | UserError]:
        semaphore = asyncio.Semaphore(limits.concurrency)
        timeout = aiohttp.ClientTimeout(total=limits.timeout_s)
        connector = aiohttp.TCPConnector(limit=0)  # the semaphore limits: waiting for it is not the server's fault
        # Bodies stay as they were sent, so that `_read` sees their size.
        async with aiohttp.ClientSession(timeout=timeout, connector=connector, auto_decompress=False) as session:
            asked = [asyncio.ensure_future(_post_with_retries(session, semaphore, urls, path, limits, *each)) for each in requests]
            return await _gather_until(asked, max_failures)

    return asyncio.run(run())


async def _gather_until(asked: Sequence[asyncio.Future[Any]], max_failures: int) -> list[Any]:
    """Results or UserErrors, in order; what is not a UserError is raised."""
    failures: list[UserError] = []
    try:
        for done in asyncio.as_completed(asked):
            try:
                await done
            except UserError as error:
                failures.append(error)
                if len(failures) > max_failures:
                    break
    finally:
        for each in asked:
            each.cancel()
        found = await asyncio.gather(*asked, return_exceptions=True)
    given_up = failures[0] if failures else None
    return [given_up if isinstance(each, asyncio.CancelledError) else each for each in found]


async def _post_with_retries(
    session: aiohttp.ClientSession,
    semaphore: asyncio.Semaphore,
    urls: Sequence[str],
    path: str,
    limits: RequestLimits,
    turn: int,
    body: dict[str, Any],
    read: Callable[[Any], T],
) -> T:
    failure, attempts = "", limits.retries + 1
    for attempt in range(attempts):
        if attempt:
            await asyncio.sleep(_BACKOFF_S * 2 ** (attempt - 1))
        url = urls[(turn + attempt) % len(urls)]
        try:
            async with semaphore, _post(session, url, path, body) as reply:
                text, status = await _read(reply, limits.reply_bytes), reply.status
            if 400 <= status < 500:  # asking again would not help
                raise UserError(f"SGLang at {url} refused a request with {status}: {_excerpt(text)}")
            if status != 200:
                raise ValueError(f"status {status}: {_excerpt(text)}")
            return read(parse(text))
        except TimeoutError:
            failure = f"no answer within {limits.setting}={limits.timeout_s:g} s"
        except aiohttp.ClientError as error:
            failure = f"{type(error).__name__} {error}"
        except ValueError as error:
            failure = str(error)[:500]  # a reply may be quoted in it
    raise UserError(f"SGLang at {', '.join(urls)} failed {attempts} times at {path}: {failure}")


def _post(session: aiohttp.ClientSession, url: str, path: str, body: dict[str, Any]) -> Any:
    return session.post(url + path, json=body, headers=request_headers(url), allow_redirects=False)  # the key is this server's


async def _read(reply: aiohttp.ClientResponse, limit: int) -> bytes:
    """The body.

    Raises:
        ValueError: it is longer than `limit`, or compressed, which would say nothing of its length.
    """
    if encoding := reply.headers.get("Content-Encoding"):
        raise ValueError(f"the reply is compressed ({encoding[:20]}), which was not asked for")
    chunks, size = [], 0
    async for chunk in reply.content.iter_any():
        chunks.append(chunk)
        size += len(chunk)
        if size > limit:
            raise ValueError(f"the reply is longer than {limit} bytes, more than any answer to the request")
    return b"".join(chunks)


def _excerpt(text: bytes) -> str:
    return text[:300].decode(errors="replace")
