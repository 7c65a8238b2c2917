"""Threads that work ahead, in order and in bounded memory."""

import queue
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")
Memory = TypeVar("Memory")


class Pool(Generic[Memory]):
    """`threads` threads, which release Python's lock while they read, check and add.

    A result lies in the memory it was made in, of which there is one more than threads: while the caller takes a
    result, every thread has the next to work on, and nobody runs further ahead.
    """

    def __init__(self, threads: int, memory: Callable[[], Memory]):
        # One thread would only take turns with the caller, which writes: it then does the work itself.
        self._executor = None
        if threads > 1:
            self._executor = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
        self._ahead = threads + 1 if threads > 1 else 1
        self._free: queue.SimpleQueue[Memory] = queue.SimpleQueue()
        for _ in range(self._ahead):
            self._free.put(memory())

    def map(self, work: Callable[[Item, Memory], Result], items: Iterable[Item]) -> Iterator[Result]:
        """The results of `work(item, memory)`, in the order of `items`, each valid until the next is asked for."""
        return self._inline(work, items) if self._executor is None else self._threaded(self._executor, work, items)

    def _inline(self, work: Callable[[Item, Memory], Result], items: Iterable[Item]) -> Iterator[Result]:
        memory = self._free.get()
        try:
            for item in items:
                yield work(item, memory)
        finally:
            self._free.put(memory)

    def _threaded(
        self, executor: ThreadPoolExecutor, work: Callable[[Item, Memory], Result], items: Iterable[Item]
    ) -> Iterator[Result]:
        def run(item: Item) -> tuple[Result, Memory]:
            memory = self._free.get()
            try:
                return work(item, memory), memory
            except BaseException:
                self._free.put(memory)
                raise

        waiting: deque[Future[tuple[Result, Memory]]] = deque()
        source = iter(items)
        try:
            while True:
                for item in source:
                    waiting.append(executor.submit(run, item))
                    if len(waiting) == self._ahead:
                        break
                if not waiting:
                    return
                result, memory = waiting.popleft().result()
                try:
                    yield result
                finally:
                    self._free.put(memory)
        finally:  # of an error too: nothing is left running into memory that is used anew
            for future in waiting:
                future.cancel()
            for future in waiting:
                if not future.cancelled() and future.exception() is None:
                    self._free.put(future.result()[1])

    def __enter__(self) -> "Pool[Memory]":
        self._torch_threads = torch.get_num_threads()
        torch.set_num_threads(1)  # OpenMP's would fight with ours, and tiles are too small for them
        return self

    def __exit__(self, *exception: object) -> None:
        torch.set_num_threads(self._torch_threads)
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)
