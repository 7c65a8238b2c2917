"""How a merge uses its process: threads that work side by side, with their results in order, and no other work."""

import gc
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Protocol, TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


class OrderedMap(Protocol):
    """The results of `work(item)` in the order of `items`, made while they are asked for, until it is closed."""

    def __call__(
        self, work: Callable[[T], R], items: Iterable[T], /
    ) -> Generator[R, None, None]: ...


@contextmanager
def single_torch_thread() -> Iterator[None]:
    """Tiles are too small for OpenMP, which is slower than one thread as soon as another process wants the core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def gc_disabled() -> Iterator[None]:
    """The index of many chunks is many objects, all in use to the end. To search them for cycles, in which a merge leaves
    some 200, took Python a third of the time of one of small chunks."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def background_writer() -> Iterator[Callable[[Callable[[], None]], None]]:
    """Has calls done by a thread beside this one, in their order, at most one behind: a call waits for that before.

    Raises:
        Exception: what a call raises, at the next one or at the end.
    """
    last: Future[None] = Future()
    last.set_result(None)

    def hand_over(work: Callable[[], None]) -> None:
        nonlocal last
        last.result()
        last = executor.submit(work)

    with ThreadPoolExecutor(1) as executor:
        yield hand_over
        last.result()


@contextmanager
def thread_map(threads: int) -> Iterator[OrderedMap]:
    """A `map` over `threads` threads, which let go of Python's lock while they read, check, add and write.

    They are at most an item each ahead of the caller. Once a map is closed, nothing of it is running.
    """

    def alone(work: Callable[[T], R], items: Iterable[T]) -> Generator[R, None, None]:
        yield from map(work, items)

    def threaded(work: Callable[[T], R], items: Iterable[T]) -> Generator[R, None, None]:
        waiting: deque[Future[R]] = deque()
        try:
            for item in items:
                waiting.append(executor.submit(work, item))
                if len(waiting) > threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            wait([future for future in waiting if not future.cancel()])

    with single_torch_thread():
        if threads == 1:  # it would only take turns with the caller
            yield alone
            return
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as executor:
            yield threaded
