"""Many requests to SGLang servers at once, each repeated, by another server in turn, while its failure may pass."""

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import aiohttp

from megatron_bai.errors import UserError

T = TypeVar("T")
Request: TypeAlias = tuple[int, dict[str, Any], Callable[[Any], T]]  # whose turn, what to send, what reads the reply
_BACKOFF_S = 0.5  # before the first retry; doubles


@dataclass(frozen=True)
class Limits:
    """How a server is asked.

    Attributes:
        concurrency: requests in flight.
        timeout_s: of one attempt; `setting` names it in messages.
        retries: of one request.
    """

    concurrency: int
    timeout_s: float
    retries: int
    setting: str


def ask_all(
    urls: Sequence[str], path: str, requests: Sequence[Request[T]], limits: Limits, tolerant: bool = False
) -> list[T | UserError]:
    """Post every request; results in order. Holds no connection. Call it where no event loop runs.

    Args:
        urls: of servers that answer alike.
        requests: the first part of each is the place in `urls`, counted round, of the server that is asked first, and of
            the others after it where that fails; the last part raises ValueError for a reply that it cannot take.
        tolerant: a request that fails for good leaves its UserError in its place; otherwise the first ends all.

    Raises:
        UserError: names the server and what went wrong last.
    """

    async def run() -> list[T | BaseException]:
        gate = asyncio.Semaphore(limits.concurrency)
        timeout = aiohttp.ClientTimeout(total=limits.timeout_s)
        connector = aiohttp.TCPConnector(limit=0)  # the gate limits: waiting for it is not the server's fault
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
            asked = (_ask(session, gate, urls, path, limits, *request) for request in requests)
            return await asyncio.gather(*asked, return_exceptions=tolerant)

    found = asyncio.run(run())
    for each in found:
        if isinstance(each, BaseException) and not isinstance(each, UserError):
            raise each
    return found


async def _ask(
    session: aiohttp.ClientSession,
    gate: asyncio.Semaphore,
    urls: Sequence[str],
    path: str,
    limits: Limits,
    turn: int,
    body: dict[str, Any],
    parse: Callable[[Any], T],
) -> T:
    failure, attempts = "", limits.retries + 1
    for attempt in range(attempts):
        if attempt:
            await asyncio.sleep(_BACKOFF_S * 2 ** (attempt - 1))
        url = urls[(turn + attempt) % len(urls)]
        try:
            async with gate, session.post(url + path, json=body) as reply:
                text, status = await reply.text(), reply.status
            if 400 <= status < 500:  # asking again would not help
                raise UserError(f"SGLang at {url} refused a request with {status}: {text[:300]}")
            if status >= 500:
                raise ValueError(f"status {status}: {text[:300]}")
            return parse(json.loads(text))
        except asyncio.TimeoutError:
            failure = f"no answer within {limits.setting}={limits.timeout_s:g} s"
        except aiohttp.ClientError as error:
            failure = f"{type(error).__name__} {error}"
        except ValueError as error:
            failure = str(error)
    raise UserError(f"SGLang at {', '.join(urls)} failed {attempts} times at {path}: {failure}")
