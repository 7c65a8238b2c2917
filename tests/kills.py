"""Ending a process with SIGKILL at a chosen step of its writing, and looking at what it left.

Nothing in the library knows of this: a forked child counts what Python itself reports of files (PEP 578) and, as bytes
go unreported, its writes, and kills itself before the step asked for.
"""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from megatron_bai.checkpoint import atomic_dir

_STEPS = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"}


def die(*_: object, **__: object) -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("it lives")


def in_child(function: Callable, *arguments: Any) -> int:
    """The exit code of `function` in a forked process; negative for a signal."""
    child = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    child.start()
    child.join(60)
    assert child.exitcode is not None
    return child.exitcode


def at_step(step: int, function: Callable, *arguments: Any) -> None:
    """Run `function`, but die before its `step`-th change of a directory or opening of a file to write. In a child."""
    left = step

    def count(*_: object) -> None:
        nonlocal left
        if left == 0:
            die()
        left -= 1

    def hook(event: str, about: tuple) -> None:
        if event in _STEPS or event == "open" and about[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            count()

    exchange = atomic_dir._exchange_dirs
    atomic_dir._exchange_dirs = lambda *paths: (count(), exchange(*paths), count())[
        1
    ]  # a system call that is not reported
    os.fsync = count  # which a power cut would miss, but SIGKILL does not
    sys.addaudithook(hook)
    function(*arguments)


def after_bytes(count: int, function: Callable, *arguments: Any) -> None:
    """Run `function`, but die once `count` bytes of weights are written, in the middle of an item. In a child."""
    left, pwrite = count, os.pwrite

    def dying_pwrite(fd: int, data: Any, at: int) -> int:
        nonlocal left
        data = memoryview(data).cast("B")
        done = pwrite(fd, data[:left], at)
        left -= len(data)
        return done if left > 0 else die()

    def dying_stream(places: Any, crcs: Any, lengths: Any, done: Any, rows: Any, *rest: Any) -> None:
        nonlocal left
        before = lengths.cumsum() - lengths
        stops = (left // len(rows) - before).clip(0, lengths) // 2 * 2  # sums are written side by side
        stream(places, crcs, stops, done, rows, *rest)
        left -= int(lengths.sum()) * len(rows)
        if left <= 0:
            die()

    os.pwrite = dying_pwrite
    os.pwritev = lambda fd, parts, at: dying_pwrite(fd, b"".join(parts), at)
    kernel: Any = sys.modules.get("megatron_bai.merge.execution.bf16_kernel")
    if kernel:  # which writes past Python
        stream, kernel.stream = kernel.stream, dying_stream
    function(*arguments)
