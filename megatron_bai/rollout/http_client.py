"""Concurrent HTTP requests to SGLang servers, each retried with the next server, while its failure may be temporary."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeAlias, TypeVar

import aiohttp

from megatron_bai.errors import UserError
from megatron_bai.rollout.servers.http_policy import TRANSPORT_ERRORS, describe_failure, open_session, send
from megatron_bai.utils import strict_json

T = TypeVar("T")
_BACKOFF_S = 0.5  # before the first retry; doubles


@dataclass(frozen=True)
class HttpRequest(Generic[T]):
    """One request.

    Attributes:
        server_index: index, counted round, of the server that is tried first; the others follow where it fails.
        body: JSON to send.
        parse: makes the result of a reply's JSON; raises ValueError for a reply that it cannot take.
    """

    server_index: int
    body: dict[str, Any]
    parse: Callable[[Any], T]


@dataclass(frozen=True)
class RequestLimits:
    """The limits of requests.

    Attributes:
        concurrency: requests in flight.
        timeout_s: of one attempt.
        retries: of one request.
        setting: name of the setting of `timeout_s`, for messages.
        reply_bytes: of one reply's body; nothing beyond them is read.
    """

    concurrency: int
    timeout_s: float
    retries: int
    setting: str
    reply_bytes: int = 1 << 20


Post: TypeAlias = Callable[[HttpRequest[Any]], Awaitable[Any]]


def post_all(
    urls: Sequence[str], path: str, requests: Sequence[HttpRequest[T]], limits: RequestLimits, max_failures: int = 0
) -> list[T | UserError]:
    """Post every request, concurrently. No connection is held afterwards. Call it where no event loop runs.

    Args:
        urls: of servers that answer alike.
        path: to post to.
        requests: see `HttpRequest`.
        limits: see `RequestLimits`.
        max_failures: how many requests may fail for good. When one more has, the other requests are cancelled.

    Returns:
        The results in order. A request that failed or was cancelled has a UserError in its place, which names the
        server and what went wrong last.
    """

    def post_one(request: HttpRequest[T]) -> Callable[[Post], Awaitable[T]]:
        return lambda post: post(request)

    return run_all(urls, path, [post_one(request) for request in requests], limits, max_failures)


def run_all(
    urls: Sequence[str],
    path: str,
    calls: Sequence[Callable[[Post], Awaitable[T]]],
    limits: RequestLimits,
    max_failures: int = 0,
) -> list[T | UserError]:
    """Run calls that post one request after another each, concurrently; see `post_all`.

    Args:
        urls: as in `post_all`.
        path: likewise.
        calls: each gets a function that posts a request and returns its result, or raises a UserError.
        limits: as in `post_all`; `concurrency` is of requests, not of calls.
        max_failures: how many calls may end in a UserError, as in `post_all`.
    """

    async def run() -> list[T | UserError]:
        semaphore = asyncio.Semaphore(limits.concurrency)
        async with open_session(limits.timeout_s) as session:
            post = partial(post_with_retries, session, semaphore, urls, path, limits)
            return await _gather_until([asyncio.ensure_future(call(post)) for call in calls], max_failures)

    return asyncio.run(run())


async def _gather_until(tasks: Sequence[asyncio.Future[Any]], max_failures: int) -> list[Any]:
    """Wait for results or UserErrors, in order, until too many failed; raise any other error."""
    failures: list[UserError] = []
    try:
        for done in asyncio.as_completed(tasks):
            try:
                await done
            except UserError as error:
                failures.append(error)
                if len(failures) > max_failures:
                    break
    finally:
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
    first_failure = failures[0] if failures else None
    return [first_failure if isinstance(result, asyncio.CancelledError) else result for result in results]


async def post_with_retries(
    session: aiohttp.ClientSession,
    semaphore: asyncio.Semaphore,
    urls: Sequence[str],
    path: str,
    limits: RequestLimits,
    request: HttpRequest[T],
) -> T:
    """Post one request until it succeeds or has failed for good.

    Args:
        session: of `open_session`.
        semaphore: of all requests that may be in flight together.
        urls: as in `post_all`.
        path: likewise.
        limits: likewise.
        request: see `HttpRequest`.

    Raises:
        UserError: it has failed; names the server and what went wrong last.
    """
    failure, attempts = "", limits.retries + 1
    for attempt in range(attempts):
        if attempt:
            await asyncio.sleep(_BACKOFF_S * 2 ** (attempt - 1))
        url = urls[(request.server_index + attempt) % len(urls)]
        try:
            async with semaphore:
                reply = await send(session, url, path, request.body, limits.reply_bytes)
            if 400 <= reply.status < 500:  # a retry would not help
                raise UserError(f"SGLang at {url} refused a request with {reply.status}: {reply.excerpt()}")
            if reply.status != 200:
                raise ValueError(f"status {reply.status}: {reply.excerpt()}")
            return request.parse(strict_json.parse(reply.body))
        except TimeoutError:
            failure = f"no answer within {limits.setting}={limits.timeout_s:g} s"
        except TRANSPORT_ERRORS as error:
            failure = describe_failure(error)
        except ValueError as error:
            failure = str(error)[:500]  # a reply may be quoted in it
    last = f" ({url})" if len(urls) > 1 else ""
    raise UserError(f"SGLang at {', '.join(urls)} failed {attempts} times at {path}: {failure}{last}")
