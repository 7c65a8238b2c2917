"""Threads of a merge, with their results in order, and what else of the process would slow them down."""

import gc
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Protocol, TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


class OrderedMap(Protocol):
    """The type of a map whose results come in the order of the items."""

    def __call__(self, work: Callable[[T], R], items: Iterable[T], /) -> Generator[R, None, None]:
        """Yield `work(item)` for each item in order, computed while the results are consumed, until it is closed."""


@contextmanager
def single_torch_thread() -> Iterator[None]:
    """Have torch use one thread in the block: tiles are too small for OpenMP, which is slow where cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def gc_disabled() -> Iterator[None]:
    """Disable the garbage collector in the block.

    The index of many chunks is many objects, all in use to the end. Searching them for cycles, of which a merge leaves
    some 200, took a third of the time of a merge of small chunks.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def background_writer() -> Iterator[Callable[[Callable[[], None]], None]]:
    """Run calls in a second thread, in their order; a call waits for the one before.

    Yields:
        The function that takes a call and returns at once, unless the call before is still running.

    Raises:
        Exception: a call's, at the next one or at the end.
    """
    last: Future[None] = Future()
    last.set_result(None)

    def submit(work: Callable[[], None]) -> None:
        nonlocal last
        last.result()
        last = executor.submit(work)

    with ThreadPoolExecutor(1) as executor:
        yield submit
        last.result()


class ThreadMap:
    """An `OrderedMap` over threads, at most one item each ahead of the caller, or in the caller's with none.

    Once a map is closed, none of its calls is running.
    """

    def __init__(self, executor: ThreadPoolExecutor | None, threads: int):
        self._executor, self._threads, self._failed = executor, threads, threading.Event()

    def __call__(self, work: Callable[[T], R], items: Iterable[T], /) -> Generator[R, None, None]:
        """Yield `work(item)` for each item in order, as `OrderedMap`."""
        if self._executor is None:
            yield from map(work, items)
            return
        waiting: deque[Future[R]] = deque()
        try:
            for item in items:
                waiting.append(self._executor.submit(work, item))
                if len(waiting) > self._threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BaseException:
            self._failed.set()
            raise
        finally:
            wait([future for future in waiting if not future.cancel()])

    def in_turn(self, work: Callable[[T], R], items: Iterable[T], /) -> Generator[R, None, None]:
        """Yield `work(item)` in order, in the thread of a call that is itself mapped; it stops once that map is closed.

        Args:
            work: is called with each item.
            items: in order.

        Raises:
            CancelledError: another call failed, or the caller did; nobody waits for this one's result.
        """
        for item in items:
            if self._failed.is_set():
                raise CancelledError
            yield work(item)


@contextmanager
def thread_map(threads: int) -> Iterator[ThreadMap]:
    """Open a map over `threads` threads, which release the GIL while they read, check, add and write."""
    with single_torch_thread():
        if threads == 1:  # a thread would only alternate with the caller
            yield ThreadMap(None, threads)
            return
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as executor:
            yield ThreadMap(executor, threads)
