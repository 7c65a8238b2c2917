"""A process that ends with all that it started, however it or its parent ends: daemons and new sessions included.

A process group does not hold what calls `setsid`, and nothing ends the children of a process that is killed. So the
process forks: the child does the work, and the other one, its guard, is the parent that the kernel gives to whatever
the child leaves behind (`PR_SET_CHILD_SUBREAPER`).
"""

import ctypes
import os
import resource
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from megatron_bai.utils.child_processes import die_with_parent

_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
_END_S = 5.0  # to end descendants, of which some may belong to other users
_POLL_S = 0.01


def fork_guarded(parent: int, descriptors: Sequence[int] = ()) -> None:
    """Return in a new child; this process stays behind as its guard and never returns.

    Once the child has ended, `parent` has, or the guard got SIGTERM, every descendant is killed, and the guard ends as
    the child did. It must have one thread only.

    Args:
        parent: pid of this process's parent.
        descriptors: which the guard closes: the child's alone.
    """
    die_with_parent(parent, signal.SIGTERM)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGCHLD})
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    guard = os.getpid()
    if child := os.fork():
        for descriptor in descriptors:
            os.close(descriptor)
        _guard(child)
    die_with_parent(guard)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _guard(child: int) -> NoReturn:
    """Wait for the child to end or for SIGTERM; kill what is left, and end as the child did."""
    code = None
    while code is None and signal.sigwait({signal.SIGTERM, signal.SIGCHLD}) == signal.SIGCHLD:
        code = _reap().get(child)
    ended_by = time.monotonic() + _END_S
    while (children := _children()) and time.monotonic() < ended_by:
        for pid in children:  # whose own children become ours
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        code = _reap().get(child, code)
        time.sleep(_POLL_S)
    if code is not None and code < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with suppress(OSError, ValueError):
            signal.signal(-code, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {-code})
        os.kill(os.getpid(), -code)
    os._exit(1 if code is None else abs(code))


def _reap() -> dict[int, int]:
    """Return the exit codes of children that have ended, by pid; of one that a signal ended its negative."""
    codes = {}
    with suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            codes[ended[0]] = os.waitstatus_to_exitcode(ended[1])
    return codes


def _children() -> list[int]:
    """Return the pids of this process's children, those that have ended and were not waited for too."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            fields = (directory / "stat").read_text(errors="replace").rpartition(")")[2].split()
            if int(fields[1]) == os.getpid():
                found.append(int(directory.name))
    return found
