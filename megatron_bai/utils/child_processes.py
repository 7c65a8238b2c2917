"""Processes that do not outlive the one that started them, however it ends."""

import ctypes
import os
import signal
from types import SimpleNamespace

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_forks = SimpleNamespace(hooked=False, followed=False, parent=0)


def die_with(parent: int) -> None:
    """Have the kernel kill this process when `parent` ends; end now if it already has.

    Precisely: when the thread that started this process ends.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the request was made
        os._exit(1)


def forks_die_with_us(yes: bool) -> None:
    """Whether the kernel is to kill the processes forked from now on, and those they fork, when the one that forked
    them dies."""
    if yes and not _forks.hooked:  # for good: there is no way to unregister
        os.register_at_fork(before=lambda: setattr(_forks, "parent", os.getpid()), after_in_child=_follow)
        _forks.hooked = True
    _forks.followed = yes


def _follow() -> None:
    if _forks.followed:
        die_with(_forks.parent)
