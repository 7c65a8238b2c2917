"""Child processes that do not outlive their parent, however it ends."""

import ctypes
import os
import signal
from types import SimpleNamespace

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_forks = SimpleNamespace(hooked=False, enabled=False, parent=0)


def die_with_parent(pid: int) -> None:
    """Have the kernel kill this process when its parent ends; exit now if it already has.

    Precisely: when the thread that started this process ends.

    Args:
        pid: of the parent.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != pid:  # it ended before the request was made
        os._exit(1)


def set_forks_die_with_parent(enabled: bool) -> None:
    """Set whether the kernel kills the processes forked from now on, and those they fork, when their parent ends."""
    if enabled and not _forks.hooked:  # for good: there is no way to unregister
        os.register_at_fork(before=lambda: setattr(_forks, "parent", os.getpid()), after_in_child=_bind_child_to_parent)
        _forks.hooked = True
    _forks.enabled = enabled


def _bind_child_to_parent() -> None:
    """Apply `set_forks_die_with_parent` in a child that was just forked."""
    if _forks.enabled:
        die_with_parent(_forks.parent)
