"""HTTP requests that are posted one by one as they come, in a thread with an event loop of its own."""

import asyncio
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Any, TypeVar

from megatron_bai.errors import UserError
from megatron_bai.rollout.http_client import HttpRequest, RequestLimits, post_with_retries
from megatron_bai.rollout.servers.http_policy import open_session

T = TypeVar("T")


class PostingThread:
    """Posts requests while the caller does something else; `post_all` is for many at once.

    Args:
        urls: of servers that answer alike.
        path: to post to.
        limits: of all requests together.
    """

    def __init__(self, urls: Sequence[str], path: str, limits: RequestLimits):
        self._urls, self._path, self._limits = urls, path, limits
        self._loop = asyncio.new_event_loop()
        self._semaphore = asyncio.Semaphore(limits.concurrency)
        self._thread = threading.Thread(target=self._loop.run_forever, name="posting", daemon=True)

    def __enter__(self) -> "PostingThread":
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._open(), self._loop).result()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Cancel the requests that are in flight, and close their connections."""
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _open(self) -> None:
        self._session = open_session(self._limits.timeout_s)  # in the loop, which it belongs to

    async def _close(self) -> None:
        tasks: list[asyncio.Task[Any]] = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._session.close()

    def submit(self, request: HttpRequest[T]) -> "Future[T | UserError]":
        """Post a request as soon as `limits.concurrency` allows it. Any thread may ask.

        Returns:
            A future of the result, or of a UserError that names the server and what went wrong last.
        """
        call = self._post(request)
        return asyncio.run_coroutine_threadsafe(call, self._loop)

    async def _post(self, request: HttpRequest[T]) -> T | UserError:
        about = (self._session, self._semaphore, self._urls, self._path, self._limits)
        try:
            return await post_with_retries(*about, request)
        except UserError as error:
            return error
