"""What a worker process and its pool say about a call; light, since every worker imports it."""

import importlib
import importlib.util
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
S = TypeVar("S")


@dataclass(frozen=True)
class Target:
    """What worker processes call.

    Attributes:
        opener: `module:function`, called once in each process as `opener(name, settings)`; what it returns is called
            with the arguments of each call and returns JSON. It runs before the first call, so that what cannot be
            imported is known at the start.
        name: of the foreign code, `module:attribute` or `./path.py:attribute`.
        settings: JSON.
        title: for messages: "the reward a:b".
        timeout_setting: name of the setting of a call's seconds, for messages.
    """

    opener: str
    name: str
    settings: Any = None
    title: str = "the function"
    timeout_setting: str = "timeout_s"


@dataclass(frozen=True)
class Outcome:
    """The JSON that a call returned; or why it returned none, in one line."""

    value: Any = None
    failure: str = ""


class UnusableValueError(Exception):
    """What a target raises where foreign code returned something of no use; the message says all."""


def describe_error(error: BaseException) -> str:
    """Return an exception in one line of at most 300 characters that any file can hold."""
    try:
        text = f"{type(error).__name__}: {error}"[:300]
    except BaseException:  # its own __str__
        text = f"{type(error).__name__}, whose message cannot be read"
    return " ".join(text.encode("utf-8", "backslashreplace").decode().split())[:300]


def import_attribute(name: str) -> Any:
    """Import `module:attribute` or `./path.py:attribute`; beside the file of a path it finds other modules."""
    module_name, _, path = name.rpartition(":")
    found: Any = (
        _import_file(Path(module_name)) if module_name.endswith(".py") else importlib.import_module(module_name)
    )
    for part in path.split("."):
        found = getattr(found, part)
    return found


def _import_file(file: Path) -> Any:
    """Import a file as the module that its stem names."""
    sys.path.insert(0, str(file.resolve().parent))
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    spec.loader.exec_module(module)
    return module


def join_futures(futures: "Sequence[Future[T]]", function: Callable[[list[T]], S]) -> "Future[S]":
    """Return a future of `function` of the results of futures. Cancelling it cancels those that it waits for.

    Args:
        futures: whose exceptions, or cancellation, are the result's too.
        function: called in the thread that sets the last result; quick.
    """
    joined: Future[S] = Future()
    waiting, lock = len(futures), threading.Lock()

    def finish(done: "Future[T]") -> None:
        nonlocal waiting
        with lock:
            waiting -= 1
            is_last = not waiting
        if not is_last:
            return
        if any(future.cancelled() for future in futures):
            joined.cancel()
        if not joined.set_running_or_notify_cancel():
            return
        try:
            joined.set_result(function([future.result() for future in futures]))
        except BaseException as error:
            joined.set_exception(error)

    def cancel(done: "Future[S]") -> None:
        if done.cancelled():
            for future in futures:
                future.cancel()

    joined.add_done_callback(cancel)
    for future in futures:
        future.add_done_callback(finish)
    return joined


def make_completed_future(value: T) -> "Future[T]":
    """Return a future whose result is known already."""
    future: Future[T] = Future()
    future.set_result(value)
    return future


def map_future(future: "Future[T]", function: Callable[[T], S]) -> "Future[S]":
    """Return a future of `function` of one future's result, as `join_futures` does of several.

    Args:
        future: to wait for.
        function: called in the thread that sets its result; quick.
    """
    return join_futures([future], lambda results: function(results[0]))


def wait_for_all(futures: "Sequence[Future[T]]") -> list[T]:
    """Return the results in order. Where one raises, or the wait is interrupted, the others are cancelled."""
    try:
        return [future.result() for future in futures]
    finally:
        for future in futures:
            future.cancel()
