"""Run `python -m megatron_bai.rewards.worker_main PARENT SAMPLES REPLIES FUNCTION SETTINGS`: call a reward function.

Reads a JSON list of arguments a line from the descriptor SAMPLES, writes to REPLIES a line `{"value": …}` or
`{"failure": …}` for each, after a first line that says whether the function was found. Neither descriptor is a standard
one, nor open in a process that the function starts. What the function prints goes to the log. The process is two: one
that works, and its guard (`utils/process_guard.py`), with which all that the function started ends.
"""

import importlib
import json
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

from megatron_bai.rewards.reward import convert_reward
from megatron_bai.utils.process_guard import fork_guarded


def import_function(name: str) -> Callable[..., Any]:
    """Import `module:function`."""
    module, _, path = name.partition(":")
    found: Any = importlib.import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
    if not callable(found):
        raise TypeError(f"{name} is a {type(found).__name__} and no function")
    function: Callable[..., Any] = found
    return function


def call_function(function: Callable[..., Any], arguments: list[Any]) -> dict[str, Any]:
    """Return the reward of one sample, or what is wrong with it.

    Args:
        function: of the user; it should return a number that `convert_reward` takes.
        arguments: positional: prompt, response, answer, extra, and settings where the reward has them.

    Returns:
        `{"value": float}`; or `{"failure": reason}` where it raised, or returned something else.
    """
    try:
        value = function(*arguments)
    except BaseException as error:
        return {"failure": describe_error(error)}
    try:
        return {"value": convert_reward(value)}
    except ValueError as error:
        return {"failure": f"it returned {error}"}
    except BaseException as error:  # of a value that raises when it is looked at
        return {"failure": f"it returned a {type(value).__name__} that cannot be read: {describe_error(error)}"}


def describe_error(error: BaseException) -> str:
    """Return an exception in one line of at most 300 characters that any file can hold."""
    try:
        text = f"{type(error).__name__}: {error}"[:300]
    except BaseException:  # its own __str__
        text = f"{type(error).__name__}, whose message cannot be read"
    return " ".join(text.encode("utf-8", "backslashreplace").decode().split())[:300]


def _make_private(*descriptors: int) -> None:
    """Close the descriptors in every process that this one starts, by exec or by fork."""

    def close_all() -> None:
        for descriptor in descriptors:
            with suppress(OSError):
                os.close(descriptor)

    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)
    os.register_at_fork(after_in_child=close_all)


def _reset_signals() -> None:
    """Undo what the trainer blocks or ignores, which processes inherit: what a reward starts expects neither."""
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)


def main() -> None:
    """Answer samples until their descriptor ends."""
    parent, samples, answers = map(int, sys.argv[1:4])
    name, settings = sys.argv[4], json.loads(sys.argv[5])
    fork_guarded(parent, (samples, answers))
    _reset_signals()
    _make_private(samples, answers)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="backslashreplace")  # type: ignore[union-attr]
    replies = os.fdopen(answers, "w", encoding="utf-8")

    def reply(content: dict[str, Any]) -> None:
        with suppress(Exception):  # the function may have closed it
            sys.stdout.flush()  # what the function printed: this process may be killed at any time after
        replies.write(json.dumps(content) + "\n")
        replies.flush()

    try:
        function = import_function(name)
    except BaseException as error:
        reply({"failure": describe_error(error)})
        return
    reply({"value": 0.0})
    last = [] if settings is None else [SimpleNamespace(**settings)]
    with os.fdopen(samples, encoding="utf-8") as lines:
        for line in lines:
            reply(call_function(function, [*json.loads(line), *last]))


if __name__ == "__main__":
    main()
