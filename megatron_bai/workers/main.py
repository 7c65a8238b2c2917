"""Run `python -m megatron_bai.workers.main PARENT REQUESTS REPLIES TARGET MAX_BYTES`: call foreign code for a pool.

Reads a line `[number, arguments]` of JSON a call from the descriptor REQUESTS, writes to REPLIES a line
`{"id": number, "value": …}` or `{"id": number, "failure": …}` for each, after a first line that says whether the target
was found. Neither descriptor is a standard one, nor open in a process that the target starts. What it prints goes to
the log. The process is two: one that works, and its guard (`utils/process_guard.py`), with which all that the target
started ends.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from megatron_bai.utils.process_guard import fork_guarded
from megatron_bai.workers.outcomes import UnusableValueError, describe_error, import_attribute


def call_target(target: Callable[..., Any], arguments: list[Any]) -> dict[str, Any]:
    """Return `{"value": …}` of one call, or `{"failure": reason}` where it raised.

    Args:
        target: what the pool calls.
        arguments: of the call, positional.
    """
    try:
        return {"value": target(*arguments)}
    except UnusableValueError as error:
        return {"failure": str(error)}
    except BaseException as error:
        return {"failure": describe_error(error)}


def encode_reply(number: int, content: dict[str, Any], max_bytes: int) -> bytes:
    """Return the line of a reply; of one that is no JSON, no UTF-8 or too long, the line that says so.

    Args:
        number: of the request.
        content: of `call_target`.
        max_bytes: of the line.
    """
    try:
        line = json.dumps({"id": number} | content, ensure_ascii=False, allow_nan=False).encode()
        failure = f"it returned {len(line):,} bytes, more than {max_bytes:,}" if len(line) >= max_bytes else ""
    except UnicodeEncodeError:
        failure = "it returned a text that is no UTF-8"
    except BaseException as error:  # NaN, bytes, what is nested too deeply, a value of its own class
        failure = f"it returned what is no JSON: {describe_error(error)}"
    return (json.dumps({"id": number, "failure": failure}).encode() if failure else line) + b"\n"


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
    """Undo what the trainer blocks or ignores, which processes inherit: what a target starts expects neither."""
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)


def main() -> None:
    """Answer calls until their descriptor ends."""
    parent, requests, replies, max_bytes = map(int, (*sys.argv[1:4], sys.argv[5]))
    target = json.loads(sys.argv[4])
    fork_guarded(parent, (requests, replies))
    _reset_signals()
    _make_private(requests, replies)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="backslashreplace")  # type: ignore[union-attr]

    def reply(number: int, content: dict[str, Any]) -> None:
        with suppress(Exception):  # the target may have closed it
            sys.stdout.flush()  # what it printed: this process may be killed at any time after
        line = encode_reply(number, content, max_bytes)
        while line:
            line = line[os.write(replies, line) :]

    try:
        called = import_attribute(target["opener"])(target["name"], target["settings"])
    except BaseException as error:
        reply(0, {"failure": describe_error(error)})
        return
    reply(0, {"value": None})
    with os.fdopen(requests, encoding="utf-8") as lines:
        for line in lines:
            number, arguments = json.loads(line)
            reply(number, call_target(called, arguments))


if __name__ == "__main__":
    main()
