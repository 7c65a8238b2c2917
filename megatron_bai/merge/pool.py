"""Threads that work side by side, with their results in order."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Protocol, TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


class Map(Protocol):
    """The results of `work(item)` in the order of `items`, made while they are asked for, until it is closed."""

    def __call__(
        self, work: Callable[[Item], Result], items: Iterable[Item], /
    ) -> Generator[Result, None, None]: ...


@contextmanager
def one_thread() -> Iterator[None]:
    """Tiles are too small for OpenMP, which is slower than one thread as soon as another process wants the core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def pool(threads: int) -> Iterator[Map]:
    """A `map` over `threads` threads, which let go of Python's lock while they read, check, add and write.

    They are at most an item each ahead of the caller. Once a map is closed, nothing of it is running.
    """

    def alone(work: Callable[[Item], Result], items: Iterable[Item]) -> Generator[Result, None, None]:
        yield from map(work, items)

    def threaded(work: Callable[[Item], Result], items: Iterable[Item]) -> Generator[Result, None, None]:
        waiting: deque[Future[Result]] = deque()
        try:
            for item in items:
                waiting.append(executor.submit(work, item))
                if len(waiting) > threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            wait([future for future in waiting if not future.cancel()])

    with one_thread():
        if threads == 1:  # it would only take turns with the caller
            yield alone
            return
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as executor:
            yield threaded
